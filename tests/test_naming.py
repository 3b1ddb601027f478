"""The naming tables: every tensor of the published checkpoints, one to one, there and back bit for bit."""

import pytest
import torch

from tests import seeded
from tests.checkpoints import FULL, NAMINGS, SMALL, manifest, same
from weights_convert.layouts import schedule_buffers, single_file
from weights_convert.naming import bijection, shapes, to_foreign, to_native


def test_every_tensor_of_the_compvis_manifest_is_mapped_and_no_other():
    expected = manifest("sd_v1_4_compvis.tsv")
    found = {
        single_file.PREFIXES[kind] + name: shape
        for kind, naming in single_file.NAMINGS.items()
        for name, shape in shapes(FULL[kind], naming).items()
    }
    left = set(expected) - set(found)
    assert {name: expected[name] for name in found} == found
    assert left == {*schedule_buffers.NAMES, "cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert left <= set(single_file.TOLERATED)


def test_every_tensor_of_the_diffusers_manifest_is_mapped_and_no_other():
    expected = manifest("sd_v1_4_diffusers.tsv")
    namings = (("unet", "unet/", "diffusers"), ("autoencoder", "vae/", "diffusers-old"))
    namings += (("text_encoder", "text_encoder/text_model.", "transformers"), ("safety", "safety_checker/", "transformers"))
    found = {prefix + name: shape for kind, prefix, naming in namings for name, shape in shapes(FULL[kind], naming).items()}
    left = set(expected) - set(found)
    assert {name: expected[name] for name in found} == found
    assert all(name.endswith(".embeddings.position_ids") for name in left) and len(left) == 2


@pytest.mark.parametrize(("kind", "naming"), NAMINGS)
def test_a_naming_is_a_bijection(kind, naming):
    for one in (SMALL[kind], FULL[kind]):
        entries = bijection(one, naming)
        assert len({entry.native for entry in entries}) == len(entries)
        assert len({(entry.foreign, entry.arrangement) for entry in entries}) == len(entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "naming"), NAMINGS)
def test_a_naming_and_back_is_bit_exact(kind, naming, dtype):
    one = SMALL[kind]
    native = {name: seeded.weight(name, shape).to(dtype) for name, shape in shapes(one, "native").items()}
    foreign = to_foreign(one, naming, native)
    assert {name: tuple(tensor.shape) for name, tensor in foreign.items()} == shapes(one, naming)
    back = {entry.native: to_native(entry, foreign[entry.foreign]) for entry in bijection(one, naming)}
    assert same(back, native)


def test_ema_names_are_unique_without_their_dots():
    names = shapes(FULL["unet"], "compvis")
    assert len({single_file.ema_name(name) for name in names}) == len(names) == 686
