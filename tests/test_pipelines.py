"""Pipelines: what a run promises, on the tiny model and on stand-ins for its network. No peer is needed."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ldm
from ldm.diffusion.conventions import CONVENTIONS
from ldm.diffusion.grid import noise_std, signal
from ldm.diffusion.guidance import guided
from ldm.images import difference, to_images, to_tensor
from ldm.pipelines import autoencoding
from ldm.pipelines import inpaint as inpainting
from ldm.pipelines.draws import Draws
from ldm.pipelines.habits import HABITS
from ldm.pipelines.run import Run
from ldm.pipelines.settings import Settings, checked
from ldm.samplers import all_samplers
from tests import seeded
from tests.measure import relative_error
from tests.references.make_samplers import network

PROMPT = "a red cube"
SMALL = {"width": 32, "height": 24, "steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def model():
    """The tiny preset with seeded weights, float32."""
    components = ldm.build("tiny", seed=0)
    for module in (components.text_encoder, components.unet, components.autoencoder):
        seeded.fill(module)
    return components


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    values = (seeded.tensor("picture", 26, 35, 3).clamp(-2, 2) + 2) / 4 * 255
    return Image.fromarray(values.to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def mask(picture) -> Image.Image:
    made = Image.new("L", picture.size, 0)
    made.paste(255, (8, 0, 24, 16))
    return made


def test_a_model_is_guided_as_it_asks_unless_told_otherwise(model):
    own = dataclasses.replace(model, guidance_scale=2.0)
    by_default, told = ldm.txt2img(own, PROMPT, **SMALL), ldm.txt2img(own, PROMPT, **SMALL, guidance_scale=7.5)
    assert torch.equal(by_default.latents, ldm.txt2img(model, PROMPT, **SMALL, guidance_scale=2.0).latents)
    assert torch.equal(told.latents, ldm.txt2img(model, PROMPT, **SMALL).latents)
    assert [result.receipts[0]["guidance_scale"] for result in (by_default, told)] == [2.0, 7.5]


class StandIn:
    """In the place of a UNet: a function (x, t, context) -> eps, that notes how it was asked."""

    def __init__(self, function, dtype=torch.float32):
        self.function, self.asked = function, []
        self.config = ldm.PRESETS["tiny"].unet
        self.conv_in = SimpleNamespace(weight=torch.zeros(1, dtype=dtype))

    def embed_time(self, t):
        return t

    def project_context(self, context):
        return context

    def denoise(self, x, t, context):
        x = x.repeat(len(context) // len(x), 1, 1, 1)
        self.asked.append((len(x), t))
        return self.function(x, t, context)

    def state_dict(self):
        return {"weight": self.conv_in.weight}


def by_context(x, t, context):
    """Smooth in x, sensitive to t and to the context of each row."""
    return torch.tanh(x + t / 700 + context.mean(dim=(1, 2))[:, None, None, None])


# -- Seeds and batches


@pytest.mark.parametrize("sampler", all_samplers())
def test_image_i_of_a_batch_is_the_image_that_its_own_seed_makes_alone(model, sampler):
    together = ldm.txt2img(model, PROMPT, num_images=4, sampler=sampler, **SMALL)
    for i in range(4):
        alone = ldm.txt2img(model, PROMPT, sampler=sampler, **{**SMALL, "seed": 7 + i})
        assert relative_error(together.latents[i], alone.latents[0]) < 1e-5
        assert together.receipts[i]["seed"] == alone.receipts[0]["seed"] == 7 + i


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_size_of_batches_changes_nothing(model, picture, batch_size):
    at_once = ldm.img2img(model, PROMPT, picture, num_images=4, sampler="Euler a", seed=3, steps=4, batch_size=4)
    in_parts = ldm.img2img(model, PROMPT, picture, num_images=4, sampler="Euler a", seed=3, steps=4, batch_size=batch_size)
    assert relative_error(in_parts.latents, at_once.latents) < 1e-5


def test_each_of_several_prompts_has_its_images_in_order(model):
    both = ldm.txt2img(model, ["a red cube", "a blue sphere"], num_images=2, **SMALL)
    assert [receipt["prompt"] for receipt in both.receipts] == ["a red cube"] * 2 + ["a blue sphere"] * 2
    assert [receipt["seed"] for receipt in both.receipts] == [7, 8, 9, 10]
    alone = ldm.txt2img(model, "a blue sphere", **{**SMALL, "seed": 9})
    assert relative_error(both.latents[2], alone.latents[0]) < 1e-5


def test_a_drawn_seed_is_told_and_makes_the_same_image(model):
    drawn, other = (ldm.txt2img(model, PROMPT, **{**SMALL, "seed": None}) for _ in range(2))
    assert drawn.receipts[0]["seed"] != other.receipts[0]["seed"]
    again = ldm.txt2img(model, PROMPT, **{**SMALL, "seed": drawn.receipts[0]["seed"]})
    assert torch.equal(again.latents, drawn.latents)


def test_seed_0_is_a_seed(model):
    first, second = (ldm.txt2img(model, PROMPT, **{**SMALL, "seed": 0}) for _ in range(2))
    assert torch.equal(first.latents, second.latents) and first.receipts[0]["seed"] == 0


def test_a_run_leaves_torchs_own_generator_and_the_weights_alone(model):
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    state = torch.get_rng_state()
    ldm.txt2img(model, PROMPT, sampler="Euler a", **SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())


def test_every_convention_of_grids_has_habits():
    assert set(HABITS) == set(CONVENTIONS)


def test_conventions_say_who_draws():
    shape = (4, 2, 3)
    own, one = Draws([5, 6]), Draws([5, 6], one_generator=True, one_posterior=True)
    first, second = (torch.Generator().manual_seed(seed) for seed in (5, 6))
    expected = torch.cat([torch.randn(1, *shape, generator=first), torch.randn(1, *shape, generator=second)])
    assert torch.equal(own.noise(shape), expected)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(one.posterior(shape), torch.randn(1, *shape, generator=generator).expand(2, *shape))
    assert torch.equal(one.noise(shape), torch.randn(2, *shape, generator=generator))


# -- Guidance


def test_guidance_1_is_the_prompt_alone_and_0_the_negative_prompt_alone():
    unet = StandIn(by_context)
    x, uncond, cond = seeded.tensor("x", 2, 4, 3, 4), torch.full((2, 1, 1), -0.5), torch.full((2, 1, 1), 0.5)
    assert torch.equal(guided(unet, uncond, cond, 1.0)(x, 500.0), by_context(x, 500.0, cond))
    assert torch.equal(guided(unet, uncond, cond, 0.0)(x, 500.0), by_context(x, 500.0, uncond))
    assert unet.asked == [(2, 500.0), (2, 500.0)]  # half of what guidance costs


def test_guidance_asks_for_both_halves_in_one_batch_the_unconditional_first():
    unet, seen = StandIn(by_context), []
    unet.project_context = lambda context: seen.append(context) or context
    x, uncond, cond = seeded.tensor("x", 2, 4, 3, 4), torch.full((2, 1, 1), -0.5), torch.full((2, 1, 1), 0.5)
    model = guided(unet, uncond, cond, 7.5)
    low, high = by_context(x, 500.0, uncond), by_context(x, 500.0, cond)
    assert relative_error(model(x, 500.0), low + 7.5 * (high - low)) < 1e-6
    model(x, 400.0)
    assert unet.asked == [(4, 500.0), (4, 400.0)]
    assert len(seen) == 1 and torch.equal(seen[0], torch.cat([uncond, cond]))  # keys and values once a run


def test_outside_the_guidance_interval_the_prompt_stands_alone():
    unet = StandIn(by_context)
    x, uncond, cond = seeded.tensor("x", 1, 4, 3, 4), torch.full((1, 1, 1), -0.5), torch.full((1, 1, 1), 0.5)
    model = guided(unet, uncond, cond, 7.5, interval=(200, 800))
    for t, rows in ((801.0, 1), (800.0, 2), (200.0, 2), (199.0, 1)):
        eps = model(x, t)
        assert unet.asked[-1] == (rows, t)
        assert torch.equal(eps, by_context(x, t, cond)) == (rows == 1)


def test_a_negative_prompt_is_the_unconditional_input(model):
    plain = ldm.txt2img(model, PROMPT, **SMALL)
    empty = ldm.txt2img(model, PROMPT, negative_prompt="", **SMALL)
    other = ldm.txt2img(model, PROMPT, negative_prompt="blurry", **SMALL)
    assert torch.equal(plain.latents, empty.latents) and not torch.equal(plain.latents, other.latents)
    contrasted = ldm.txt2img(model, PROMPT, negative_prompt=PROMPT, **SMALL)  # a prompt contrasted with itself
    alone = ldm.txt2img(model, PROMPT, guidance_scale=1, **SMALL)
    assert relative_error(contrasted.latents, alone.latents) < 1e-4


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "heun", "dpmpp_2m", "unipc"])
def test_a_network_of_v_predictions_makes_what_its_eps_would(model, sampler):
    """v = signal eps - noise_std x0 of the very eps that the other network returns."""
    sigmas = ldm_sigmas(model)

    def v(x, t, context):
        sigma, eps = sigmas(t), by_context(x, t, context)
        return signal(sigma) * eps - noise_std(sigma) * (x - noise_std(sigma) * eps) / signal(sigma)

    options = {**SMALL, "sampler": sampler, "decode": False, "guidance_scale": 2.0}
    of_eps = ldm.txt2img(dataclasses.replace(model, unet=StandIn(by_context, torch.float64)), PROMPT, **options)
    schedule = dataclasses.replace(model.schedule, prediction="v_prediction")
    of_v = ldm.txt2img(dataclasses.replace(model, unet=StandIn(v, torch.float64), schedule=schedule), PROMPT, **options)
    assert relative_error(of_v.latents, of_eps.latents) < 1e-9


def ldm_sigmas(model):
    from ldm.diffusion.schedule import sigmas
    from ldm.diffusion.spacing import sigma_at

    table = sigmas(model.schedule)
    return lambda t: sigma_at(t, table, logarithmic=True)


# -- Text to image


@pytest.mark.parametrize("sampler", all_samplers())
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_network_is_asked_as_often_as_the_receipt_says(model, sampler, steps):
    unet = StandIn(by_context)
    fields = {**SMALL, "steps": steps, "sampler": sampler, "decode": False}
    result = ldm.txt2img(dataclasses.replace(model, unet=unet), PROMPT, **fields)
    assert len(unet.asked) == result.receipts[0]["grid"]["calls"]


def test_the_size_is_the_models_own_where_none_is_asked_for(model):
    unet = StandIn(by_context)
    result = ldm.txt2img(dataclasses.replace(model, unet=unet), PROMPT, steps=1, seed=0, decode=False)
    assert result.latents.shape == (1, 4, 64, 64) and result.receipts[0]["width"] == 512 and result.images == []


def test_a_draw_that_is_only_spent_goes_to_no_device(model, monkeypatch):
    placed, place = [], Run.place
    monkeypatch.setattr(Run, "place", lambda self, x: placed.append(x) or place(self, x))
    ldm.txt2img(model, PROMPT, convention="compvis", sampler="ddim", decode=False, **{**SMALL, "steps": 4})
    assert len(placed) == 1  # what it begins with


@pytest.mark.parametrize("make", [lambda: torch.randn(2, 4, 3, 5), lambda: torch.randn(2, 3, 5, 4).movedim(3, 1)])
@pytest.mark.parametrize(("weights", "dtype"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_to_a_gpu_noise_goes_by_pinned_memory(weights, dtype, make):
    """The copy from it returns at once. As it goes, it keeps the layout that a copy without would have had."""
    pinned, copies = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is torch.ops.aten.empty_like.default:
                pinned.append(kwargs.pop("pin_memory"))
            if function is torch.ops.aten._to_copy.default:
                copies.append((args[0].dtype, kwargs["non_blocking"]))
            return function(*args, **kwargs)

    with FakeTensorMode():
        weight = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=weights)
        run = SimpleNamespace(components=SimpleNamespace(unet=SimpleNamespace(conv_in=SimpleNamespace(weight=weight))))
        x = make()
        with torch.inference_mode(False), Watch():
            found = Run.place(run, x)
        assert found.device == weight.device and found.dtype == dtype and found.stride() == x.stride()
    assert pinned == [True] and copies == [(dtype, True)]


def test_noise_given_takes_the_place_of_noise_drawn(model):
    noise = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(7))
    given, drawn = ldm.txt2img(model, PROMPT, noise=noise, **SMALL), ldm.txt2img(model, PROMPT, **SMALL)
    assert torch.equal(given.latents, drawn.latents) and "noise_sha256" in given.receipts[0]
    with pytest.raises(ValueError, match="noise that was given"):
        ldm.replay(model, given.receipts[0])


def test_latents_are_those_that_the_picture_was_decoded_from(model):
    result = ldm.txt2img(model, PROMPT, num_images=2, **SMALL)
    pictures = ldm.pictures(model, result.latents)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in result.images]


def test_the_hook_sees_every_step_and_its_answer_is_gone_on_with(model):
    seen = []

    def hook(x, info):
        seen.append((info.index, info.count, ldm.pictures(model, info.x0)[0].size))
        return torch.zeros_like(x)

    result = ldm.txt2img(model, PROMPT, after_step=hook, **SMALL)
    assert seen == [(i, 3, (32, 24)) for i in range(3)] and not result.latents.any()


@pytest.mark.parametrize("answer", [None, torch.zeros(1), 3])
def test_a_hook_that_does_not_answer_with_x_is_told_so_at_once(model, answer):
    unet = StandIn(by_context)
    with pytest.raises(ValueError, match=r"after_step returned .*; expected the x to go on with, \[1, 4, 3, 4\]"):
        ldm.txt2img(dataclasses.replace(model, unet=unet), PROMPT, after_step=lambda x, info: answer, **SMALL)
    assert len(unet.asked) == 2  # PNDM's first step


def test_what_the_hook_answers_counts_the_same_for_every_sampler(model):
    """A network that sees no noise only rescales x, so that what was added along the way arrives in proportion."""
    still = dataclasses.replace(model, unet=StandIn(lambda x, t, context: torch.zeros_like(x)))
    noise, added = torch.zeros(1, 4, 3, 4), {}
    for sampler in ("ddim", "euler", "heun", "lms", "pndm", "dpmpp_2m", "unipc"):
        for k in range(3):
            hook = lambda x, info, k=k: x + (info.index == k)  # noqa: E731
            result = ldm.txt2img(still, PROMPT, noise=noise, sampler=sampler, after_step=hook, decode=False, **SMALL)
            added.setdefault(k, []).append(float(result.latents[0, 0, 0, 0]))
    for k in (1, 2):
        *exact, corrected = added[k]
        assert exact == pytest.approx([exact[0]] * len(exact), rel=1e-5), k
        assert corrected == pytest.approx(exact[0], rel=0.05), k  # UniPC's corrector sees the change as the network's


def test_an_exception_in_the_hook_cancels_the_run(model):
    class Cancelled(Exception):
        pass

    def hook(x, info):
        raise Cancelled

    with pytest.raises(Cancelled):
        ldm.txt2img(model, PROMPT, after_step=hook, **SMALL)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.02), (torch.float64, 1e-4)])
def test_every_precision_makes_nearly_the_same_picture(model, dtype, tolerance):
    other = dataclasses.replace(
        model,
        **{kind: copy_of(getattr(model, kind)).to(dtype) for kind in ("text_encoder", "unet", "autoencoder")},
    )
    exact = ldm.txt2img(model, PROMPT, guidance_scale=2, **SMALL)
    found = ldm.txt2img(other, PROMPT, guidance_scale=2, **SMALL)
    assert found.latents.dtype == torch.promote_types(dtype, torch.float32)  # between calls x is float32 at least
    assert relative_error(found.latents, exact.latents) < tolerance
    assert found.receipts[0]["dtype"] == str(dtype).removeprefix("torch.")


def copy_of(module):
    import copy

    return copy.deepcopy(module)


def test_pictures_that_hold_nan_are_refused(model):
    broken = dataclasses.replace(model, unet=StandIn(lambda x, t, context: x * float("nan")))
    with pytest.raises(ValueError, match="the latents hold NaN; the model's weights may be damaged"):
        ldm.txt2img(broken, PROMPT, **SMALL)
    narrow = StandIn(broken.unet.function, torch.float16)
    with pytest.raises(ValueError, match="float16 is too narrow for this model; try bfloat16 or float32"):
        ldm.txt2img(dataclasses.replace(model, unet=narrow), PROMPT, **SMALL)


def test_what_of_the_prompt_did_not_fit_is_in_the_receipt(model):
    long = "cube " * 80
    assert ldm.txt2img(model, long, **SMALL).receipts[0]["cut_off"].split() == ["cube"] * 5


def test_compvis_cuts_255ths_off_and_the_others_round(model):
    pixels = torch.full((1, 3, 1, 1), 2 * 99.6 / 255 - 1)
    assert [to_images(pixels, truncate=cut)[0].getpixel((0, 0))[0] for cut in (True, False)] == [99, 100]
    assert HABITS["compvis"].truncate and not HABITS["diffusers"].truncate and not HABITS["ldm"].truncate
    result = ldm.txt2img(model, PROMPT, convention="compvis", **{**SMALL, "steps": 4})
    decoded = autoencoding.decode(model.autoencoder, result.latents)
    assert result.images[0].tobytes() == to_images(decoded, truncate=True)[0].tobytes()


# -- Image to image


def test_strength_0_is_the_image_through_the_autoencoder_and_back(model, picture):
    result = ldm.img2img(model, PROMPT, picture, strength=0, posterior="mode", seed=1)
    pixels = to_tensor(picture, (32, 24))
    latents = model.autoencoder.encode(pixels).mode() * model.autoencoder.config.scaling_factor
    assert relative_error(result.latents, latents) < 1e-6
    assert result.receipts[0]["grid"]["calls"] == 0 and result.receipts[0]["begun_with"] == "the image"


def test_strength_1_ignores_the_image_and_is_text_to_image(model, picture):
    fields = {"steps": 4, "seed": 5}
    ignoring = ldm.img2img(model, PROMPT, picture, strength=1, **fields)
    other = ldm.img2img(model, PROMPT, ImageOps.invert(picture), strength=1, **fields)
    text = ldm.txt2img(model, PROMPT, width=32, height=24, **fields)
    assert torch.equal(ignoring.latents, text.latents) and torch.equal(other.latents, text.latents)
    assert ignoring.receipts[0]["begun_with"] == "noise alone"


def test_strength_1_leaves_a_trace_of_the_image_where_diffusers_does(model, picture):
    fields = {"steps": 4, "seed": 5, "strength": 1, "convention": "diffusers", "sampler": "euler"}
    one, other = (ldm.img2img(model, PROMPT, p, **fields) for p in (picture, ImageOps.invert(picture)))
    assert not torch.equal(one.latents, other.latents)
    assert one.receipts[0]["begun_with"] == "the image, noised"


@pytest.mark.parametrize(("strength", "steps"), [(0.3, 7), (0.8, 20), (0.04, 1), (0.039, 0), (0.999, 24)])
def test_strength_times_steps_are_run(model, picture, strength, steps):
    seen = []
    ldm.img2img(model, PROMPT, picture, strength=strength, seed=1, after_step=lambda x, info: seen.append(info.index) or x)
    assert len(seen) == steps  # int(25 x strength)


def test_the_image_is_noised_to_the_level_of_the_first_step(model, picture):
    """With a network that sees the noise exactly, any strength gives the image back."""
    latents = seeded.tensor("latents", 1, 4, 3, 4)
    noise = seeded.tensor("noise", 1, 4, 3, 4)
    unet = StandIn(lambda x, t, context: noise.expand(len(x), -1, -1, -1).to(x))
    exact = dataclasses.replace(model, unet=unet)
    for sampler in ("pndm", "ddim", "euler", "heun", "dpmpp_2m", "unipc", "lms"):
        found = ldm.img2img(exact, PROMPT, latents, strength=0.6, noise=noise, steps=10, sampler=sampler, decode=False)
        end = ldm_sigmas(model)(0.0)
        assert relative_error(found.latents, signal(end) * latents + noise_std(end) * noise) < 1e-5, sampler


def test_latents_are_taken_in_the_place_of_a_picture(model, picture):
    encoded = ldm.img2img(model, PROMPT, picture, strength=0, posterior="mode", decode=False).latents
    fields = {"strength": 0.5, "steps": 4, "noise": seeded.tensor("noise", 1, 4, 3, 4)}
    of_latents = ldm.img2img(model, PROMPT, encoded, **fields)
    of_picture = ldm.img2img(model, PROMPT, picture, posterior="mode", **fields)
    assert relative_error(of_latents.latents, of_picture.latents) < 1e-6
    with pytest.raises(ValueError, match=r"tensor of shape \[3, 3\]; expected latents \(n, 4, h, w\)"):
        ldm.img2img(model, PROMPT, torch.zeros(3, 3))


def test_a_picture_is_resized_where_a_size_is_asked_for(model, picture):
    assert ldm.img2img(model, PROMPT, picture, strength=0, width=16, height=40).images[0].size == (16, 40)
    assert ldm.img2img(model, PROMPT, picture, strength=0).images[0].size == (32, 24)  # 35 x 26, rounded down


def test_no_argument_is_mutated(model, picture, mask):
    before = picture.tobytes(), mask.tobytes()
    noise = seeded.tensor("noise", 1, 4, 3, 4)
    kept, latents = noise.clone(), seeded.tensor("latents", 1, 4, 3, 4)
    fields = {"steps": 4, "noise": noise, "seed": 1}
    ldm.inpaint(model, PROMPT, picture, mask, paste=True, **fields)
    ldm.img2img(model, PROMPT, latents, **fields)
    assert (picture.tobytes(), mask.tobytes()) == before
    assert torch.equal(noise, kept) and torch.equal(latents, seeded.tensor("latents", 1, 4, 3, 4))


# -- Inpainting


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "euler", "Euler a", "heun", "dpmpp_2m", "unipc", "lms"])
def test_what_the_mask_keeps_is_kept(model, picture, mask, sampler):
    """In latents exactly, and in pixels too where they are pasted."""
    result = ldm.inpaint(model, PROMPT, picture, mask, posterior="mode", steps=4, seed=2, sampler=sampler, paste=True)
    known = ldm.img2img(model, PROMPT, picture, strength=0, posterior="mode").latents
    hidden = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    hidden[..., :2, 1:3] = True
    assert torch.equal(result.latents[~hidden.expand(1, 4, -1, -1)], known[~hidden.expand(1, 4, -1, -1)])
    assert not torch.isclose(result.latents, known)[hidden.expand(1, 4, -1, -1)].any()
    original = picture.resize((32, 24), Image.Resampling.LANCZOS)
    box = (0, 16, 32, 24)
    assert result.images[0].crop(box).tobytes() == original.crop(box).tobytes()


def test_a_white_mask_hides_everything_and_a_black_one_nothing(model, picture):
    fields = {"steps": 4, "seed": 2, "posterior": "mode"}
    everything = ldm.inpaint(model, PROMPT, picture, Image.new("L", picture.size, 255), **fields)
    other = ldm.inpaint(model, PROMPT, ImageOps.invert(picture), Image.new("L", picture.size, 255), **fields)
    assert torch.equal(everything.latents, other.latents)
    nothing = ldm.inpaint(model, PROMPT, picture, Image.new("L", picture.size, 0), **fields)
    assert torch.equal(nothing.latents, ldm.img2img(model, PROMPT, picture, strength=0, **fields).latents)


def test_a_model_that_sees_the_mask_is_shown_mask_and_visible_part(model, picture, mask):
    seen = []

    def network_of_nine(x, t, context):
        seen.append(x)
        return by_context(x[:, :4], t, context)

    unet = StandIn(network_of_nine)
    unet.config = dataclasses.replace(unet.config, in_channels=9)
    nine = dataclasses.replace(model, unet=unet)
    result = ldm.inpaint(nine, PROMPT, picture, mask, steps=2, seed=1, posterior="mode", sampler="ddim")
    hidden = torch.zeros(1, 1, 3, 4)
    hidden[..., :2, 1:3] = 1
    pixels = to_tensor(picture, (32, 24)) * (1 - to_hidden_pixels(mask))
    visible = model.autoencoder.encode(pixels).mode() * model.autoencoder.config.scaling_factor
    for x in seen:
        assert x.shape == (2, 9, 3, 4)
        assert torch.equal(x[:, 4:5], hidden.expand(2, -1, -1, -1))
        assert relative_error(x[:, 5:], visible.expand(2, -1, -1, -1)) < 1e-6
    assert result.latents.shape == (1, 4, 3, 4)


def to_hidden_pixels(mask):
    return (to_tensor(mask.convert("RGB"), (32, 24)).mean(dim=1, keepdim=True) >= 0).float()


def test_inpainting_as_compvis_does_it_is_compvis_own_trajectory(model, monkeypatch):
    """Its blend before each call, with fresh noise each time, mask 1 keeping; see `compvis/inpaint` of the golden samplers."""
    golden = load_file(Path(__file__).parent / "references" / "samplers.safetensors")
    golden = {name.removeprefix("compvis/inpaint/"): t for name, t in golden.items() if name.startswith("compvis/inpaint/")}
    unet = StandIn(lambda x, t, context: network(x, t), torch.float64)
    turn = iter([golden["x_T"], *golden["draws"]])
    monkeypatch.setattr(Draws, "noise", lambda self, shape: next(turn).reshape(1, *shape))
    monkeypatch.setattr(inpainting, "known_latents", lambda *_: golden["image"])
    monkeypatch.setattr(inpainting, "encoded", lambda *_: ())
    height, width = golden["mask"].shape[-2:]
    keeps = to_images(F.interpolate(2 * golden["mask"] - 1, scale_factor=8).expand(-1, 3, -1, -1))[0]
    trace = []
    ldm.inpaint(
        dataclasses.replace(model, unet=unet),
        PROMPT,
        Image.new("RGB", (8 * width, 8 * height)),
        ImageOps.invert(keeps),
        steps=7,
        guidance_scale=1,
        sampler="ddim",
        convention="compvis",
        decode=False,
        after_step=lambda x, info: trace.append(x) or x,
    )
    assert len(trace) == 8
    # The hook sees x with the image already put back for the next call, as the network will; the last is left as it is.
    expected = [*golden["blended"][1:], golden["latents"][-1]]
    for i, (found, wanted) in enumerate(zip(trace, expected, strict=True)):
        assert relative_error(found, wanted.reshape(found.shape)) < 1e-9, f"step {i}"
    assert next(turn, None) is None  # every draw of theirs was one of ours


# -- The autoencoder in tiles


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (20, 8), (20, 28), (9, 31)])
def test_tiles_join_without_a_seam(size):
    """What does not look beyond a pixel comes out the same, tiled or not."""
    x = seeded.tensor("x", 1, 4, *size)
    grown = autoencoding._tiled(lambda part: F.interpolate(part, scale_factor=8.0), x, 8, 8, 1)
    assert relative_error(grown, F.interpolate(x, scale_factor=8.0)) < 1e-6
    pixels = seeded.tensor("pixels", 1, 3, 8 * size[0], 8 * size[1])
    shrunk = autoencoding._tiled(lambda part: F.avg_pool2d(part, 8), pixels, 64, 1 / 8, 8)
    assert relative_error(shrunk, F.avg_pool2d(pixels, 8)) < 1e-5


def test_a_tile_as_large_as_the_picture_changes_nothing(model, picture):
    whole = ldm.img2img(model, PROMPT, picture, seed=1, steps=4)
    tiled = ldm.img2img(model, PROMPT, picture, seed=1, steps=4, tile=64)
    assert torch.equal(whole.latents, tiled.latents)


def test_tiles_decode_about_what_the_whole_does(model):
    latents = seeded.tensor("latents", 2, 4, 12, 20)
    whole = autoencoding.decode(model.autoencoder, latents)
    tiled = autoencoding.decode(model.autoencoder, latents, 64)
    assert tiled.shape == whole.shape == (2, 3, 96, 160)
    assert torch.corrcoef(torch.stack([whole.flatten(), tiled.flatten()]))[0, 1] > 0.9


# -- Replay


@pytest.mark.parametrize("convention", HABITS)
@pytest.mark.parametrize("sampler", ["ddim", "Euler a Karras", "DPM++ 2M SDE"])
def test_a_receipt_makes_the_same_picture(model, convention, sampler):
    try:
        made = ldm.txt2img(
            model, ["a red cube", "a blue sphere"], num_images=2, sampler=sampler, convention=convention, **SMALL | {"steps": 4}
        )
    except ValueError as error:
        assert "has no" in str(error)  # a sampler that the convention does not have
        return
    for picture, receipt in zip(made.images, made.receipts, strict=True):
        again = ldm.replay(model, receipt)
        if convention in ("ldm", "kdiffusion"):  # computed alone: the same up to rounding
            assert difference(again.image, picture)[0] <= 1
        else:
            assert again.same and again.changes == []


def test_a_receipt_of_each_task_makes_the_same_picture(model, picture, mask):
    fields = {
        "steps": 4,
        "seed": 3,
        "guidance_interval": (100, 900),
        "negative_prompt": "blurry",
        "eta": 0.5,
        "sampler": "ddim",
    }
    for task, sources in (("img2img", {"image": picture}), ("inpaint", {"image": picture, "mask": mask})):
        made = getattr(ldm, task)(model, PROMPT, *sources.values(), strength=0.7, posterior="mode", **fields)
        again = ldm.replay(model, made.receipts[0], **sources)
        assert again.same and again.changes == [] and again.receipt == made.receipts[0]
        with pytest.raises(ValueError, match="was made with an image; give that as image too"):
            ldm.replay(model, made.receipts[0])
        with pytest.raises(ValueError, match="the image given is not the one"):
            ldm.replay(model, made.receipts[0], **{**sources, "image": ImageOps.invert(picture)})


def test_latents_alone_are_replayed_and_so_are_images_made_from_latents(model):
    alone = ldm.txt2img(model, PROMPT, decode=False, **SMALL)
    assert ldm.replay(model, alone.receipts[0]).same
    latents = seeded.tensor("latents", 2, 4, 3, 4)
    made = ldm.img2img(model, PROMPT, latents, num_images=2, steps=4, seed=1)
    for i, receipt in enumerate(made.receipts):
        again = ldm.replay(model, receipt, image=latents[i : i + 1])
        assert difference(again.image, made.images[i])[0] <= 1
    with pytest.raises(ValueError, match="the image given is not the one"):
        ldm.replay(model, made.receipts[0], image=latents[1:])


def test_receipts_of_a_run_share_nothing(model):
    first, second = ldm.txt2img(model, PROMPT, num_images=2, **SMALL).receipts
    first["grid"]["calls"] = -1
    assert second["grid"]["calls"] == 4


def test_a_damaged_receipt_is_refused_before_anything_is_computed(model):
    receipt = ldm.txt2img(model, PROMPT, convention="diffusers", **SMALL).receipts[0]
    unet = StandIn(by_context)
    for damage, message in (
        ({"task": ["txt2img"]}, r"task \['txt2img'\]; expected one of txt2img"),
        ({"index": None}, "image None of 1"),
        ({"index": 7}, "image 7 of 1"),
        ({"prompts": [], "prompt": None}, "expected text"),
        ({"steps": "many"}, "steps 'many'; expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            ldm.replay(dataclasses.replace(model, unet=unet), {**receipt, **damage})
    assert unet.asked == []


def test_a_replay_says_what_was_different(model):
    receipt = ldm.txt2img(model, PROMPT, **SMALL).receipts[0]
    other = ldm.build("tiny", seed=1)
    again = ldm.replay(other, receipt)
    assert not again.same and len(again.changes) == 1 and again.changes[0].startswith("the model's fingerprint was ")


# -- Fields


def test_settings_are_the_demo_forms(model):
    form = {"negative_prompt": "", "steps": 25, "guidance_scale": 7.5, "num_images": 1, "seed": None}
    assert {name: getattr(Settings(), name) for name in form} == form
    import inspect

    assert inspect.signature(ldm.img2img).parameters["strength"].default == 0.8


@pytest.mark.parametrize(
    "spelling", ["Euler a Karras", "k_euler_a_karras", "k_euler_a", "EulerAncestralDiscreteScheduler", "euler ancestral"]
)
def test_samplers_are_known_by_their_spellings(spelling):
    found = checked({"sampler": spelling})
    assert found.sampler == "euler_ancestral" and found.spacing == ("karras" if "karras" in spelling.lower() else None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 500}, "width 500 is not a multiple of 8; try 496 or 504"),
        ({"height": 1}, "height 1; expected a whole number from 8 to 65536"),
        ({"height": 0}, "height 0; expected a whole number from 8 to 65536"),
        ({"width": 64.0}, "width 64.0; expected a whole number"),
        ({"steps": 0}, "steps 0; expected a whole number from 1 up"),
        ({"steps": 1001}, "1001 steps; expected 1 to 1000"),
        ({"steps": 2.5}, "steps 2.5; expected a whole number"),
        ({"steps": True}, "steps True; expected a whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan; expected a finite number, 0 or more"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf; expected a finite number, 0 or more"),
        ({"guidance_scale": -1}, "guidance_scale -1; expected a finite number, 0 or more"),
        ({"guidance_scale": "7"}, "guidance_scale '7'; expected a finite number"),
        ({"guidance_interval": (5, 1)}, "expected the lower timestep first"),
        ({"guidance_interval": 5}, "guidance_interval 5; expected two timesteps"),
        ({"sampler": "eular"}, "sampler 'eular'; expected one of ddim"),
        ({"sampler": None}, "sampler None; expected text"),
        ({"sampler": "Euler Karras", "spacing": "leading"}, "name one spacing, not two"),
        ({"spacing": "cubic"}, "spacing 'cubic'; expected one of tapered"),
        ({"convention": "a1111"}, "convention 'a1111'; expected one of ldm"),
        ({"convention": "kdiffusion"}, "convention 'kdiffusion' has no pndm sampler"),
        ({"convention": "compvis", "steps": 3}, "CompVis's grid has no 3 steps"),
        ({"eta": 0.5}, "eta 0.5 with sampler pndm; only ddim takes eta"),
        ({"eta": 2, "sampler": "ddim"}, "eta 2; expected 0 to 1"),
        ({"seed": -1}, "seed -1; for a drawn one, leave the seed out"),
        ({"seed": 2**64}, "seed 18446744073709551616; expected a whole number from 0"),
        ({"num_images": 0}, "num_images 0; expected a whole number from 1 up"),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed 18446744073709551615 for 2 images"),
        ({"batch_size": 0}, "batch_size 0; expected a whole number from 1 up"),
        ({"tile": 10}, "tile 10; expected a whole number from 64 up"),
        ({"tile": 100}, "tile 100 is not a multiple of 8; try 96 or 104"),
        ({"decode": 1}, "decode 1; expected True or False"),
        ({"negative_prompt": None}, "negative_prompt None; expected text"),
        ({"stepz": 3}, "unknown setting 'stepz'; did you mean steps?"),
        ({"guidance_scale": 10**400}, "guidance_scale 1000.*; expected a finite number"),
        ({"sampler": "ddim", "spacing": "leading", "steps": 1000}, "the leading grid has no 1000 steps of 1000"),
        ({"sampler": "unipc", "convention": "diffusers", "steps": 1000}, "1000 steps are too many for this grid"),
        ({"noise": torch.full((1, 4, 64, 64), float("nan"))}, "noise holds infinite values or NaN"),
        ({"noise": torch.zeros(1, 4, 2, 2)}, r"noise of shape \[1, 4, 2, 2\]; expected a tensor of \[1, 4, 64, 64\]"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_before_anything_is_computed(model, fields, message):
    unet = StandIn(by_context)
    with pytest.raises(ValueError, match=message) as refusal:
        ldm.txt2img(dataclasses.replace(model, unet=unet), PROMPT, **fields)
    assert "\n" not in str(refusal.value) and unet.asked == []


@pytest.mark.parametrize("prompt", [None, 5, [], ["a", 3]])
def test_a_prompt_that_is_no_text_is_refused(model, prompt):
    with pytest.raises(ValueError, match=r"prompt .*; expected text"):
        ldm.txt2img(model, prompt)


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), "0.5", None])
def test_a_strength_out_of_range_is_refused(model, picture, mask, strength):
    for task in (
        lambda **f: ldm.img2img(model, PROMPT, picture, **f),
        lambda **f: ldm.inpaint(model, PROMPT, picture, mask, **f),
    ):
        with pytest.raises(ValueError, match=r"strength .*; expected 0 to 1"):
            task(strength=strength)


def test_inpainting_that_would_change_nothing_is_refused(model, picture, mask):
    with pytest.raises(ValueError, match="paste lays pixels over pictures, and decode=False makes none"):
        ldm.inpaint(model, PROMPT, picture, mask, paste=True, decode=False)
    with pytest.raises(ValueError, match=r"strength 0\.01 of 25 steps leaves none to run"):
        ldm.inpaint(model, PROMPT, picture, mask, strength=0.01)
    with pytest.raises(ValueError, match="image and mask are Image and NoneType; expected PIL images"):
        ldm.inpaint(model, PROMPT, picture, None)
    five = StandIn(by_context)
    five.config = dataclasses.replace(five.config, in_channels=5)
    with pytest.raises(ValueError, match="the UNet takes 5 channels; expected 4, or 9 of an inpainting model"):
        ldm.inpaint(dataclasses.replace(model, unet=five), PROMPT, picture, mask)


def test_text_to_image_with_an_inpainting_model_is_refused(model):
    nine = StandIn(by_context)
    nine.config = dataclasses.replace(nine.config, in_channels=9)
    for call in (ldm.txt2img, lambda c, p: ldm.img2img(c, p, torch.zeros(1, 4, 3, 4))):
        with pytest.raises(ValueError, match=r"takes 9 channels.*use inpaint"):
            call(dataclasses.replace(model, unet=nine), PROMPT)


def test_a_result_is_saved_with_its_receipts(model, tmp_path):
    result = ldm.txt2img(model, PROMPT, num_images=2, **SMALL)
    paths = result.save(tmp_path)
    assert [path.name for path in paths] == ["00000-7.png", "00001-8.png"]
    assert [ldm.read_receipt(path) for path in paths] == result.receipts
    assert [Image.open(path).tobytes() for path in paths] == [picture.tobytes() for picture in result.images]


def test_what_is_no_model_no_picture_and_no_receipt_is_named(model):
    with pytest.raises(ValueError, match=r"components is a str; expected what ldm\.load returns"):
        ldm.txt2img("model.ckpt", PROMPT)
    with pytest.raises(ValueError, match=r"image is a str; expected a PIL image \(ldm\.images\.read opens a file\)"):
        ldm.img2img(model, PROMPT, "cat.png")
    with pytest.raises(ValueError, match=r"receipt is a str; expected what ldm\.read_receipt returns"):
        ldm.replay(model, "cat.png")
    with pytest.raises(ValueError, match="the picture was made without any image; leave it out"):
        ldm.replay(model, ldm.txt2img(model, PROMPT, **SMALL).receipts[0], image=Image.new("RGB", (8, 8)))
