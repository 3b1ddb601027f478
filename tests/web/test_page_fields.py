"""What the page makes of its fields, without a browser."""

import json

import pytest

pytest.importorskip("gradio")

from ldm.web import page
from ldm.web.form import FieldError
from ldm.web.job import Job

FIELDS = {
    "prompt": "a red cube",
    "negative_prompt": "",
    "num_images": 1,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "width": "",
    "height": " ",
    "seed": "",
    "sampler": "pndm",
    "spacing": page.OWN,
    "use_compel": False,
    "loras": [],
    "coefficients": "",
    "canvas": "",
    "strength": 0.8,
    "views": [],
}


def asked(**changed):
    return page.asked({**FIELDS, **changed})


def test_what_is_left_alone_asks_for_nothing():
    request = asked()
    assert request.width is request.height is request.seed is request.image is request.mask is request.spacing is None
    assert request.loras == [] and request.num_inference_steps == 25


def test_what_is_filled_in_is_asked_for():
    request = asked(width="72", seed=" 18446744073709551 ", spacing="karras", loras=["one", "two"], coefficients="0.5, -1")
    assert (request.width, request.seed, request.spacing) == (72, 18446744073709551, "karras")
    assert [(lora.name, lora.coefficient) for lora in request.loras] == [("one", 0.5), ("two", -1.0)]
    assert [lora.coefficient for lora in asked(loras=["one", "two"]).loras] == [1.0, 1.0]
    drawn = asked(canvas=json.dumps({"image": "data:image/png;base64,AAAA", "mask": "data:image/png;base64,BBBB"}))
    assert drawn.mask.endswith("BBBB")
    assert asked(canvas=json.dumps({"image": "data:image/png;base64,AAAA"}), strength=0.3).strength == 0.3


@pytest.mark.parametrize("strength", [0.3, 0.8, 1])
def test_the_strength_that_is_shown_is_the_one_that_inpainting_gets(strength):
    drawn = json.dumps({"image": "data:image/png;base64,AAAA", "mask": "data:image/png;base64,BBBB"})
    request = asked(canvas=drawn, strength=strength)
    assert request.strength == strength and "strength" in request.model_fields_set  # else inpainting has a default of its own


def test_empty_boxes_can_be_null():
    assert asked(width=None, height=None, seed=None, coefficients=None, canvas=None, negative_prompt=None) == asked()


@pytest.mark.parametrize(
    ("changed", "field", "message"),
    [
        ({"coefficients": "much", "loras": ["one"]}, "coefficients", "expected numbers"),
        ({"coefficients": "1, 2", "loras": ["one"]}, "coefficients", "2 of them for 1 LoRAs"),
        ({"guidance_scale": 0.5}, "guidance_scale", "expected 1 to 20"),
        ({"num_images": 5}, "num_images", "at most 4"),
        ({"num_inference_steps": 513}, "num_inference_steps", "less than or equal to 512"),
        ({"seed": "-1"}, "seed", "greater than or equal to 0"),
        ({"width": "wide"}, "width", "valid integer"),
        ({"canvas": "[1]"}, "image", "load it again"),
        ({"canvas": "{"}, "image", "load it again"),
        ({"canvas": "[" * 100_000}, "image", "load it again"),
        ({"canvas": '{"image": 3}'}, "image", "valid string"),
    ],
)
def test_what_is_wrong_is_told_with_its_field(changed, field, message):
    with pytest.raises(FieldError, match=message) as raised:
        asked(**changed)
    assert raised.value.field == field


def test_a_view_without_pictures_says_why():
    withheld = Job("txt2img", {}, views=("denoising",), withheld="nothing is shown, since <it> is checked")
    assert page._view(withheld, "denoising") == '<p class="ldm-hint">nothing is shown, since &lt;it&gt; is checked</p>'
    for job in (withheld, Job("txt2img", {})):
        assert page._view(job, "attention") == f'<p class="ldm-hint">{page.ATTENTION}. Tick it under Views.</p>'
    assert page._view(Job("txt2img", {}, withheld="no"), "denoising").endswith("Tick it under Views.</p>")
