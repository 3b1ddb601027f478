"""Whole pipelines against diffusers': the same prompt, seed and pictures, from text to pixels, on a tiny model in float32.

Convention "diffusers" does all that diffusers does: its grids, its order of random draws, its blending. What is compared is the
picture before it is rounded to 8 bits, and the latents it was decoded from.
"""

import dataclasses

import pytest
import torch
from PIL import Image

import ldm
from ldm.images import difference
from ldm.pipelines.autoencoding import decode
from ldm.presets import preset
from tests import seeded
from tests.measure import relative_error
from tests.test_parity_samplers import V1_4

pytestmark = pytest.mark.reference

TOLERANCE = 2e-5  # both compute in float32; guidance and steps multiply what rounding leaves
PROMPT, NEGATIVE = "a red cube on top of a blue sphere", "blurry"
SEED = 1234
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "ddpm": "DDPMScheduler",
}


def use(pipeline, sampler, **options):
    """Give the pipeline a scheduler made from v1-4's own file."""
    import diffusers

    pipeline.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(
        {**V1_4, "beta_schedule": "scaled_linear", **options}
    )
    return pipeline


def load_pipeline(kind, folder):
    import diffusers

    pipeline = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator():
    return torch.Generator().manual_seed(SEED)


def assert_same(result, pipeline, components, expected):
    """The pipeline's latents, and the picture it makes of them."""
    assert relative_error(result.latents, expected) < TOLERANCE
    theirs = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    assert relative_error(decode(components.autoencoder, result.latents), theirs) < TOLERANCE


@pytest.fixture(scope="module")
def components(tiny_diffusers):
    return ldm.load(tiny_diffusers)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    values = (seeded.tensor("picture", 52, 70, 3).clamp(-2, 2) + 2) / 4 * 255
    return Image.fromarray(values.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def mask(picture) -> Image.Image:
    made = Image.new("L", picture.size, 0)
    made.paste(255, (20, 10, 50, 40))
    return made


# -- Text to image


@pytest.fixture(scope="module")
def text_pipeline(tiny_diffusers):
    return load_pipeline("StableDiffusionPipeline", tiny_diffusers)


@pytest.mark.parametrize("steps", [1, 3, 25])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image_is_diffusers(text_pipeline, components, sampler, steps):
    if steps == 1 and sampler in ("euler", "euler_ancestral", "heun", "lms"):
        pytest.skip("diffusers asks at t = 0 alone, and returns noise times 14")
    shared = {"guidance_scale": 7.5, "negative_prompt": NEGATIVE, "width": 72, "height": 56}
    expected = use(text_pipeline, sampler)(
        PROMPT, num_inference_steps=steps, num_images_per_prompt=2, generator=generator(), output_type="latent", **shared
    ).images
    result = ldm.txt2img(
        components, PROMPT, steps=steps, num_images=2, seed=SEED, sampler=sampler, convention="diffusers", **shared
    )
    assert_same(result, text_pipeline, components, expected)


@pytest.mark.parametrize("respacing", ["karras", "exponential"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc"])
def test_levels_laid_in_sigma_are_diffusers(text_pipeline, components, sampler, respacing):
    pipeline = use(text_pipeline, sampler, **{f"use_{respacing}_sigmas": True})
    expected = pipeline(PROMPT, num_inference_steps=30, width=64, height=64, generator=generator(), output_type="latent").images
    fields = {"steps": 30, "width": 64, "height": 64, "seed": SEED, "sampler": sampler, "spacing": respacing}
    assert_same(ldm.txt2img(components, PROMPT, convention="diffusers", **fields), text_pipeline, components, expected)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_guidance_at_one_and_below_is_off_as_in_diffusers(text_pipeline, components, scale):
    expected = use(text_pipeline, "ddim")(
        PROMPT, num_inference_steps=4, guidance_scale=scale, width=64, height=64, generator=generator(), output_type="latent"
    ).images
    fields = {"steps": 4, "guidance_scale": scale, "width": 64, "height": 64, "seed": SEED, "sampler": "ddim"}
    assert_same(ldm.txt2img(components, PROMPT, convention="diffusers", **fields), text_pipeline, components, expected)


def test_eight_bit_pictures_are_diffusers(text_pipeline, components):
    fields = {"width": 64, "height": 64, "guidance_scale": 7.5}
    theirs = use(text_pipeline, "pndm")(PROMPT, num_inference_steps=5, generator=generator(), **fields).images[0]
    ours = ldm.txt2img(components, PROMPT, steps=5, seed=SEED, convention="diffusers", safety="off", **fields).images[0]
    farthest, share = difference(ours, theirs)
    assert farthest <= 1 and share < 1e-3  # a value that lies on the edge of two 255ths


def test_a_generator_for_each_image_is_our_own_convention(text_pipeline, components):
    """diffusers given a list of generators draws as we always do; the grid is asked for by name."""
    seeds = [torch.Generator().manual_seed(SEED + i) for i in range(3)]
    expected = use(text_pipeline, "ddim", timestep_spacing="trailing", set_alpha_to_one=False)(
        PROMPT, num_inference_steps=1, num_images_per_prompt=3, width=64, height=64, generator=seeds, output_type="latent"
    ).images
    ours = ldm.txt2img(
        components, PROMPT, steps=1, num_images=3, width=64, height=64, seed=SEED, sampler="ddim", spacing="trailing"
    )
    assert_same(ours, text_pipeline, components, expected)


# -- Image to image


@pytest.fixture(scope="module")
def image_pipeline(tiny_diffusers):
    return load_pipeline("StableDiffusionImg2ImgPipeline", tiny_diffusers)


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler", "euler_ancestral", "heun", "lms", "dpmpp_2m", "unipc"])
def test_image_to_image_is_diffusers(image_pipeline, components, picture, sampler, strength):
    expected = use(image_pipeline, sampler)(
        PROMPT,
        image=picture,
        strength=strength,
        num_inference_steps=10,
        num_images_per_prompt=2,
        guidance_scale=7.5,
        negative_prompt=NEGATIVE,
        generator=generator(),
        output_type="latent",
    ).images
    fields = {"steps": 10, "num_images": 2, "negative_prompt": NEGATIVE, "seed": SEED, "sampler": sampler}
    result = ldm.img2img(components, PROMPT, picture, strength=strength, convention="diffusers", **fields)
    assert result.images[0].size == (64, 48)  # 70 x 52, rounded down
    assert_same(result, image_pipeline, components, expected)


@pytest.mark.parametrize(("steps", "strength"), [(2, 0.5), (2, 0.8), (3, 0.7), (3, 0.8), (5, 0.9), (7, 0.3)])
def test_image_to_image_of_few_steps_is_diffusers(image_pipeline, components, picture, steps, strength):
    """PNDM's list of timesteps is cut within its repetition where exactly one step is left out."""
    expected = use(image_pipeline, "pndm")(
        PROMPT, image=picture, strength=strength, num_inference_steps=steps, generator=generator(), output_type="latent"
    ).images
    result = ldm.img2img(components, PROMPT, picture, strength=strength, steps=steps, seed=SEED, convention="diffusers")
    assert_same(result, image_pipeline, components, expected)


# -- Inpainting


@pytest.fixture(scope="module")
def blending_pipeline(tiny_diffusers):
    return load_pipeline("StableDiffusionInpaintPipeline", tiny_diffusers)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m"])
def test_inpainting_by_blending_is_diffusers(blending_pipeline, components, picture, mask, sampler, strength):
    assert_inpainting_is_diffusers(use(blending_pipeline, sampler), components, picture, mask, sampler, strength)


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.9), (3, 0.7), (2, 0.5)])
def test_inpainting_of_few_steps_is_diffusers(blending_pipeline, components, picture, mask, steps, strength):
    assert_inpainting_is_diffusers(use(blending_pipeline, "pndm"), components, picture, mask, "pndm", strength, steps)


@pytest.fixture(scope="module")
def inpainting_model(tmp_path_factory, vocabulary_folder):
    """The tiny model whose UNet sees the mask: a folder written by diffusers."""
    from tests import peers

    config = preset("tiny")
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, in_channels=9))
    return peers.write_folder(tmp_path_factory.mktemp("inpainting") / "tiny", config, vocabulary_folder)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler_ancestral"])
def test_inpainting_with_a_model_that_sees_the_mask_is_diffusers(inpainting_model, picture, mask, sampler, strength):
    pipeline = use(load_pipeline("StableDiffusionInpaintPipeline", inpainting_model), sampler)
    assert_inpainting_is_diffusers(pipeline, ldm.load(inpainting_model), picture, mask, sampler, strength)


def assert_inpainting_is_diffusers(pipeline, components, picture, mask, sampler, strength, steps=8):
    expected = pipeline(
        PROMPT,
        image=picture,
        mask_image=mask,
        width=64,
        height=48,
        strength=strength,
        num_inference_steps=steps,
        num_images_per_prompt=2,
        guidance_scale=7.5,
        negative_prompt=NEGATIVE,
        generator=generator(),
        output_type="latent",
    ).images
    fields = {"steps": steps, "num_images": 2, "negative_prompt": NEGATIVE, "seed": SEED, "sampler": sampler}
    result = ldm.inpaint(components, PROMPT, picture, mask, strength=strength, convention="diffusers", **fields)
    assert_same(result, pipeline, components, expected)
