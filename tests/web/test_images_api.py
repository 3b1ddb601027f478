"""/v1: pictures by the form's fields, jobs that can be watched and cancelled, and refusals that name the field."""

import base64
import contextlib
import dataclasses
import io
import threading
import time

import httpx
import pytest
from PIL import Image

import ldm
from ldm.models.safety import SafetyChecker
from ldm.output import files
from ldm.web import form
from ldm.web.images_api import NAMES, refused
from ldm.web.jobs import DONE, RUNNING, Job
from tests import golden_inputs, seeded
from tests.web.conftest import PROMPT, running


def opened(png: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png)))


def uploaded(picture: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_is_the_pipeline_s_and_carries_its_receipt(server, bundled):
    asked = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 5, "num_images": 2, "guidance_scale": 3}
    made = server.client.post("/v1/images", json=asked)
    assert made.status_code == 200, made.text
    found = made.json()
    expected = ldm.txt2img(bundled, PROMPT, steps=3, seed=5, num_images=2, guidance_scale=3.0)
    assert (found["state"], found["progress"], [image["seed"] for image in found["images"]]) == ("done", 1.0, [5, 6])
    for image, picture, receipt in zip(found["images"], expected.images, expected.receipts, strict=True):
        assert opened(image["png"]).tobytes() == picture.tobytes()
        assert image["receipt"] == receipt and image["flagged"] is None
    data = server.client.get(f"/v1/jobs/{found['id']}/images/1").content
    assert files.read_receipt(io.BytesIO(data)) == expected.receipts[1]


def test_defaults_are_the_form_s_and_a_seed_is_drawn_and_told(server):
    first, second = (server.client.post("/v1/images", json={"prompt": "", "num_inference_steps": 1}).json() for _ in range(2))
    (one,), (other,) = first["images"], second["images"]
    assert one["seed"] != other["seed"] and one["png"] != other["png"]
    receipt = one["receipt"]
    assert (receipt["guidance_scale"], receipt["sampler"], receipt["task"]) == (7.5, "pndm", "txt2img")
    about = server.client.get("/v1/form").json()
    assert about["fields"]["num_inference_steps"]["default"] == 25 and "ddim" in about["samplers"]


def test_an_image_makes_it_image_to_image_and_a_mask_inpainting(server, bundled):
    picture, mask = Image.new("RGB", (64, 64), "orange"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    common = {"prompt": PROMPT, "num_inference_steps": 4, "seed": 2, "image": "data:image/png;base64," + uploaded(picture)}
    made = server.client.post("/v1/images", json=common | {"strength": 0.5}).json()
    expected = ldm.img2img(bundled, PROMPT, picture, steps=4, seed=2, strength=0.5, guidance_scale=7.5)
    assert opened(made["images"][0]["png"]).tobytes() == expected.images[0].tobytes()
    made = server.client.post("/v1/images", json=common | {"mask": uploaded(mask)}).json()
    expected = ldm.inpaint(bundled, PROMPT, picture, mask, steps=4, seed=2, guidance_scale=7.5)
    assert opened(made["images"][0]["png"]).tobytes() == expected.images[0].tobytes()


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 513}, "num_inference_steps", "less than or equal to 512"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"width": 500}, "width", "multiple of 8"),
        ({"width": 4096, "height": 4096}, "width", "4096 x 4096 pixels; expected at most 1048576"),
        ({"strength": 1.5}, "strength", "less than or equal to 1"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed", "expected at most"),
        ({"num_images": 17}, "num_images", "less than or equal to 16"),
        ({"sampler": "nonsense"}, "sampler", "expected one of"),
        ({"spacing": "nonsense"}, "spacing", "expected one of"),
        ({"loras": [{"name": "../../etc/passwd"}]}, "loras", "this server has none"),
        ({"prompt": "<lora:/etc/passwd:1>"}, "prompt", "this server has none"),
        ({"negative_prompt": "<lora:/etc/passwd:1>"}, "negative_prompt", "this server has none"),
        ({"prompt": "(a", "use_compel": True}, "prompt", "position"),
        ({"negative_prompt": "(", "use_compel": True}, "negative_prompt", "position"),
        ({"prompt": "a withLora(style, 1)", "use_compel": True}, "prompt", "this server has none"),
        ({"prompt": '("cat").swap("dog")', "use_compel": True}, "prompt", "a .swap, which cannot be made here"),
        ({"prompt": "(" * 20_000, "use_compel": True}, "prompt", "position"),
        ({"mask": "AAAA"}, "mask", "mask without image"),
        ({"image": "not base64!"}, "image", "no base64 of a picture"),
        ({"image": base64.b64encode(b"GIF89a").decode()}, "image", "cannot be read as PNG, JPEG or WebP"),
        ({"unknown": 1}, "unknown", "not permitted"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_is_422_and_names_the_field_and_its_range(server, fields, field, words):
    refused = server.client.post("/v1/images", json={"prompt": PROMPT, "num_inference_steps": 1, **fields})
    assert refused.status_code == 422, refused.text
    (detail,) = refused.json()["detail"]
    assert detail["loc"][:2] == ["body", field] and words in detail["msg"], detail


def test_what_depends_on_several_fields_is_refused_before_it_waits(server, bundled, tmp_path):
    picture = uploaded(Image.new("RGB", (64, 64)))
    asked = {"prompt": PROMPT, "image": picture, "mask": picture, "num_inference_steps": 4, "strength": 0.2}
    refused = server.client.post("/v1/images?wait=false", json=asked)
    (detail,) = refused.json()["detail"]
    assert refused.status_code == 422 and detail["loc"] == ["body", "strength"]
    assert detail["msg"] == "strength 0.2 of 4 steps leaves none to run; raise strength or steps"
    (tmp_path / "style.safetensors").touch()
    limits = form.Limits(adapter_folder=tmp_path)
    request = form.ImagesRequest(prompt=PROMPT, negative_prompt="<lora:style:1>")
    with pytest.raises(form.FieldError, match="name it in the prompt") as error:
        form.fields_of(request, bundled, limits)
    assert error.value.field == "negative_prompt"
    fast = dataclasses.replace(bundled, acceleration={"kind": "any"})
    with pytest.raises(form.FieldError, match="model is accelerated") as error:
        form.fields_of(form.ImagesRequest(prompt=PROMPT, loras=[{"name": "style"}]), fast, limits)
    assert error.value.field == "loras"
    painter = ldm.build("tiny", seed=0)
    painter.unet.config = dataclasses.replace(painter.unet.config, in_channels=9)
    with pytest.raises(form.FieldError, match="the model is for inpainting") as error:
        form.fields_of(form.ImagesRequest(prompt=PROMPT), painter, limits)
    assert error.value.field == "mask"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("steps 2000; expected 1 to 1000", "num_inference_steps"),
        ("strength 0.1 of 4 steps leaves none", "strength"),
        ("negative prompt '(', position 1", "negative_prompt"),
        ("the negative prompt names LoRA 'a'", "negative_prompt"),
        ("LoRA 'a': there is no such file", "loras"),
        ("mask: has floating-point values", "mask"),
        ("the latents hold NaN", "prompt"),
    ],
)
def test_what_a_run_refuses_is_told_of_the_field_that_it_begins_with(message, field):
    job = Job("txt2img", {}, error=message)
    assert refused(job, NAMES).errors()[0]["loc"] == ("body", field)
    job.fault = True
    assert refused(job, NAMES).status_code == 500


class Ending(Job):
    """A job that ends as soon as its state has been looked at, and has no preview when that has been."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name in ("state", "preview"):
            self.__dict__[name] = {"state": DONE, "preview": None}[name]
        return value


def test_what_is_told_of_a_job_is_of_one_moment(server, bundled):
    result = ldm.txt2img(bundled, PROMPT, steps=1)
    job = Ending("txt2img", {}, state=RUNNING, preview=b"some PNG", result=result)
    server.jobs.known[job.id] = job
    answer = server.client.get(f"/v1/jobs/{job.id}/preview")
    assert (answer.status_code, answer.content) == (200, b"some PNG")
    assert server.client.get(f"/v1/jobs/{job.id}/preview").status_code == 204
    told = server.client.get(f"/v1/jobs/{job.id}").json()
    assert (told["state"], told["images"]) == ("running", [])
    del server.jobs.known[job.id]


def test_where_a_safety_checker_withholds_pictures_there_is_no_preview(bundled):
    checker = seeded.fill(SafetyChecker(golden_inputs.SAFETY))
    with running(dataclasses.replace(bundled, safety=checker)) as server:
        asked = {"prompt": PROMPT, "num_inference_steps": 512}
        path = f"/v1/jobs/{server.client.post('/v1/images?wait=false', json=asked).json()['id']}"
        answer = server.client.get(f"{path}/preview")
        assert answer.status_code == 403 and "safety checker sees finished pictures alone" in answer.json()["detail"]
        server.client.delete(path)


def test_a_job_is_watched_previewed_and_cancelled(server):
    asked = {"prompt": PROMPT, "num_inference_steps": 512, "num_images": 4}
    begun = server.client.post("/v1/images", params={"wait": False}, json=asked)
    assert begun.status_code == 202
    path = f"/v1/jobs/{begun.json()['id']}"
    seen, preview, deadline = set(), None, time.monotonic() + 90
    while (len(seen) < 4 or preview is None) and time.monotonic() < deadline:
        state = server.client.get(path).json()
        assert state["state"] in ("waiting", "running") and 0 <= state["progress"] < 1
        seen.add(state["step"])
        answer = server.client.get(f"{path}/preview")
        preview = answer.content if answer.status_code == 200 else preview
        time.sleep(0.05)
    assert len(seen) >= 4 and Image.open(io.BytesIO(preview)).size == (64, 64)
    assert server.client.delete(path).json()["state"] == "cancelled"
    assert server.client.get(f"{path}/images/0").status_code == 404
    assert server.client.get("/v1/jobs/nonsense").status_code == 404
    quick = server.client.post("/v1/images", json={"prompt": PROMPT, "num_inference_steps": 1})
    assert quick.status_code == 200  # the place is free again


def test_past_the_bound_it_is_429_and_who_leaves_frees_the_place(bundled):
    with running(bundled, bound=2) as server:
        long = {"prompt": PROMPT, "num_inference_steps": 512, "num_images": 4}
        ids = [server.client.post("/v1/images?wait=false", json=long).json()["id"]]
        while not server.jobs.running:
            time.sleep(0.01)
        ids.append(server.client.post("/v1/images?wait=false", json=long).json()["id"])
        leaving = threading.Thread(target=left, args=(server, long))
        leaving.start()
        while len(server.jobs.waiting) < 2:
            time.sleep(0.01)
        refused = server.client.post("/v1/images?wait=false", json=long)
        assert refused.status_code == 429 and "as many as may" in refused.json()["detail"]
        assert int(refused.headers["retry-after"]) > 0
        leaving.join()
        deadline = time.monotonic() + 10
        while len(server.jobs.waiting) == 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(server.jobs.waiting) == 1
        for job_id in ids:
            server.client.delete(f"/v1/jobs/{job_id}")


def left(server, asked) -> None:
    """A client that does not wait for its answer."""
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/images", json=asked, timeout=httpx.Timeout(5, read=1.0))


def test_health_and_metrics(server):
    assert server.client.get("/health").json()["status"] == "ok"
    assert server.client.post("/v1/images", json={"prompt": PROMPT, "num_inference_steps": 1}).status_code == 200
    told = dict(line.rsplit(" ", 1) for line in server.client.get("/metrics").text.splitlines())
    assert int(told['ldm_jobs_total{state="done"}']) >= 1 and int(told["ldm_jobs_waiting"]) == 0
