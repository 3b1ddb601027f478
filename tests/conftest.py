"""What the tests share: models filled with seeded weights, a way to measure error, and which extras are there."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.presets import preset
from tests import checkpoints, golden_inputs, seeded
from weights_convert import architecture
from weights_convert.files import write_json
from weights_convert.naming import shapes
from weights_convert.tokenizer_files import clip_vocabulary, write_vocabulary


def pytest_collection_modifyitems(items):
    """Skip what needs the peers where they are not installed, and say how to get them."""
    if all(importlib.util.find_spec(name) for name in ("diffusers", "transformers")):
        return
    skip = pytest.mark.skip(reason="needs the reference extra: pip install '.[test,reference]'")
    for item in items:
        if "reference" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _inference(request):
    """No gradients; one thread, which is quicker for tiny tensors, but where a test is marked slow; and float32 that is float32
    in a GPU's convolutions too."""
    torch.set_num_threads(os.cpu_count() if "slow" in request.keywords else 1)
    torch.backends.cudnn.allow_tf32 = False
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def tiny():
    """The tiny preset with seeded weights, float64."""
    components = ldm.build("tiny", seed=0, dtype=torch.float64)
    for module in (components.text_encoder, components.unet, components.autoencoder):
        seeded.fill(module)
    return components


@pytest.fixture(scope="session")
def vocabulary_folder(tmp_path_factory) -> Path:
    """A folder with CLIP's vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder, clip_vocabulary())
    return folder


@pytest.fixture(scope="session")
def tiny_diffusers(tmp_path_factory, vocabulary_folder) -> Path:
    """A diffusers folder of the tiny model, safety checker included, written by diffusers itself."""
    from tests import peers

    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    return peers.write_folder(folder, preset("tiny"), vocabulary_folder, safety=golden_inputs.SAFETY)


@pytest.fixture(scope="session")
def tiny_native(tmp_path_factory) -> Path:
    """The tiny model as a native folder of seeded weights, made without reading any checkpoint."""
    return write_native(tmp_path_factory.mktemp("native") / "tiny")


@pytest.fixture(scope="session")
def tiny_native_safe(tmp_path_factory) -> Path:
    """The same with a safety checker."""
    return write_native(tmp_path_factory.mktemp("native") / "safe", safety=vars(golden_inputs.SAFETY))


def write_native(folder: Path, **further: dict) -> Path:
    folder.mkdir()
    config = preset("tiny")
    stated = {kind: vars(getattr(config, kind)) for kind in checkpoints.COMPONENTS} | further
    for kind, fields in stated.items():
        module = architecture.COMPONENTS[kind](**fields)
        tensors = {name: seeded.weight(name, shape) for name, shape in shapes(module, "native").items()}
        save_file(tensors, folder / f"{kind}.safetensors")
    write_json(folder / "model.json", {"format": 1, "components": stated, "schedule": vars(config.schedule)})
    return folder
