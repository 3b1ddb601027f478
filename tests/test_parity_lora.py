"""LoRA against diffusers and peft on the tiny model: the same file, both implementations, eps and text states."""

import pytest
import torch

import ldm
from ldm.adapters import lora
from tests import lora_files, seeded
from tests.measure import relative_error

pytestmark = pytest.mark.reference
TOLERANCE = 1e-5  # float32; rounding leaves about 1e-6
PROMPTS = ["a red cube on top of a blue sphere", ""]


@pytest.fixture(scope="module")
def ours(tiny_diffusers):
    return ldm.load(tiny_diffusers)


@pytest.fixture
def theirs(tiny_diffusers):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_diffusers, safety_checker=None)


def errors(model, peer):
    ids = model.tokenizer(PROMPTS).ids
    states, expected = model.text_encoder(ids), peer.text_encoder(ids).last_hidden_state
    x = seeded.tensor("x", 2, 4, 8, 12)
    eps, wanted = model.unet(x, 10, expected), peer.unet(x, 10, expected).sample
    return relative_error(states, expected), relative_error(eps, wanted)


SPELLINGS = {"today": lora_files.peft_style, "middle": lora_files.middle_style, "oldest": lora_files.oldest_style}


@pytest.mark.parametrize("spelling", ["kohya", *SPELLINGS])
@pytest.mark.parametrize("coefficient", [0.0, 0.5, 1.0])
def test_states_and_eps(ours, theirs, tmp_path, spelling, coefficient):
    path = tmp_path / "x.safetensors"
    if spelling == "kohya":  # the only one of them that says alpha in a tensor
        lora_files.kohya(path)
    else:
        lora_files.dotted(path, SPELLINGS[spelling])
    with torch.inference_mode(False):
        theirs.load_lora_weights(path, adapter_name="a")
        theirs.set_adapters(["a"], [coefficient])
    used = lora.read(path, ours)
    for made in (lora.attach(ours, [(used, coefficient)]), lora.merge(ours, [(used, coefficient)])):
        assert max(errors(made, theirs)) < TOLERANCE
    if coefficient:
        assert min(errors(ours, theirs)) > 1e-3


def test_two_at_once(ours, theirs, tmp_path):
    paths = [lora_files.kohya(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    with torch.inference_mode(False):
        for name, path in zip("ab", paths, strict=True):
            theirs.load_lora_weights(path, adapter_name=name)
        theirs.set_adapters(["a", "b"], [0.5, -0.8])
    made = lora.attach(ours, list(zip((lora.read(path, ours) for path in paths), (0.5, -0.8), strict=True)))
    assert max(errors(made, theirs)) < TOLERANCE


def test_what_peft_makes_of_convolutions_and_what_diffusers_saves(ours, theirs, tmp_path):
    """An adapter of peft's own on every kind of layer, saved by diffusers with its alpha in the metadata."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    targets = [
        "conv1",
        "conv2",
        "conv_shortcut",
        "conv",
        "to_q",
        "to_v",
        "to_out.0",
        "time_emb_proj",
        "proj_in",
        "proj_out",
        "conv_in",
    ]
    with torch.inference_mode(False):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        theirs.unet.add_adapter(config)
        states = get_peft_model_state_dict(theirs.unet)
        theirs.save_lora_weights(
            tmp_path,
            convert_state_dict_to_diffusers(states),
            unet_lora_adapter_metadata=config.to_dict() | {"target_modules": targets},
        )
    used = lora.read(tmp_path, ours)
    assert len(used.layers) == len(states) // 2 and not used.left
    assert max(errors(lora.attach(ours, [(used, 1.0)]), theirs)) < TOLERANCE
