"""The page, in Chromium without a window: what people do with it, and what it does not do for others."""

import base64
import io
import json
import re
import shutil
import socket
import threading
import time
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from ldm.output import files
from tests.web.conftest import PROMPT, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not find_spec("gradio") or CHROMIUM is None:
    pytest.skip("gradio or a Chromium is not installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

LONG = 512  # steps that nobody waits for


@pytest.fixture(scope="module")
def server(bundled):
    with running(bundled, page=True) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1400, "height": 1100}, accept_downloads=True)
    opened = context.new_page()
    opened.asked, opened.wrong = [], []
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.goto(server.url)
    expect(opened.locator("#start")).to_be_visible()
    yield opened
    assert not opened.wrong
    context.close()


@pytest.fixture
def busy(server):
    """A job that is being made, for as long as the test takes."""
    fields = {"prompt": PROMPT, "steps": LONG, "width": 128, "height": 128, "seed": 1}
    job = server.jobs.submit("txt2img", fields)
    yield job
    assert not job.over.is_set()
    server.jobs.cancel(job)
    while server.jobs.running:
        time.sleep(0.05)


def fill(page, name: str, value: object) -> None:
    box = page.locator(f"#{name} textarea, #{name} input[type=number], #{name} input[type=text]").first
    box.fill(str(value))
    box.press("Tab")


def make(page) -> None:
    page.locator("#start").click()


def told(page):
    return page.locator("#told")


def made(page, count: int):
    """The pictures in the gallery, when there are so many."""
    expect(page.locator("#gallery figure")).to_have_count(count, timeout=60_000)
    return page.locator("#gallery figure")


def picture(figure) -> bytes:
    data = figure.locator("img").get_attribute("src")
    return base64.b64decode(data.partition("base64,")[2])


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def receipt_in(data: bytes) -> dict:
    return json.loads(files.texts(io.BytesIO(data))[files.KEY])


def test_a_picture_its_seed_its_receipt_and_the_same_again(page, tmp_path):
    fill(page, "prompt", PROMPT)
    fill(page, "num_inference_steps", 6)
    make(page)
    first = picture(made(page, 1).first)
    receipt = json.loads(page.locator("#gallery pre").first.text_content())
    assert receipt["prompt"] == PROMPT and receipt["steps"] == 6 and receipt_in(first)["seed"] == receipt["seed"]
    expect(told(page)).to_have_text("done")
    page.get_by_role("button", name=f"Seed {receipt['seed']}").click()
    expect(page.locator("#seed textarea, #seed input")).to_have_value(str(receipt["seed"]))
    make(page)
    again = picture(made(page, 2).first)
    assert np.array_equal(pixels(first), pixels(again))
    fill(page, "seed", receipt["seed"] + 1)
    make(page)
    assert not np.array_equal(pixels(first), pixels(picture(made(page, 3).first)))
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    download.value.save_as(tmp_path / "saved.png")
    assert download.value.suggested_filename == f"{receipt['seed'] + 1}.png"
    assert receipt_in((tmp_path / "saved.png").read_bytes())["seed"] == receipt["seed"] + 1


def test_several_fields_reach_the_model(page, server):
    filled = {"prompt": "(a red cube)1.3", "negative_prompt": "blue", "num_images": 2, "num_inference_steps": 3}
    for name, value in {**filled, "width": 72, "height": 40, "guidance_scale": 3}.items():
        fill(page, name, value)
    page.locator("#use_compel input").check()
    page.locator("#sampler input").click()
    page.get_by_role("option", name="euler", exact=True).click()
    page.locator("#spacing input").click()
    page.get_by_role("option", name="karras", exact=True).click()
    make(page)
    made(page, 2)
    receipt = json.loads(page.locator("#gallery pre").first.text_content())
    wanted = {"negative_prompt": "blue", "steps": 3, "width": 72, "height": 40, "guidance_scale": 3.0, "sampler": "euler"}
    assert wanted.items() <= receipt.items() and receipt["spacing"] == "karras" and receipt["prompt_syntax"] == "compel"


def test_progress_and_a_preview_while_it_is_made_and_cancel(page, server):
    before = server.jobs.totals["cancelled"]
    fill(page, "prompt", PROMPT)
    fill(page, "num_inference_steps", LONG)
    fill(page, "width", 128)
    fill(page, "height", 128)
    make(page)
    expect(told(page)).to_contain_text(re.compile(rf"step \d+ of {LONG}"), timeout=90_000)
    expect(page.locator("#preview img")).to_be_visible(timeout=90_000)
    assert 0 < float(page.locator("#told progress").get_attribute("value")) < 1
    page.locator("#stop").click()
    expect(told(page)).to_have_text("cancelled")
    assert server.jobs.totals["cancelled"] == before + 1
    fill(page, "num_inference_steps", 2)  # and the next is made as ever
    make(page)
    made(page, 1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 100, "width: '100'; input should be a multiple of 8"),
        ("seed", -1, "seed: '-1'; input should be greater than or equal to 0"),
        ("seed", 1.5, "seed: '1.5';"),
        ("height", 80000, "height: '80000'; input should be less than or equal to 8192"),
    ],
)
def test_a_bad_field_shows_what_is_wrong_with_it(page, field, value, message):
    fill(page, field, value)
    make(page)
    expect(told(page)).to_contain_text(message)
    fill(page, field, "")
    fill(page, "num_inference_steps", 1)
    make(page)
    made(page, 1)


def test_image_to_image_and_inpainting(page, server, tmp_path, monkeypatch):
    asked, submit = [], server.jobs.submit
    monkeypatch.setattr(server.jobs, "submit", lambda *a, **k: asked.append((a, k)) or submit(*a, **k))
    fill(page, "prompt", PROMPT)
    fill(page, "num_inference_steps", 4)
    make(page)
    made(page, 1)
    page.get_by_role("button", name="Start from it").click()
    expect(page.locator("#canvas canvas")).to_be_visible()
    make(page)
    made(page, 2)
    tasks = [job.task for job in server.jobs.known.values()]
    assert tasks[-1] == "img2img"
    place = page.locator("#canvas canvas").bounding_box()
    page.mouse.move(place["x"] + place["width"] / 4, place["y"] + place["height"] / 4)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2, steps=5)
    page.mouse.up()
    start = pixels(picture(page.locator("#gallery figure").last))
    asked.clear()
    make(page)
    kept = pixels(picture(made(page, 3).first))
    ((task, fields, *_), _), *others = asked
    assert task == "inpaint" and not others
    assert np.array_equal(fields["image"].convert("RGB"), start)
    mask = np.asarray(fields["mask"].convert("L"))
    assert mask.shape == (64, 64) and mask.diagonal()[18:30].min() > 250  # where it was drawn
    assert mask[40:, 40:].max() == mask[:, :8].max() == 0
    assert (kept != start).any()
    (tmp_path / "no.png").write_bytes(b"no picture")
    page.locator("#canvas input[type=file]").set_input_files(tmp_path / "no.png")
    expect(page.locator("#canvas")).to_contain_text("no picture that a browser can show")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    page.locator("#canvas input[type=file]").set_input_files(tmp_path / "red.png")
    expect(page.locator("#canvas img")).to_be_visible()
    page.wait_for_function("document.querySelector('#canvas canvas').height === 48")
    make(page)
    assert pixels(picture(made(page, 4).first)).shape[:2] == (48, 64)


def test_which_words_drew_which_pixels_and_the_estimate_at_each_step(page):
    fill(page, "prompt", "a red cube")
    fill(page, "num_inference_steps", 5)
    for box in page.locator("#views input").all():
        box.check()
    make(page)
    made(page, 1)
    page.get_by_role("tab", name="Attention").click()
    expect(page.locator("#attention figcaption")).to_have_text(["a", "red", "cube"])
    page.get_by_role("tab", name="Denoising").click()
    assert page.locator("#denoising figure").count() >= 5


def test_whoever_leaves_gives_up_the_place(page, server):
    before = server.jobs.totals["cancelled"]
    fill(page, "num_inference_steps", LONG)
    fill(page, "width", 128)
    fill(page, "height", 128)
    make(page)
    expect(told(page)).to_contain_text("step", timeout=90_000)
    page.goto("about:blank")
    deadline = time.monotonic() + 30
    while (server.jobs.totals["cancelled"] == before or server.jobs.running) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.jobs.totals["cancelled"] == before + 1 and not server.jobs.running


def test_whoever_leaves_while_waiting_gives_up_the_place(page, server, busy, monkeypatch):
    monkeypatch.setattr("ldm.web.page.UNHEARD", float("inf"))  # it is gradio that notices
    before = server.jobs.totals["cancelled"]
    make(page)
    expect(told(page)).to_have_text("waiting for 1 before it", timeout=90_000)
    page.close()
    deadline = time.monotonic() + 15
    while server.jobs.waiting and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not server.jobs.waiting and server.jobs.totals["cancelled"] == before + 1 and server.jobs.running == [busy]


def test_a_job_that_waits_is_cancelled_by_its_button(page, server, busy):
    make(page)
    expect(told(page)).to_have_text("waiting for 1 before it", timeout=90_000)
    time.sleep(1.5)  # it is told again and again how it stands, and stays what it is
    expect(told(page)).to_have_text("waiting for 1 before it")
    page.locator("#stop").click()
    expect(told(page)).to_have_text("cancelled")
    assert not server.jobs.waiting and server.jobs.running == [busy]


@pytest.mark.parametrize("seed", [2**53 + 1, 2**64 - 7])
def test_a_seed_beyond_what_javascript_counts_to_is_shown_as_it_is(page, seed):
    fill(page, "seed", seed)
    fill(page, "num_inference_steps", 1)
    make(page)
    first = picture(made(page, 1).first)
    assert receipt_in(first)["seed"] == seed
    fill(page, "seed", "")
    page.get_by_role("button", name=f"Seed {seed}", exact=True).click()
    expect(page.locator("#seed textarea, #seed input")).to_have_value(str(seed))
    assert page.get_by_role("link", name="Download").get_attribute("download") == f"{seed}.png"
    make(page)
    assert np.array_equal(pixels(first), pixels(picture(made(page, 2).first)))


def test_inpainting_has_the_strength_that_is_shown(page, tmp_path):
    fill(page, "num_inference_steps", 4)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    page.locator("#canvas input[type=file]").set_input_files(tmp_path / "red.png")
    page.wait_for_function("document.querySelector('#canvas canvas').height === 64")
    place = page.locator("#canvas canvas").bounding_box()
    page.mouse.move(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    for count, strength in ((1, 0.8), (2, 1), (3, 0.5)):
        fill(page, "strength", strength)
        make(page)
        made(page, count)
        receipt = json.loads(page.locator("#gallery pre").first.text_content())
        assert receipt["task"] == "inpaint" and receipt["strength"] == strength


def test_the_page_asks_nobody_but_its_own_server(page, server):
    make(page)
    made(page, 1)
    assert page.asked and all(url.startswith((server.url, "data:", "blob:")) for url in page.asked)


# -- What gradio offers to whoever talks to it directly -----------------------------------------------------------------------


@pytest.fixture
def stranger():
    """A server that counts who comes, and its address."""
    listener, visits = socket.create_server(("127.0.0.1", 0)), []

    def listen():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            visits.append(1)
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png", visits
    listener.close()


def test_no_address_of_a_client_is_visited(server, stranger):
    address, visits = stranger
    for path in (f"/gradio_api/proxy={address}", f"/gradio_api/file={address}", f"/gradio_api/file/{address}"):
        assert server.client.get(path, follow_redirects=False).status_code >= 400
    config = json.loads(re.search(r"window.gradio_config = (.*?);</script>", server.client.get("/").text)[1])
    for index, dependency in enumerate(config["dependencies"]):
        file = {"path": address, "url": address, "orig_name": "picture.png", "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file] * len(dependency["inputs"]), "fn_index": index, "session_hash": "abc"}
        server.client.post("/gradio_api/queue/join", json=body)
        server.client.post("/gradio_api/run/predict", json=body)
    time.sleep(1)
    assert not visits


PATHS = ["/etc/passwd", "../../../../etc/passwd", "README.md", "ldm/web/page/canvas.js", "%2e%2e/%2e%2e/etc/passwd"]


@pytest.mark.parametrize("name", PATHS)
def test_no_file_is_handed_out_or_taken(server, name):
    for path in (
        f"/gradio_api/file={name}",
        f"/gradio_api/file/{name}",
        *(f"/{at}/{name}" for at in ("static", "assets", "svelte")),
    ):
        assert server.client.get(path).status_code >= 400
    taken = server.client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 1000)})
    assert taken.status_code >= 400


def test_a_page_with_a_token(browser, bundled):
    with running(bundled, page=True, token="a-token-of-eight") as found:
        context = browser.new_context()
        opened = context.new_page()
        assert context.request.get(found.url).status == 401
        opened.goto(f"{found.url}/?token=a-token-of-eight")
        expect(opened.locator("#start")).to_be_visible()
        assert "token" not in opened.url
        fill(opened, "num_inference_steps", 1)
        make(opened)
        made(opened, 1)
        context.close()
