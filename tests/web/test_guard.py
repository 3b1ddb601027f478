"""What may not pass: names, origins, tokens, and bodies that are large, slow, or unpack to much."""

import asyncio
import base64
import json
import socket
import struct
import time
import zlib

import pytest

from ldm.web import guard
from ldm.web import server as serving
from tests.web.conftest import PROMPT, running

ASKED = {"prompt": PROMPT, "num_inference_steps": 1}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[::2]", "0.0.0.0"])
def test_by_another_name_nothing_is_reached(server, host):
    """As a page has it whose own name was made to point here."""
    for path in ("/health", "/v1/form", "/sdapi/v1/options"):
        refused = server.client.get(path, headers={"Host": host})
        assert refused.status_code == 421 and "not called" in refused.json()["detail"]


def test_its_own_names_are_taken_and_others_that_it_is_told(bundled):
    with running(bundled, names=("pictures.example",)) as server:
        for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "[::1]:80", "LOCALHOST", "pictures.example:443"):
            assert server.client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://["},
        {"Origin": "http://[::1"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_another_page_changes_nothing_and_learns_nothing(server, headers):
    for path in ("/v1/images", "/sdapi/v1/interrupt"):
        assert server.client.post(path, json=ASKED, headers=headers).status_code == 403
    assert server.client.delete("/v1/jobs/some", headers=headers).status_code == 403
    for method in ("GET", "HEAD", "OPTIONS"):
        assert server.client.request(method, "/health", headers=headers).status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_from_another_page_a_link_may_be_followed_and_nothing_else(server, site):
    def asked(mode: str, kind: str) -> dict[str, str]:
        return {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": kind}

    assert server.client.get("/v1/form", headers=asked("navigate", "document")).status_code == 200
    assert server.client.post("/v1/images", json=ASKED, headers=asked("navigate", "document")).status_code == 403
    others = [("no-cors", "image"), ("no-cors", "script"), ("cors", "empty"), ("navigate", "iframe"), ("navigate", "object")]
    for mode, kind in others:
        assert server.client.get("/v1/form", headers=asked(mode, kind)).status_code == 403, (mode, kind)


def test_its_own_page_may(server):
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.client.post("/v1/images", json=ASKED, headers=headers).status_code == 200
    assert server.client.get("/v1/form", headers=headers).status_code == 200
    typed = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.client.get("/v1/form", headers=typed).status_code == 200


def test_a_websocket_is_for_its_own_page():
    def opened(origin: bytes) -> list[str]:
        seen = []

        async def app(scope, receive, send):
            seen.append("opened")

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            seen.append(message["type"])

        headers = [(b"host", b"localhost:7860"), (b"origin", origin)]
        scope = {"type": "websocket", "path": "/", "headers": headers}
        asyncio.run(guard.Guard(app, hosts=frozenset({"localhost"}))(scope, receive, send))
        return seen

    assert opened(b"http://localhost:7860") == ["opened"]
    assert opened(b"http://evil.example") == opened(b"http://[") == ["websocket.close"]


def test_beyond_loopback_a_token_is_drawn_and_wanted(bundled):
    drawn = serving.with_token(serving.Options(host="0.0.0.0"))
    assert len(drawn.token) >= 24 and drawn != serving.with_token(serving.Options(host="0.0.0.0"))
    assert serving.with_token(serving.Options(host="127.0.0.5")).token is None
    with pytest.raises(ValueError, match="the token may have letters"):
        serving.with_token(serving.Options(token="short"))
    with running(bundled, token="a-secret-token") as server:
        basic = base64.b64encode(b"anyone:a-secret-token").decode()
        good = [{"Authorization": "Bearer a-secret-token"}, {"Authorization": f"Basic {basic}"}]
        good.append({"Cookie": f"{guard.COOKIE}=a-secret-token"})
        wrong = [{}, {"Authorization": "Bearer other-token"}, {"Authorization": "Basic ???"}, {"Cookie": f"{guard.COOKIE}=no"}]
        for path in ("/v1/form", "/sdapi/v1/options", "/metrics", "/openapi.json"):
            assert [server.client.get(path, headers=headers).status_code for headers in good] == [200] * 3
            assert [server.client.get(path, headers=headers).status_code for headers in wrong] == [401] * 4
        assert server.client.post("/v1/images?token=a-secret-token", json=ASKED).status_code == 401
        assert server.client.get("/health").status_code == 200
        first = server.client.get("/?token=a-secret-token", follow_redirects=False)
        assert first.status_code == 303 and "a-secret-token" not in first.headers["location"]
        assert "HttpOnly" in first.headers["set-cookie"] and "SameSite=Lax" in first.headers["set-cookie"]
        assert server.client.get("/v1/form").status_code == 200  # the client keeps cookies


def test_the_token_is_found_among_the_cookies_of_other_servers(bundled):
    """Cookies know no ports: those of every server on this machine come along."""
    with running(bundled, token="a-secret-token") as server:
        for others in ('x={"a":1}', "u=a,b c", "a b", "=", 'n="', "é=ü"):
            for cookies in (f"{others}; {guard.COOKIE}=a-secret-token", f"{guard.COOKIE}=a-secret-token; {others}"):
                answer = server.client.get("/v1/form", headers={"Cookie": cookies.encode()})
                assert answer.status_code == 200, cookies


def test_with_a_token_it_is_reached_by_any_of_its_addresses(bundled):
    """A server that listens on all of them knows none; whose name leads here by rebinding has a name."""
    with running(bundled, token="a-secret-token") as server:
        good = {"Authorization": "Bearer a-secret-token"}
        for host in ("192.168.1.5:7860", "10.0.0.1", "[fe80::1]:7860"):
            assert server.client.get("/v1/form", headers={"Host": host, **good}).status_code == 200
            assert server.client.get("/v1/form", headers={"Host": host}).status_code == 401
        for host in ("evil.example", "192.168.1.5.evil.example", "192.168.1", "[192.168.1.5]", ""):
            assert server.client.get("/v1/form", headers={"Host": host, **good}).status_code == 421


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        head = (
            f"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {10**10}\r\n\r\n"
        )
        wire.sendall(head.encode())
        wire.settimeout(10)
        assert b" 413 " in wire.recv(1000)
    endless = (b"x" * (1 << 20) for _ in range(60))
    refused = server.client.post("/v1/images", content=endless, headers={"Content-Type": "application/json"})
    assert refused.status_code == 413 and "more than" in refused.json()["detail"]


def test_a_refusal_reaches_a_client_that_is_still_sending(server):
    """A connection closed with bytes unread is reset, and the answer with it."""
    body = b"x" * 400_000
    head = f"POST /v1/images HTTP/1.1\r\nHost: evil.example\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.settimeout(10)
        wire.sendall(head.encode())
        time.sleep(0.2)  # refused by now
        for start in range(0, len(body), 50_000):
            wire.sendall(body[start : start + 50_000])
            time.sleep(0.02)
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 421 ") and b"not called 'evil.example'" in answer


def test_slow_clients_are_let_go_and_hold_up_nobody(bundled, monkeypatch):
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.5)
    with running(bundled) as server:
        server.server.config.app.seconds = 0.5
        wires = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
        for wire in wires[:50]:
            wire.sendall(b"POST /v1/images HTTP/1.1\r\nHost: localh")  # and no more
        for wire in wires[50:]:
            head = (
                b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
            )
            wire.sendall(head + b'{"prompt"')
        assert server.client.post("/v1/images", json=ASKED).status_code == 200
        time.sleep(1.5)
        for wire in wires:
            wire.settimeout(20)
            answer = wire.recv(1000)
            assert answer == b"" or b" 408 " in answer
            wire.close()


def told(wire: socket.socket) -> bytes:
    """An answer in JSON, which may come in parts."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += wire.recv(65536)
    return answer


def test_a_request_s_time_begins_again_on_a_connection_that_is_kept(bundled, monkeypatch):
    """Whoever says half of the second one is let go, though now and then another letter comes."""
    monkeypatch.setattr(serving, "HEADER_SECONDS", 1.0)
    with running(bundled) as server, socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.settimeout(20)
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
        wire.sendall(head + b"\r\n")
        assert b" 200 " in told(wire)
        wire.sendall(b"POST /v1/form HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{")
        time.sleep(1.5)  # the head was there in time; the body has a time of its own
        wire.sendall(b"}")
        assert b" 405 " in told(wire)
        wire.sendall(head)
        wire.settimeout(0.1)
        answer, deadline = None, time.monotonic() + 8  # uvicorn's own patience would be 10
        while answer is None and time.monotonic() < deadline:
            try:
                answer = wire.recv(1000)
            except TimeoutError:
                wire.sendall(b"x")
            except ConnectionError:
                answer = b""
        assert answer == b""


def unread(server, length: bytes) -> socket.socket:
    """A connection whose answer does not fit into the buffers on the way, and which nobody has read so far."""
    server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.settimeout(20)
    wire.connect(("127.0.0.1", server.port))
    wire.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: " + length + b"\r\n\r\n")
    return wire


def count(server) -> int:
    return len(server.server.server_state.connections)


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_whoever_does_not_take_an_answer_is_cut_off(bundled, monkeypatch, connection):
    monkeypatch.setattr(serving, "TAKE_SECONDS", 0.4)
    with running(bundled) as server, unread(server, connection):
        deadline = time.monotonic() + 30
        while not count(server) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert count(server) == 1
        while count(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert count(server) == 0


def test_whoever_takes_an_answer_slowly_gets_it_whole(bundled, monkeypatch):
    monkeypatch.setattr(serving, "TAKE_SECONDS", 1.5)
    with running(bundled) as server, unread(server, b"close") as wire:
        answer, start = b"", time.monotonic()
        while part := wire.recv(1000):
            answer += part
            time.sleep(0.1)
        assert time.monotonic() - start > 1.5
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["info"]["title"] == "ldm"


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels: a thousand times smaller than what it unpacks to."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    line = b"\0" * (1 + side // 8)
    data = b"".join([*(rows.compress(line) for _ in range(side)), rows.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_picture_that_unpacks_to_much_is_refused_by_its_header(server):
    data = base64.b64encode(bomb(9_000)).decode()
    assert len(data) < 100_000
    start = time.monotonic()
    refused = server.client.post("/v1/images", json=ASKED | {"image": data})
    assert refused.status_code == 422 and "9000 x 9000 pixels; expected at most" in refused.json()["detail"][0]["msg"]
    refused = server.client.post("/sdapi/v1/img2img", json={"prompt": PROMPT, "init_images": [data], "steps": 1})
    assert refused.status_code == 422 and time.monotonic() - start < 20
    assert server.client.post("/sdapi/v1/png-info", json={"image": data}).status_code == 422


@pytest.mark.parametrize(
    "path", ["/v1/jobs/../../etc/passwd", "/v1/jobs/%2e%2e%2fetc%2fpasswd", "//etc/passwd", "/file=/etc/passwd"]
)
def test_no_path_leads_to_a_file(server, path):
    with socket.create_connection(("127.0.0.1", server.port)) as wire:
        wire.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert b"root:" not in answer and b" 404 " in answer.split(b"\r\n")[0]


def test_adapters_are_names_in_the_server_s_folder_and_nothing_else(bundled, tmp_path):
    from ldm.web.form import Limits
    from tests import lora_files

    (tmp_path / "inside").mkdir()
    lora_files.kohya(tmp_path / "inside" / "style.safetensors")
    lora_files.kohya(tmp_path / "outside.safetensors")
    with running(bundled, limits=Limits(adapter_folder=tmp_path / "inside")) as server:
        for name in ("../outside", str(tmp_path / "outside.safetensors"), "style.safetensors/../../outside", "."):
            for asked in ({"loras": [{"name": name}]}, {"prompt": f"{PROMPT} <lora:{name}:1>"}):
                assert server.client.post("/v1/images", json=ASKED | asked).status_code == 422, (name, asked)
        assert server.client.get("/v1/form").json()["loras"] == ["style"]


def test_no_address_that_a_request_names_is_visited(server):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
        assert server.client.post("/v1/images", json=ASKED | {"image": url}).status_code == 422
        with pytest.raises(TimeoutError):
            listener.accept()


def asked_of(one: guard.Guard, parts: list[bytes], path: str = "/", **headers: str) -> dict:
    """The first message of its answer to a request whose body comes in parts."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    answers = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    given = [(b"host", b"localhost"), *((name.encode(), value.encode()) for name, value in headers.items())]
    asyncio.run(one({"type": "http", "method": "POST", "path": path, "headers": given}, receive, send))
    return answers[0]


def test_bytes_and_budget_are_bounded_by_the_guard_itself(monkeypatch):
    monkeypatch.setattr(guard, "SMALL", 10)
    got = []

    async def app(scope, receive, send):
        got.append((await receive(), one.held))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    one = guard.Guard(app, hosts=frozenset({"localhost"}), most_bytes=100, budget=150)
    assert asked_of(one, [b"x" * 60, b"y" * 40])["status"] == 200
    whole = {"type": "http.request", "body": b"x" * 60 + b"y" * 40, "more_body": False}
    assert got == [(whole, 0)]  # what is with the application holds up no other body
    assert asked_of(one, [b"x" * 60, b"x" * 41])["status"] == 413
    one.held = 100
    assert asked_of(one, [b"x" * 60])["status"] == 200
    refused = asked_of(one, [b"x" * 60, b"x"])
    assert refused["status"] == 429 and (b"retry-after", b"5") in refused["headers"]
    one.held = 150  # spent; small ones pass nevertheless
    assert asked_of(one, [b"x" * 6, b"x" * 4])["status"] == 200
    assert asked_of(one, [b"x" * 6, b"x" * 5])["status"] == 429
    assert one.held == 150


def test_who_needs_no_token_sends_no_body(server):
    for body in (b"{}", iter([b"{", b"}"])):
        assert server.client.request("GET", "/health", content=body).status_code == 413
