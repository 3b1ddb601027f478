"""Contracts of the four networks that need no other implementation: shapes, seams, structure, purity."""

import dataclasses
import re

import pytest
import torch

import ldm
from ldm.diffusion.schedule import ScheduleConfig
from ldm.models import attention as attention_module
from ldm.models import unet as unet_module
from ldm.models.attention import Attention, attention, softmax_attention
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from ldm.models.clip import ImageConfig, ImageEncoder, TextConfig, TextEncoder, pool
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.models.unet import UNet, UNetConfig, table
from ldm.models.unet_blocks import timestep_embedding
from ldm.presets import PRESETS
from tests import seeded
from tests.measure import relative_error
from weights_convert import architecture
from weights_convert.naming import shapes

PAIRS = [
    (UNet, UNetConfig(), architecture.UNet()),
    (UNet, UNetConfig(in_channels=9), architecture.UNet(in_channels=9)),
    (Autoencoder, AutoencoderConfig(), architecture.Autoencoder()),
    (TextEncoder, TextConfig(), architecture.TextEncoder()),
    (ImageEncoder, ImageConfig(), architecture.ImageEncoder()),
    (SafetyChecker, SafetyConfig(), architecture.SafetyChecker()),
]


@pytest.fixture
def inputs():
    """x, t and context for the tiny UNet."""
    return seeded.tensor("x", 2, 4, 8, 12).double(), torch.tensor([981.0, 3.5]), seeded.tensor("context", 2, 77, 32).double()


# -- Structure


@pytest.mark.parametrize(("module", "config", "listed"), PAIRS, ids=lambda p: getattr(p, "__name__", ""))
def test_the_modules_hold_exactly_the_tensors_that_the_naming_tables_list(module, config, listed):
    with torch.device("meta"):
        held = {name: tuple(tensor.shape) for name, tensor in module(config).state_dict().items()}
    assert held == shapes(listed, "native")


@pytest.mark.parametrize(("module", "config", "parameters"), [(*PAIRS[0][:2], 859_520_964), (*PAIRS[2][:2], 83_653_863)])
def test_sd_v1_has_the_published_number_of_parameters(module, config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in module(config).parameters()) == parameters


def test_the_text_encoder_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in TextEncoder(TextConfig()).parameters()) == 123_060_480


def test_the_table_in_the_docstring_is_the_one_of_sd_v1():
    indented = "\n".join("    " + line for line in table(UNetConfig()).split("\n"))
    assert indented in unet_module.__doc__
    assert ldm.table("sd-v1") == table(UNetConfig())


@pytest.mark.parametrize("size", [8, 30, 7])
def test_the_table_states_the_real_shapes(tiny, inputs, size):
    """Every block's channels and side, as hooks see them; sides round up where they are odd."""
    x, t, context = seeded.tensor("x", 2, 4, size, size).double(), *inputs[1:]
    seen, hooks = {}, []
    for name in ("down", "up"):
        for i, block in enumerate(getattr(tiny.unet, name)):
            hook = lambda module, args, out, key=f"{name}.{i}": seen.update({key: (args[0].shape, out.shape)})  # noqa: E731
            hooks.append(block.register_forward_hook(hook))
    tiny.unet(x, t, context)
    [hook.remove() for hook in hooks]
    lines = table(tiny.unet.config, size).split("\n")
    for name, (before, after) in seen.items():
        line = next(line for line in lines if line.startswith(name + " "))
        channels, sizes = re.split(r"\s{2,}", line)[1:3]
        joined, out = channels.split(" -> ")
        assert sum(map(int, joined.split(" + "))) == before[1] and int(out) == after[1], line
        assert [before[2], after[2]] == [int(sizes.split(" -> ")[0]), int(sizes.split(" -> ")[-1])], line
    assert len(seen) == len(unet_module.down_rows(tiny.unet.config)) + len(unet_module.up_rows(tiny.unet.config))


@pytest.mark.parametrize(("module", "config", "listed"), PAIRS, ids=lambda p: getattr(p, "__name__", ""))
def test_models_and_checkpoints_describe_a_component_alike(module, config, listed):
    """Field by field, so that what no tensor's shape shows (heads, groups, the scaling factor) cannot drift apart."""
    assert dataclasses.asdict(config) == dataclasses.asdict(listed)
    assert dataclasses.asdict(ScheduleConfig()) == dataclasses.asdict(architecture.Schedule())


def test_configs_are_frozen_and_take_keywords_only():
    with pytest.raises(AttributeError):
        PRESETS["sd-v1"].unet.heads = 4
    with pytest.raises(TypeError):
        UNetConfig(4)


# -- The UNet


def test_what_the_seams_computed_once_serves_every_step(tiny, inputs):
    x, _, context = inputs
    contexts, times = tiny.unet.project_context(context), {t: tiny.unet.embed_time(t) for t in (981, 500, 1)}
    for t in (1, 981, 500):
        assert torch.equal(tiny.unet.denoise(x, times[t], contexts), tiny.unet(x, t, context))
        assert len(times[t]) == sum(name.endswith("time_projection") for name, _ in tiny.unet.named_modules())


def test_the_seams_give_one_entry_for_each_residual_block_and_each_cross_attention(tiny, inputs):
    _, t, context = inputs
    rows = [*unet_module.down_rows(tiny.unet.config), *unet_module.up_rows(tiny.unet.config)]
    times, contexts = tiny.unet.embed_time(t), tiny.unet.project_context(context)
    assert len(times) == sum(row.resample != "down" for row in rows) + 2
    assert len(contexts) == sum(row.attention for row in rows) + 1
    assert all(time.shape[0] == 2 and time.shape[2:] == (1, 1) for time in times)
    assert all(key.shape == value.shape and key.shape[1:3] == (4, 77) for key, value in contexts)


def test_one_timestep_serves_a_whole_batch_and_each_sample_may_have_its_own(tiny, inputs):
    x, t, context = inputs
    together = tiny.unet(x, t, context)
    for i in range(2):
        alone = tiny.unet(x[i : i + 1], t[i].item(), context[i : i + 1])
        assert relative_error(alone, together[i : i + 1]) < 1e-12


@pytest.mark.parametrize("size", [(12, 20), (7, 9), (5, 8), (4, 4)])
def test_latents_of_odd_sizes_come_back_in_their_own_size(tiny, size):
    x, context = seeded.tensor("odd", 1, 4, *size).double(), seeded.tensor("context", 1, 77, 32).double()
    assert tiny.unet(x, 500, context).shape == x.shape


def test_the_unet_leaves_its_arguments_alone(tiny, inputs):
    copies = [argument.clone() for argument in inputs]
    tiny.unet(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_the_sinusoids_are_exact_to_float64():
    t, width = torch.tensor([981.0], dtype=torch.float64), 320
    expected = [torch.tensor(981.0 * 10_000.0 ** (-i / 160), dtype=torch.float64) for i in range(160)]
    assert torch.allclose(timestep_embedding(t, width)[0, :160], torch.stack(expected).cos(), rtol=0, atol=2e-13)
    assert torch.allclose(timestep_embedding(t, width)[0, 160:], torch.stack(expected).sin(), rtol=0, atol=2e-13)


def test_a_fractional_timestep_is_not_rounded_to_float32_on_its_way(tiny):
    exact = tiny.unet.embed_time(torch.tensor([978.612], dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(tiny.unet.embed_time(978.612), exact, strict=True))
    rounded = tiny.unet.embed_time(torch.tensor([978.612], dtype=torch.float32))
    assert 1e-9 < relative_error(rounded[0], exact[0]) < 1e-4


# -- Attention


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_equals_the_written_out_softmax(causal):
    q, k, v = (seeded.tensor(name, 2, 3, 11, 8).double() for name in "qkv")
    assert relative_error(attention(q, k, v, causal=causal), softmax_attention(q, k, v, causal=causal)) < 1e-14


def test_a_whole_unet_computes_the_same_with_the_written_out_softmax(tiny, inputs, monkeypatch):
    fused = tiny.unet(*inputs)
    monkeypatch.setattr(attention_module, "attention", softmax_attention)
    plain = tiny.unet(*inputs)
    assert 0 < relative_error(plain, fused) < 1e-12  # not zero: the twin really ran


def test_attention_to_oneself_is_attention_to_a_context_that_is_oneself():
    module, x = seeded.fill(Attention(16, heads=4)).double(), seeded.tensor("x", 2, 5, 16).double()
    assert torch.equal(module(x), module(x, module.keys_values(x)))


# -- CLIP


def test_the_text_encoder_sees_only_what_came_before(tiny):
    ids = torch.randint(0, 49408, (1, 77), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 40] += 1
    difference = (tiny.text_encoder(ids) - tiny.text_encoder(changed)).abs().amax(dim=2)[0]
    assert (difference[:40] == 0).all() and (difference[40:] > 0).all()


def test_pooling_takes_the_first_end_mark_even_where_higher_ids_follow():
    hidden = torch.arange(5.0).reshape(1, 5, 1)
    assert pool(hidden, torch.tensor([[0, 9, 2, 2, 11]]), end_token=2).item() == 2.0


def test_the_safety_checker_returns_cosines():
    config = SafetyConfig(image_size=28, width=32, layers=2, heads=4, mlp_width=64, projection_width=24)
    checker = seeded.fill(SafetyChecker(config)).double()
    concepts, special = checker(seeded.tensor("pixels", 2, 3, 28, 28).double())
    assert concepts.shape == (2, 17) and special.shape == (2, 3)
    assert concepts.abs().max() <= 1 and concepts.abs().max() > 0.1
    checker.concepts *= 3.0
    assert relative_error(checker(seeded.tensor("pixels", 2, 3, 28, 28).double())[0], concepts) < 1e-14


# -- The autoencoder


def test_the_autoencoder_goes_down_and_up_by_its_factor(tiny):
    images = seeded.tensor("images", 1, 3, 32, 48).double()
    posterior = tiny.autoencoder.encode(images)
    assert posterior.mean.shape == posterior.log_variance.shape == (1, 4, 4, 6)
    assert tiny.autoencoder.config.downsampling == 8
    assert tiny.autoencoder.decode(posterior.mode()).shape == images.shape


def test_a_posterior_samples_about_its_mean_with_its_deviation():
    mean, log_variance = torch.full((1, 1, 1, 2), 3.0), torch.tensor([[[[0.0, 2 * 0.6931471805599453]]]])
    noise = torch.tensor([[[[1.0, -1.0]]]])
    assert torch.allclose(Posterior(mean, log_variance).sample(noise), torch.tensor([[[[4.0, 1.0]]]]))
    standard = Posterior(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert standard.kl().item() == 0.0
    assert torch.allclose(Posterior(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).kl(), torch.tensor([8.0]))


def test_log_variances_are_clamped():
    module = seeded.fill(Autoencoder(AutoencoderConfig(level_widths=(8, 8), norm_groups=4)))
    module.quant_conv.bias.data[4:] = 1e4
    assert module.encode(seeded.tensor("images", 1, 3, 8, 8)).log_variance.max() == 20.0
