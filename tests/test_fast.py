"""`ldm.fast`: the same numbers as the reference, which stays as it is, and the same pictures."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ldm
from ldm import images
from ldm.adapters import lora
from ldm.checkpoint import REQUIRED
from ldm.fast import convolutions, memory, native, normalisation, winograd
from ldm.fast.accelerate import accelerate
from ldm.fast.autoencoder import FastAutoencoder
from ldm.fast.normalisation import GroupNorm
from ldm.fast.plan import Plan
from ldm.fast.unet import FastUNet
from ldm.models.unet import UNet
from tests import lora_files, seeded
from tests.measure import relative_error

PROMPT = "a red cube on top of a blue sphere"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def winograd_everywhere(monkeypatch):
    """The tiny model's convolutions are too small for it otherwise."""
    for name in ("WINOGRAD_CHANNELS", "WINOGRAD_PIXELS", "WINOGRAD_FLOPS", "WINOGRAD_LARGE"):
        monkeypatch.setattr(convolutions, name, 0)


@pytest.fixture(scope="module")
def tiny():
    """Of float64, every layer random, offsets and norms too."""
    model = ldm.build("tiny", seed=0, dtype=torch.float64)
    for kind in REQUIRED:
        seeded.fill(getattr(model, kind))
    return model


def in_dtype(model, dtype):
    changed = {kind: type(module)(module.config).to(dtype) for kind in REQUIRED for module in [getattr(model, kind)]}
    for kind, module in changed.items():
        module.load_state_dict(getattr(model, kind).state_dict())
    return dataclasses.replace(model, **{kind: module.eval() for kind, module in changed.items()})


def inputs(model, b=2, size=(16, 16), dtype=torch.float64):
    width = model.unet.config.context_width
    return seeded.tensor("x", b, 4, *size).to(dtype), seeded.tensor("context", b, 77, width).to(dtype)


@pytest.mark.parametrize("ways", ["all", "none"])
@pytest.mark.parametrize("size", [(16, 16), (13, 10), (8, 24)])
def test_in_float64_the_unet_is_the_reference_to_1e_10(tiny, winograd_everywhere, ways, size):
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64, winograd=ways))
    assert any(isinstance(part, winograd.Winograd) for part in fast.modules()) == (ways == "all")
    x, context = inputs(tiny, size=size)
    for t in (0.5, 500.0, torch.tensor([3.0, 980.0])):
        assert relative_error(fast(x, t, context), tiny.unet(x, t, context)) < 1e-10


@pytest.mark.parametrize("ways", ["all", "none"])
@pytest.mark.parametrize("side", [8, 5])
def test_in_float64_the_autoencoder_is_the_reference_to_1e_10(tiny, winograd_everywhere, ways, side):
    fast, factor = (
        FastAutoencoder(tiny.autoencoder, Plan(dtype=torch.float64, winograd=ways), side=8),
        tiny.autoencoder.config.downsampling,
    )
    latents, image = (
        seeded.tensor("z", 2, 4, side, 8).double(),
        seeded.tensor("image", 1, 3, side * factor, 8 * factor).double(),
    )
    assert relative_error(fast.decode(latents), tiny.autoencoder.decode(latents)) < 1e-10
    found, truth = fast.encode(image), tiny.autoencoder.encode(image)
    assert relative_error(found.mean, truth.mean) < 1e-10
    assert relative_error(found.log_variance, truth.log_variance) < 1e-10


def banded(monkeypatch, elements):
    for module, name in ((convolutions, "BANDED"), (convolutions, "BAND"), (normalisation, "BAND"), (winograd, "BLOCK")):
        monkeypatch.setattr(module, name, elements)


@pytest.mark.parametrize("ways", ["all", "none"])
@pytest.mark.parametrize("elements", [0, 1500])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (18, 10)])
def test_a_map_normalised_by_bands_is_the_map_normalised_whole(monkeypatch, winograd_everywhere, ways, elements, size):
    norm, conv = (seeded.fill(layer.double()) for layer in (nn.GroupNorm(4, 16), nn.Conv2d(16, 6, 3, padding=1)))
    x = seeded.tensor("x", 2, 16, *size).double() + 3
    truth = conv(F.silu(norm(x)))
    banded(monkeypatch, elements)
    made = convolutions.Normalised(norm, conv, Plan(dtype=torch.float64, winograd=ways), pixels=64)
    assert isinstance(made.conv, winograd.Winograd) == (ways == "all")
    bands = []
    whole = made.norm.writing
    made.norm.writing = lambda x: counted(whole(x), bands)
    assert relative_error(made(x.contiguous(memory_format=torch.channels_last)), truth) < 1e-10
    assert len(bands) > 1 or size[0] < 8
    other = seeded.tensor("bias", 6).double()
    assert relative_error(made(x, other) - other[:, None, None], truth - conv.bias[:, None, None]) < 1e-10


def counted(write, calls):
    def counting(part, out):
        calls.append(part.shape)
        write(part, out)

    return counting


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("kernels", [False, True])
def test_moments_of_bands_round_as_the_norm_itself(monkeypatch, mean, kernels):
    """Values whose mean is far from nothing lose what the squares of both have in common; the sums are float64 for that."""
    banded(monkeypatch, 5000)
    norm = seeded.fill(nn.GroupNorm(32, 320))
    x = (seeded.tensor("x", 2, 320, 24, 24) + mean).contiguous(memory_format=torch.channels_last)
    truth = F.silu(F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps))
    ours, pixels = GroupNorm(norm, Plan(dtype=torch.float32, kernels=kernels)), x.permute(0, 2, 3, 1)
    made = torch.empty_like(pixels)
    ours.writing(x)(pixels, made)
    error, own = (relative_error(found, truth) for found in (made.permute(0, 3, 1, 2), F.silu(norm(x))))
    assert error < 2 * own and error < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_one_x_under_several_contexts_is_the_x_repeated(tiny, batch):
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64))
    x, _ = inputs(tiny, b=batch)
    _, context = inputs(tiny, b=3 * batch)
    truth = tiny.unet(x.repeat(3, 1, 1, 1), 321.0, context)
    assert torch.equal(tiny.unet(x, 321.0, context), truth)
    assert relative_error(fast(x, 321.0, context), truth) < 1e-10


def test_a_unet_without_attention_at_the_top_shares_more(tiny):
    config = dataclasses.replace(tiny.unet.config, attention_levels=(False, True, False))
    unet = seeded.fill(UNet(config).double())
    x, _ = inputs(tiny, b=1)
    _, context = inputs(tiny)
    truth = unet(x.repeat(2, 1, 1, 1), 7.0, context)
    assert relative_error(FastUNet(unet, Plan(dtype=torch.float64))(x, 7.0, context), truth) < 1e-10


@pytest.mark.parametrize("t", [20.0, 500.0, 980.0])
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1.3), (torch.bfloat16, 1.1)], ids=str)
def test_errors_are_about_the_reference_s_own(tiny, t, dtype, times):
    """The mean square over 24 inputs, since one of this size tells a tenth's difference from chance no better. In float32 the
    reference sums its shortcuts in float64, which saves it a fifth. (Winograd's errors at so few channels are larger than they
    ever are in use; see below.)"""
    reference, fast = in_dtype(tiny, dtype).unet, FastUNet(in_dtype(tiny, dtype).unet, Plan(dtype=dtype))
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(24):
        x, context = (seeded.tensor("x", 2, *shape, seed=seed).to(dtype) for shape in ((4, 16, 16), (77, 32)))
        truth = tiny.unet(x.double(), t, context.double())
        errors += torch.stack([(unet(x, t, context).double() - truth).pow(2).mean() for unet in (reference, fast)])
    assert errors[0] > 0 and errors[1].sqrt() <= times * errors[0].sqrt()


@pytest.mark.parametrize(("channels", "times"), [(convolutions.WINOGRAD_CHANNELS, 1.5), (320, 1.3), (640, 1.1)])
@pytest.mark.parametrize("kernels", [False, True])
def test_winograd_rounds_about_as_a_direct_convolution(channels, times, kernels):
    """As wide in as out, as the layers are that it is for: how oneDNN sums, and so how it rounds, depends on both, and on the
    processor."""
    conv = seeded.fill(nn.Conv2d(channels, channels, 3, padding=1))
    x = seeded.tensor("x", 1, channels, 24, 24).to(memory_format=torch.channels_last)
    truth = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    direct, ours = (
        (found.double() - truth).pow(2).mean().sqrt()
        for found in (conv(x), winograd.Winograd(conv, Plan(dtype=torch.float32, kernels=kernels))(x))
    )
    assert ours < times * direct


@pytest.mark.parametrize("block", [1, 1 << 30])
@pytest.mark.parametrize("size", [(1, 1), (4, 9), (18, 7)])
def test_winograd_takes_maps_of_any_size_in_any_number_of_parts(monkeypatch, block, size):
    monkeypatch.setattr(winograd, "BLOCK", block)
    conv = seeded.fill(nn.Conv2d(3, 5, 3, padding=1).double())
    x = seeded.tensor("x", 2, 3, *size).double()
    assert relative_error(winograd.Winograd(conv, Plan(dtype=torch.float64))(x), conv(x)) < 1e-12


def test_accelerating_changes_nothing_of_the_model_that_is_given():
    model = ldm.build("tiny", seed=0)
    before = {kind: {name: t.clone() for name, t in getattr(model, kind).state_dict().items()} for kind in REQUIRED}
    x, context = inputs(model, dtype=torch.float32)
    eps = model.unet(x, 500.0, context)
    fast = accelerate(model, dtype=torch.bfloat16)
    fast.unet(x.bfloat16(), 500.0, context.bfloat16())
    quick = accelerate(model)
    quick.unet(x, 500.0, context)
    quick.autoencoder.decode(x)
    for kind, tensors in before.items():
        assert all(torch.equal(t, tensors[name]) for name, t in getattr(model, kind).state_dict().items())
    assert torch.equal(model.unet(x, 500.0, context), eps) and model.acceleration is None


def test_pictures_of_the_bundled_model_are_the_same_and_each_prompt_has_its_own():
    model, wide = ldm.load(), ldm.load(dtype=torch.float64)
    fast = accelerate(model)
    for prompt in (PROMPT, "a green cone left of a purple cylinder"):
        fields = {"steps": 6, "seed": 3, "num_images": 2}
        made, plain, truth = (ldm.txt2img(one, prompt, **fields) for one in (fast, model, wide))
        assert max(relative_error(found.latents, truth.latents) for found in (made, plain)) < 1e-4
        for picture, expected in zip(made.images, plain.images, strict=True):
            assert images.difference(picture, expected)[0] <= 1
    fields = {"image": plain.images[0], "steps": 4, "seed": 1}
    made, plain, truth = (ldm.img2img(one, PROMPT, **fields) for one in (fast, model, wide))
    assert max(relative_error(found.latents, truth.latents) for found in (made, plain)) < 1e-4


def test_a_receipt_tells_of_it_and_has_the_model_s_own_fingerprint():
    model = ldm.load()
    fast = accelerate(model)
    made, plain = (ldm.txt2img(one, PROMPT, steps=2, seed=3).receipts[0] for one in (fast, model))
    assert made["model"] == plain["model"]
    told = {"winograd": "auto", "kernels": native.attends(torch.float32), "graph": False}
    assert made["acceleration"] == told and "acceleration" not in plain
    assert ldm.replay(fast, made).same
    assert any("acceleration" in change for change in ldm.replay(model, made).changes)


def test_what_cannot_be_accelerated_is_refused_in_one_line():
    model = ldm.build("tiny", seed=0)
    fast = accelerate(model)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(fast)
    with pytest.raises(ValueError, match=r"expected what ldm\.load returns"):
        accelerate(model.unet)
    with pytest.raises(ValueError, match=r"dtype torch\.int8; expected one of"):
        accelerate(model, dtype=torch.int8)
    with pytest.raises(ValueError, match="winograd 'yes'; expected auto, all or none"):
        accelerate(model, winograd="yes")
    with pytest.raises(ValueError, match="side 100; expected a multiple of"):
        accelerate(model, side=100)


def test_pages_of_a_file_are_let_go_and_those_of_a_process_are_not(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(1 << 20, dtype=torch.float32).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=1 << 20)
    assert mapped.sum() > 0
    assert memory.let_go(mapped)
    assert torch.equal(mapped, torch.arange(1 << 20, dtype=torch.float32))
    own = torch.arange(1 << 20, dtype=torch.float32)
    assert not memory.let_go(own) and own[-1] == (1 << 20) - 1
    mapped[5] = 7.0  # a page of the process's own among the file's
    assert not memory.let_go(mapped) and mapped[5] == 7.0


def test_a_text_encoder_lets_go_of_its_pages_and_reads_the_same_again(tmp_path, monkeypatch):
    model = ldm.build("tiny", seed=0)
    path = tmp_path / "table"
    table = model.text_encoder.token_embedding
    path.write_bytes(table.weight.detach().numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=table.weight.numel()).view_as(table.weight)
    table.weight = nn.Parameter(mapped, requires_grad=False)
    ids, let_go = model.tokenizer([PROMPT]).ids, []
    truth = model.text_encoder(ids)
    monkeypatch.setattr(memory, "let_go", lambda tensor, real=memory.let_go: let_go.append(real(tensor)))
    fast = accelerate(model)
    let_go.clear()
    assert torch.equal(fast.text_encoder(ids), truth) and any(let_go)
    let_go.clear()
    assert torch.equal(fast.text_encoder(ids), truth) and torch.equal(model.text_encoder(ids), truth)
    assert let_go == [True]  # by the quick one alone, and of the only weight that is large enough


def test_loras_are_merged_before_and_refused_after(tmp_path):
    model = ldm.build("tiny", seed=0)
    file = lora_files.kohya(tmp_path / "style.safetensors")
    style = lora.read(file, model)
    fields = {"steps": 2, "seed": 1, "width": 64, "height": 64}
    merged = lora.merge(model, [(style, 1.0)])
    made, truth = (ldm.txt2img(one, PROMPT, **fields) for one in (accelerate(merged), merged))
    assert relative_error(made.latents, truth.latents) < 1e-4
    assert relative_error(ldm.txt2img(model, PROMPT, **fields).latents, truth.latents) > 1e-3
    with pytest.raises(ValueError, match="which LoRAs cannot change; leave --fast out, or merge them before"):
        ldm.txt2img(accelerate(model), PROMPT, loras=[(file, 1.0)], **fields)
