"""/sdapi/v1 as AUTOMATIC1111's clients call it: the PyPI package `webuiapi`, unchanged."""

import base64
import threading
import time

import pytest
from PIL import Image

import ldm

webuiapi = pytest.importorskip("webuiapi", reason="webuiapi is not installed")

from ldm.web.a1111 import Txt2Img  # noqa: E402
from ldm.web.jobs import RUNNING, WITHHELD, Job  # noqa: E402
from tests.web.conftest import PROMPT, running  # noqa: E402
from tests.web.test_a1111_pictures import encoded  # noqa: E402

SIZE = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def api(server):
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="DDIM", steps=3)


def test_text_to_image(api, bundled):
    made = api.txt2img(prompt=PROMPT, negative_prompt="blurry", seed=5, n_iter=2, cfg_scale=3, eta=0, **SIZE)
    fields = {"negative_prompt": "blurry", "steps": 3, "seed": 5, "num_images": 2, "guidance_scale": 3.0, "sampler": "ddim"}
    fields |= {"prompt_syntax": "a1111", "long_prompt": "windows", "batch_size": 1}
    expected = ldm.txt2img(bundled, PROMPT, **fields)
    assert [one.tobytes() for one in made.images] == [one.tobytes() for one in expected.images]
    assert made.info["all_seeds"] == [5, 6] and made.info["seed"] == 5
    assert made.info["infotexts"][0].startswith(f"{PROMPT}\nNegative prompt: blurry\nSteps: 3, Sampler: DDIM")
    assert made.image.info["parameters"] == made.info["infotexts"][0]
    drawn = [api.txt2img(prompt=PROMPT, seed=-1, **SIZE).info["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1] and min(drawn) >= 0


def test_image_to_image_and_inpainting(api, bundled):
    picture, mask = Image.new("RGB", (64, 64), "orange"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    common = {"prompt": PROMPT, "seed": 2, "cfg_scale": 3, "eta": 0, **SIZE}
    fields = {"steps": 3, "seed": 2, "guidance_scale": 3.0, "sampler": "ddim", "prompt_syntax": "a1111"}
    made = api.img2img(images=[picture], denoising_strength=0.7, **common)
    expected = ldm.img2img(bundled, PROMPT, picture, strength=0.7, **fields)
    assert made.image.tobytes() == expected.images[0].tobytes()
    for invert, white in ((0, mask), (1, Image.eval(mask, lambda value: 255 - value))):
        made = api.img2img(images=[picture], mask_image=mask, inpainting_mask_invert=invert, denoising_strength=1.0, **common)
        expected = ldm.inpaint(bundled, PROMPT, picture, white, **fields)
        assert made.image.tobytes() == expected.images[0].tobytes()


def test_what_a_picture_says_of_itself(api):
    made = api.txt2img(prompt=PROMPT, seed=5, **SIZE)
    assert api.png_info(made.image).info.startswith(PROMPT)
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def test_progress_with_a_preview_and_interrupting(bundled):
    with running(bundled) as server:
        api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port, steps=512)
        assert api.get_progress()["progress"] == 0 and api.get_progress()["state"]["job_count"] == 0
        api.util_wait_for_ready()
        made = []
        thread = threading.Thread(target=lambda: made.append(api.txt2img(prompt=PROMPT, batch_size=4, **SIZE)))
        thread.start()
        other = webuiapi.WebUIApi(host="127.0.0.1", port=server.port)
        seen, picture, deadline = [], None, time.monotonic() + 90
        while (len(set(seen)) < 4 or picture is None) and time.monotonic() < deadline:
            told = other.get_progress()
            seen.append(told["progress"])
            picture = told["current_image"] or picture
            time.sleep(0.05)
        assert seen == sorted(seen) and 0 < seen[-1] < 1 and told["state"]["sampling_steps"] == 512
        assert told["eta_relative"] > 0 and picture is not None
        other.interrupt()
        thread.join(20)
        assert made and made[0].images == [] and made[0].info["interrupted"]
        assert other.get_progress()["state"]["job_count"] == 0


def test_interrupting_ends_what_is_being_made_and_what_is_finished_of_it_comes(bundled):
    with running(bundled) as server:
        api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="DDIM", steps=30)
        asked = {"prompt": PROMPT, "seed": 5, "cfg_scale": 3, "eta": 0, **SIZE}
        made = {}

        def ask(name, **fields):
            made[name] = api.txt2img(**asked | fields)

        threads = [threading.Thread(target=ask, args=("long",), kwargs={"n_iter": 4})]
        threads.append(threading.Thread(target=ask, args=("waiting",), kwargs={"steps": 2}))
        threads[0].start()
        while not server.jobs.running:
            time.sleep(0.005)
        threads[1].start()
        other = webuiapi.WebUIApi(host="127.0.0.1", port=server.port)
        seen, deadline = [other.get_progress()], time.monotonic() + 90
        while (seen[-1]["state"]["job_no"] < 2 or not server.jobs.waiting) and time.monotonic() < deadline:
            seen.append(other.get_progress())
            time.sleep(0.01)
        other.interrupt()
        for thread in threads:
            thread.join(30)
        assert [told["progress"] for told in seen] == sorted(told["progress"] for told in seen)
        assert seen[-1]["progress"] >= 0.5
        for told in seen[1:]:
            state = told["state"]
            assert 0 <= state["sampling_step"] <= state["sampling_steps"] in (0, 30), state
        fields = {"steps": 30, "seed": 5, "num_images": 2, "batch_size": 1, "guidance_scale": 3.0, "sampler": "ddim"}
        expected = ldm.txt2img(bundled, PROMPT, **fields, prompt_syntax="a1111", long_prompt="windows")
        assert [one.tobytes() for one in made["long"].images] == [one.tobytes() for one in expected.images]
        assert made["long"].info["interrupted"] and made["long"].info["all_seeds"] == [5, 6]
        assert made["long"].image.info["parameters"] == made["long"].info["infotexts"][0]
        assert len(made["waiting"].images) == 1 and not made["waiting"].info["interrupted"]


class Ending(Job):
    """A job that has no preview any more when that has been looked at."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name == "preview":
            self.__dict__["preview"] = None
        return value


def test_a_preview_that_goes_while_it_is_looked_at_does_no_harm(server, monkeypatch):
    job = Ending("txt2img", {}, state=RUNNING, preview=b"some PNG")
    monkeypatch.setattr(server.jobs, "running", [job])
    answers = [server.client.get("/sdapi/v1/progress") for _ in range(2)]
    assert [answer.json()["current_image"] for answer in answers] == [base64.b64encode(b"some PNG").decode(), None]


def test_where_a_safety_checker_withholds_pictures_progress_says_so_in_the_place_of_a_preview(server, monkeypatch):
    job = Job("txt2img", {}, state=RUNNING, withheld=WITHHELD)
    monkeypatch.setattr(server.jobs, "running", [job])
    told = server.client.get("/sdapi/v1/progress").json()
    assert told["current_image"] is None and told["textinfo"] == WITHHELD


def test_whatever_else_a_request_holds_its_picture_comes(server):
    deep = "[" * 300 + "]" * 300
    strange = rf'"foo": "\ud800", "bar": {deep}, "alwayson_scripts": {{"x": {{"args": [], "more": "\ud800"}}}}'
    body = f'{{"prompt": "a", "steps": 1, "width": 64, "height": 64, "seed": 7, {strange}}}'
    answer = server.client.post("/sdapi/v1/txt2img", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert len(told["images"]) == 1 and told["parameters"]["seed"] == 7
    assert set(told["parameters"]) == set(Txt2Img.model_fields) and told["parameters"]["alwayson_scripts"] == {}


def test_settings_may_be_named_with_the_value_that_they_have_and_are_refused_otherwise(api, server, bundled):
    same = {"sd_model_checkpoint": bundled.name, "CLIP_stop_at_last_layers": 1}
    assert api.txt2img(prompt=PROMPT, override_settings=same, **SIZE).parameters["override_settings"] == same
    for other in ({"sd_model_checkpoint": "other"}, {"CLIP_stop_at_last_layers": 2}, {"sd_vae": None}):
        answer = server.client.post("/sdapi/v1/txt2img", json={"prompt": PROMPT, **SIZE, "override_settings": other})
        (detail,) = answer.json()["detail"]
        assert answer.status_code == 422 and detail["loc"] == ["body", "override_settings"]
        assert f"{next(iter(other))} cannot be set here" in detail["msg"]
        assert server.client.post("/sdapi/v1/options", json=other).status_code == 422


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"negative_prompt": "a <lora:x:y>"}, "negative_prompt"),
        ({"mask": encoded(Image.new("L", (64, 64))), "denoising_strength": 0.01}, "denoising_strength"),
        ({"mask": "AAAA"}, "mask"),
        ({"sampler_name": "nonsense"}, "sampler_name"),
        ({"sampler_name": "Euler Karras", "scheduler": "exponential"}, "sampler_name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_names_their_field(server, fields, field):
    asked = {"prompt": PROMPT, "init_images": [encoded(Image.new("RGB", (64, 64)))], **SIZE, **fields}
    refused = server.client.post("/sdapi/v1/img2img", json=asked)
    assert refused.status_code == 422 and refused.json()["detail"][0]["loc"] == ["body", field], refused.text


def test_what_there_is(api, bundled):
    assert "Euler a" in api.util_get_sampler_names() and "karras" in api.util_get_scheduler_names()
    assert api.util_get_model_names() == [bundled.name] and api.util_get_current_model() == bundled.name
    api.util_set_model(bundled.name)
    nothing = (api.get_upscalers, api.get_sd_vae, api.get_loras, api.get_hypernetworks, api.get_face_restorers)
    assert [ask() for ask in nothing] == [[]] * 5
    assert api.get_scripts() == {"txt2img": [], "img2img": []} and api.refresh_checkpoints() is None


def test_a_schedule_of_its_own(api, bundled):
    made = api.txt2img(prompt=PROMPT, seed=5, sampler_name="Euler", scheduler="Karras", cfg_scale=3, **SIZE)
    fields = {"steps": 3, "seed": 5, "guidance_scale": 3.0, "sampler": "euler", "spacing": "karras", "prompt_syntax": "a1111"}
    assert made.image.tobytes() == ldm.txt2img(bundled, PROMPT, **fields).images[0].tobytes()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler_name": "nonsense"}, "sampler 'nonsense'; expected one of"),
        ({"scheduler": "nonsense"}, "scheduler 'nonsense'; expected one of automatic"),
        ({"enable_hr": True}, "enable_hr is not offered here"),
        ({"restore_faces": True}, "restore_faces is not offered here"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}}, "script 'ControlNet' is not offered here"),
        ({"prompt": "<lora:/etc/passwd:1>"}, "this server has none"),
        ({"n_iter": 9, "batch_size": 2}, "batch_size x n_iter is 18; expected at most 16"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_offered_is_refused_by_name(api, fields, words):
    with pytest.raises(RuntimeError) as refused:
        api.txt2img(**{"prompt": PROMPT, **SIZE, **fields})
    assert refused.value.args[0] == 422 and words in refused.value.args[1]


def test_a_model_that_is_not_there_cannot_be_chosen(server):
    refused = server.client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "../../other.ckpt"})
    assert refused.status_code == 422 and "cannot be set here" in refused.json()["detail"][0]["msg"]


def test_with_a_token_it_is_the_password(bundled):
    with running(bundled, token="a-secret-token") as server:
        api = webuiapi.WebUIApi(host="127.0.0.1", port=server.port, steps=1, username="any", password="a-secret-token")
        assert api.txt2img(prompt=PROMPT, **SIZE).image.size == (64, 64)
