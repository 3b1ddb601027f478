"""The golden references: what the peers computed once, kept in the repository, so that no peer need be installed.

Made by `tests/references/make.py`; versions in `tests/references/manifest.json`.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.models.clip import pool
from ldm.models.safety import SafetyChecker
from ldm.text.tokenizer import Tokenizer
from tests import golden_inputs as inputs
from tests import seeded
from tests.measure import relative_error
from weights_convert import architecture as described
from weights_convert.naming import bijection, to_native

REFERENCES = Path(__file__).parent / "references"
NAMINGS = {"text_encoder": "transformers", "unet": "diffusers", "autoencoder": "diffusers", "safety": "transformers-5"}
TOLERANCE = 1e-12  # float64; rounding leaves about 1e-15


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(REFERENCES / "golden.safetensors")


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((REFERENCES / "manifest.json").read_text())


def filled(module, architecture, naming):
    """Our module with the values that the peer's tensors of the same place have."""
    foreign = {e.foreign: seeded.weight(e.foreign, e.foreign_shape) for e in bijection(architecture, naming)}
    module.load_state_dict({e.native: to_native(e, foreign[e.foreign]) for e in bijection(architecture, naming)})
    return module.double(), float(sum(tensor.double().sum() for tensor in foreign.values()))


@pytest.fixture(scope="module")
def networks(tiny, manifest):
    """Our networks with the peers' weights, once their fingerprints are known to be right."""
    architectures = {kind: architecture_of(getattr(tiny, kind)) for kind in ("text_encoder", "unet", "autoencoder")}
    modules = {kind: copy.deepcopy(getattr(tiny, kind)) for kind in architectures}
    architectures["safety"] = described.SafetyChecker(**vars(inputs.SAFETY))
    modules["safety"] = SafetyChecker(inputs.SAFETY)
    found = {kind: filled(modules[kind], architectures[kind], NAMINGS[kind]) for kind in modules}
    for kind, (_, fingerprint) in found.items():
        assert fingerprint == pytest.approx(manifest["weights"][kind], rel=1e-9), "the seeded weights have changed"
    return {kind: module for kind, (module, _) in found.items()}


def architecture_of(module):
    kind = {"TextEncoder": "text_encoder", "UNet": "unet", "Autoencoder": "autoencoder"}[type(module).__name__]
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(module.config).items()}
    return described.from_json(described.COMPONENTS[kind], fields, kind)


def test_text_hidden_states_and_pooled_output(networks, golden):
    hidden = networks["text_encoder"](inputs.ids())
    assert relative_error(hidden, golden["text/hidden"]) < TOLERANCE
    assert relative_error(pool(hidden, inputs.ids(), end_token=49407), golden["text/pooled"]) < TOLERANCE


@pytest.mark.parametrize("t", inputs.TIMESTEPS)
def test_unet_eps(networks, golden, t):
    eps = networks["unet"](inputs.x(), t, golden["text/hidden"][:2])
    assert relative_error(eps, golden[f"unet/eps/{t}"]) < TOLERANCE


def test_what_leaves_each_level_of_the_unet(networks, golden):
    """In the order of execution, so that the first wrong level is the first to fail."""
    unet, seen = networks["unet"], {}
    ends = {"down/0": unet.down[2], "down/1": unet.down[5], "down/2": unet.down[7], "middle/0": unet.middle}
    ends |= {"up/0": unet.up[2], "up/1": unet.up[5], "up/2": unet.up[8]}
    hooks = [
        module.register_forward_hook(lambda module, arguments, output, name=name: seen.update({name: output}))
        for name, module in ends.items()
    ]
    unet(inputs.x(), inputs.TIMESTEPS[0], golden["text/hidden"][:2])
    for hook in hooks:
        hook.remove()
    assert {name for name in golden if name.startswith("unet/") and "eps" not in name} == {f"unet/{name}" for name in ends}
    for name in ends:
        assert relative_error(seen[name], golden[f"unet/{name}"]) < TOLERANCE, name


def test_autoencoder_moments_and_decode(networks, golden):
    posterior = networks["autoencoder"].encode(inputs.images())
    assert relative_error(posterior.mean, golden["autoencoder/mean"]) < TOLERANCE
    assert relative_error(posterior.log_variance, golden["autoencoder/log_variance"]) < TOLERANCE
    assert relative_error(networks["autoencoder"].decode(inputs.latents()), golden["autoencoder/decoded"]) < TOLERANCE


def test_image_embedding(networks, golden):
    assert relative_error(networks["safety"].image_encoder(inputs.pixels()), golden["image/embedding"]) < TOLERANCE


def test_every_golden_tensor_is_used(golden):
    names = {"text/hidden", "text/pooled", "image/embedding", *(f"unet/eps/{t}" for t in inputs.TIMESTEPS)}
    names |= {f"autoencoder/{name}" for name in ("mean", "log_variance", "decoded")}
    assert {name for name in golden if not name.startswith(("unet/down", "unet/middle", "unet/up"))} == names


@pytest.mark.parametrize("style", ["hf", "openai"])
def test_token_ids(style):
    tokenizer = Tokenizer.clip(style=style)
    rows = json.loads((REFERENCES / "tokens.json").read_text())
    assert len(rows) > 300
    for row in rows:
        assert [token.id for token in tokenizer.tokens(row["text"])[1]] == row[style], row["text"]
