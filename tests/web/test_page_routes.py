"""What of gradio can be reached through the page, and what a call of its functions may hold: without a browser."""

import asyncio
import base64
import http.client
import io
import json
import re
import time

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")

from gradio import processing_utils, route_utils
from gradio.blocks import Block

from ldm.web import page
from tests.web.conftest import PROMPT, running
from tests.web.test_page_fields import FIELDS

JOIN, PREDICT, STREAM = "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/queue/data"
LONG = 512  # steps that nobody waits for
VALUES = FIELDS | {
    "prompt": PROMPT,
    "num_inference_steps": 2,
    "height": None,
    "seed": "9007199254740993",
}  # of the form, in its order


@pytest.fixture(scope="module")
def server(bundled):
    with running(bundled, page=True, bound=60) as found:
        yield found


@pytest.fixture
def busy(server):
    """A job that is being made, for as long as the test takes."""
    job = server.jobs.submit("txt2img", {"prompt": PROMPT, "steps": LONG, "width": 128, "height": 128, "seed": 1})
    yield job
    for one in [*server.jobs.waiting, *server.jobs.running]:
        server.jobs.cancel(one)
    until(lambda: not server.jobs.running and not server.jobs.waiting)


def until(true, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(true())


def inner(server):
    """gradio's own application, behind the list."""
    return server.server.config.app.app.routes[-1].app.app


def call(session: str, **changed) -> dict:
    return {"fn_index": 0, "session_hash": session, "data": list({**VALUES, **changed}.values()), "event_data": None}


def messages(server, session: str) -> list[dict]:
    """What a session's stream tells, until it ends."""
    told = []
    with server.client.stream("GET", STREAM, params={"session_hash": session}) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line.removeprefix("data: ")))
                if told[-1]["msg"] == "close_stream":
                    break
    return told


def refused(answer, status: int = 404) -> None:
    assert answer.status_code == status, answer.text[:200]
    assert set(answer.json()) == {"detail"} and "\n" not in answer.json()["detail"]


# -- The list -----------------------------------------------------------------------------------------------------------------

USED = {
    ("GET", "/"),
    ("HEAD", "/"),
    *(("GET", path) for path in ("/theme.css", "/favicon.ico", "/manifest.json", "/static/{path}", "/assets/{path}", STREAM)),
    ("GET", "/gradio_api/app_id"),
    ("POST", JOIN),
    ("POST", PREDICT),
}


def flat(routes):
    for route in routes:
        yield from flat(route.original_router.routes) if hasattr(route, "original_router") else [route]


def test_every_route_of_gradio_that_the_page_does_not_use_is_404(server):
    asked, own = 0, {getattr(route, "path", None) for route in server.server.config.app.app.routes[:-1]}
    for route in flat(inner(server).routes):
        for method in getattr(route, "methods", None) or ("GET", "POST"):
            path = re.sub(r"\{(\w+)(:\w+)?\}", r"{\1}", getattr(route, "path", "/"))
            if (method, path) in USED or path in own or path == "/gradio_api/run/{api_name}":
                continue
            asked += 1
            answer = server.client.request(method, re.sub(r"\{\w+\}", "x", path), content=b"" if method == "POST" else None)
            assert answer.status_code == 404, (method, path)
            assert method == "HEAD" or set(answer.json()) == {"detail"}
    assert asked > 50


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://example.org/picture.png",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/proxy=https://example.org/picture.png",
        "/gradio_api/stream/a/b/1/playlist.m3u8",
        "/gradio_api/heartbeat/abc",
        "/gradio_api/run/cancel",
        "/gradio_api/call/make",
        "/config",
        "/svelte/svelte.js",
        "/monitoring",
        "/gradio_api/mcp/",
        "/nothing",
        "//etc/passwd",
        "/assets/",
        "/static",
        "/static/img/../img/logo.svg",
        "/static/%2e%2e/index.html",
        "/assets/..%2findex.html",
        "/assets/.hidden",
        "/assets/a%00b",
        "/assets/" + "a" * 300,
        "/assets/" + "a/" * 50 + "a",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_whatever_else_is_asked_for_is_404(server, path, method):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)  # which sends the path as it is
    connection.request(method, path)
    answer = connection.getresponse()
    assert answer.status == 404 and set(json.load(answer)) == {"detail"}
    connection.close()


def test_what_the_page_uses_is_there(server):
    html = server.client.get("/").text
    names = re.findall(r'(?:src|href)="\./(assets/[^"]+)"', html)
    assert len(names) >= 2
    for name in (*names, "theme.css", "favicon.ico", "manifest.json", "static/img/logo.svg", "gradio_api/app_id"):
        assert server.client.get(f"/{name}").status_code == 200
    for name in (*names, "theme.css"):
        refused(server.client.post(f"/{name}"))
    assert server.client.head("/").status_code == 200


def test_queries_reach_nothing(server):
    plain = server.client.get("/").text
    assert server.client.get("/", params={"page": "other", "deep_link": "abc", "__theme": "dark"}).text == plain


def test_no_other_origin_may_read_an_answer(server):
    answer = server.client.get("/", headers={"Origin": server.url})
    assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]


def test_a_stream_that_nobody_joined_is_404(server):
    for query in ("", "?session_hash=", "?session_hash=nobody", "?session_hash=../x"):
        refused(server.client.get(f"{STREAM}{query}"))


# -- What a call may hold -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """What gradio would have read or downloaded, with all that does so replaced."""
    found = []

    def note(name):
        async def later(*given, **named):
            found.append(name)
            raise ValueError(name)

        def now(*given, **named):
            found.append(name)
            raise ValueError(name)

        return later if name.startswith(("async", "secure")) else now

    for owner, name in (
        (processing_utils, "async_ssrf_protected_download"),
        (processing_utils, "save_url_to_cache"),
        (processing_utils, "save_file_to_cache"),
        (processing_utils, "_check_allowed"),
        (route_utils, "secure_url_stream_response"),
        (Block, "async_move_resource_to_block_cache"),
        (Block, "move_resource_to_block_cache"),
    ):
        monkeypatch.setattr(owner, name, note(name))
    return found


def files():
    for path in ("https://example.org/picture.png", "http://127.0.0.1:1/", "/etc/passwd", "README.md"):
        yield {"path": path, "url": path, "orig_name": "picture.png", "meta": {"_type": "gradio.FileData"}}


def test_a_file_in_a_call_is_neither_read_nor_downloaded(server, reads):
    for file in files():
        for name in ("prompt", "loras", "canvas", "strength", "views"):
            for value in (file, [file], {"a": [file]}, [[file]]):
                refused(server.client.post(JOIN, json=call("abc", **{name: value})), 422)
        refused(server.client.post(PREDICT, json={"fn_index": 1, "session_hash": "abc", "data": [file]}), 422)
        beside = {"event_data": file, "trigger_id": 1, "simple_format": True, "batched": True, "oauth_token": "a"}
        taken = server.client.post(JOIN, json=call("abcd") | beside)
        assert taken.status_code == 200 and messages(server, "abcd")[-2]["success"]
        server.client.get(f"/gradio_api/file={file['path']}")
    assert not reads


def test_gradio_itself_would_read_it(server, reads):
    """Else the test above would show nothing."""

    async def ask():
        transport = httpx.ASGITransport(app=inner(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=server.url) as client:
            for file in files():
                await client.post(PREDICT, json={"fn_index": 1, "session_hash": "abc", "data": [file]})

    asyncio.run(ask())
    assert "async_move_resource_to_block_cache" in reads


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fn_index": 99}, "fn_index 99; expected one of [0]"),
        ({"fn_index": 1}, "fn_index 1; expected one of [0]"),
        ({"fn_index": True}, "fn_index True"),
        ({"fn_index": None}, "fn_index None"),
        ({"fn_index": [0]}, "fn_index [0]"),
        ({"session_hash": None}, "session_hash"),
        ({"session_hash": "../x"}, "session_hash"),
        ({"session_hash": "x" * 41}, "session_hash"),
        ({"data": []}, "expected a list of 16 values"),
        ({"data": "abc"}, "expected a list of 16 values"),
        ({"data": [None] * 17}, "expected a list of 16 values"),
        ({"data": [None] * 16}, "value 2 of data is no number"),
        *(
            ({"data": list({**VALUES, **field}.values())}, f"value {list(VALUES).index(*field)} of data is no")
            for field in (
                {"prompt": 3},
                {"prompt": "\ud800"},
                {"num_images": "1"},
                {"num_images": True},
                {"guidance_scale": float("nan")},
                {"guidance_scale": float("inf")},
                {"strength": 10**400},
                {"use_compel": 1},
                {"loras": "one"},
                {"loras": [1]},
                {"loras": [["one"]]},
                {"views": ["\udfff"]},
                {"views": None},
                {"canvas": {}},
            )
        ),
    ],
)
def test_a_malformed_call_is_422(server, changed, message):
    answer = server.client.post(JOIN, content=json.dumps(call("abc") | changed))
    refused(answer, 422)
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b'{"fn_index": ' + b"9" * 5000 + b"}"])
@pytest.mark.parametrize("path", [JOIN, PREDICT])
def test_a_body_that_is_no_call_is_422(server, path, body):
    refused(server.client.post(path, content=body), 422)


def test_what_runs_by_the_queue_does_not_run_without_it(server):
    refused(server.client.post(PREDICT, json=call("abc")), 422)


# -- What remains -------------------------------------------------------------------------------------------------------------


def told(message: dict) -> list:
    return message["output"]["data"]


def test_a_call_makes_a_picture_that_its_address_gives(server):
    assert server.client.post(JOIN, json=call("first", views=[*page.VIEWS.values()])).status_code == 200
    *_, last, closed = messages(server, "first")
    assert last["success"] and closed["msg"] == "close_stream"
    _, line, _, gallery, attention, denoising = (
        value[0][2] if isinstance(value, list) and len(value) == 1 else value for value in told(last)
    )
    assert "done" in line
    (made,) = json.loads(gallery)
    assert made["seed"] == VALUES["seed"] and json.loads(made["receipt"])["prompt"] == PROMPT
    for address in [made["png"], *re.findall(r'src="([^"]+)"', attention + denoising)]:
        answer = server.client.get(f"/{address}")
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    job = made["png"].split("/")[1]
    for address in (f"{job}/images/1", f"{job}/images/-1", f"{job}/preview/1", f"{job}/attention/9", "nobody/images/0"):
        refused(server.client.get(f"/page/{address}"))
    assert server.client.get(f"/page/{job}/receipts/0").status_code == 422


def test_no_picture_stays_with_gradio(server):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    changed = [{"num_inference_steps": 1}] * 8 + [{"canvas": json.dumps({"image": url})}, {"views": [*page.VIEWS.values()]}]
    for place, fields in enumerate(changed):
        session = f"session{place}"
        assert server.client.post(JOIN, json=call(session, **fields)).status_code == 200
        heard = messages(server, session)
        assert heard[-2]["success"] and "done" in json.dumps(heard[-2])
        assert "base64" not in json.dumps(heard) and max(len(json.dumps(one)) for one in heard) < 20_000
    blocks = inner(server).get_blocks()
    kept = blocks.state_holder.session_data
    assert 0 < len(kept) <= 8
    values = [config["props"].get("value") for state in kept.values() for config in state.config_values.values()]
    assert "base64" not in repr(values) and max(len(repr(value)) for value in values) < 20_000
    assert until(lambda: not blocks._queue.event_ids_to_events)  # a moment after it has told that they are over
    assert not server.server.config.app.app.routes[-1].app.sessions.held


def test_a_job_that_nobody_listens_to_is_given_up(server, busy, monkeypatch):
    monkeypatch.setattr(page, "UNHEARD", 1.0)
    before = server.jobs.totals["cancelled"]
    assert server.client.post(JOIN, json=call("deaf")).status_code == 200
    assert until(lambda: server.jobs.waiting, 5)
    assert until(lambda: not server.jobs.waiting, 10) and server.jobs.totals["cancelled"] == before + 1


def test_jobs_that_wait_hold_up_nobody_else(server, busy):
    for place in range(50):
        assert server.client.post(JOIN, json=call(f"waits{place}")).status_code == 200
    assert until(lambda: len(server.jobs.waiting) == 50, 8)
    began = time.monotonic()
    assert server.client.get("/health").json()["status"] == "ok"  # which runs in a thread, as cancelling does
    assert server.client.post(PREDICT, json={"fn_index": 1, "session_hash": "other", "data": ["nobody"]}).status_code == 200
    assert time.monotonic() - began < 5
