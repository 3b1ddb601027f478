"""Rounding of `ldm.fast` at Stable Diffusion v1's size, seeded random weights, 256 x 256: `pytest -m slow -s -n0 <this file>`.

Ten minutes, 12 GB of memory. Prints every error.
"""

import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch

import ldm
from ldm.fast.accelerate import accelerate
from tests import seeded

pytestmark = pytest.mark.slow

SIDE = 32
TIMESTEPS = (20.0, 500.0, 980.0)


@pytest.fixture(scope="module")
def model():
    made = ldm.build("sd-v1", seed=0)
    for kind in ("unet", "autoencoder"):
        seeded.fill(getattr(made, kind))
    return made


def in_dtype(model, dtype):
    """Another model of the same weights."""
    kinds = {}
    for kind in ("unet", "autoencoder"):
        module = getattr(model, kind)
        with torch.device("meta"):
            kinds[kind] = type(module)(module.config).eval()
        kinds[kind].load_state_dict({name: t.to(dtype) for name, t in module.state_dict().items()}, assign=True)
    return dataclasses.replace(model, **kinds)


@torch.no_grad()
def answers(model, dtype) -> dict[str, torch.Tensor]:
    x, context = (seeded.tensor(*of).to(dtype) for of in (("x", 2, 4, SIDE, SIDE), ("context", 2, 77, 768)))
    picture = seeded.tensor("picture", 1, 3, 8 * SIDE, 8 * SIDE).clamp(-1, 1).to(dtype)
    found = {f"unet, t = {t:g}": model.unet(x, t, context) for t in TIMESTEPS}
    found["decode"] = model.autoencoder.decode(x[:1])
    return found | {"encode": model.autoencoder.encode(picture).mean}


def errors(found, truth) -> dict[str, float]:
    return {name: ((found[name].double() - exact).norm() / exact.norm()).item() for name, exact in truth.items()}


@pytest.fixture(scope="module")
def truth(model):
    return answers(in_dtype(model, torch.float64), torch.float64)


def test_in_bfloat16_errors_are_at_most_a_tenth_above_the_reference_s(model, truth):
    reference = errors(answers(in_dtype(model, torch.bfloat16), torch.bfloat16), truth)
    gc.collect()
    ours = errors(answers(accelerate(model, dtype=torch.bfloat16, side=8 * SIDE), torch.bfloat16), truth)
    for name, error in ours.items():
        print(f"bfloat16, {name}: {error:.3e}, the reference {reference[name]:.3e}, {error / reference[name]:.3f}")
    assert all(error <= 1.1 * reference[name] for name, error in ours.items())


@pytest.mark.reference
def test_in_float32_errors_are_no_larger_than_diffusers_in_channels_last(model, truth):
    """Which is the layout that both are quick in. (How its convolutions are summed makes most of both errors.)"""
    from ldm.numerics import peers

    theirs = peers.builder(lambda dtype: model)(torch.float32)
    unet, autoencoder = (theirs[kind].to(memory_format=torch.channels_last) for kind in ("unet", "autoencoder"))

    peer = SimpleNamespace(
        unet=lambda x, t, context: unet(x, t, encoder_hidden_states=context, return_dict=False)[0],
        autoencoder=SimpleNamespace(
            decode=lambda z: autoencoder.decode(z, return_dict=False)[0],
            encode=lambda picture: autoencoder.encode(picture).latent_dist,
        ),
    )
    peer = errors(answers(peer, torch.float32), truth)
    ours = errors(answers(accelerate(model, side=8 * SIDE), torch.float32), truth)
    for name, error in ours.items():
        print(f"float32, {name}: {error:.3e}, diffusers in channels_last {peer[name]:.3e}, {error / peer[name]:.3f}")
    assert all(error <= peer[name] for name, error in ours.items())
