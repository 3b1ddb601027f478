"""/sdapi/v1 as AUTOMATIC1111's clients call it: the PyPI package `webuiapi`, unchanged."""

import threading
import time

import pytest
from PIL import Image

import ldm

webuiapi = pytest.importorskip("webuiapi", reason="webuiapi is not installed")

from tests.web.conftest import PROMPT, running  # noqa: E402

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
        seen, picture, deadline = [], None, time.monotonic() + 30
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
