"""The native folder: `model.json` and one `KIND.safetensors` a component, in the names that the modules of `ldm` have.

model.json                 {"format": 1, "components": {KIND: fields of architecture.py}, "schedule": fields}; and
                           "sampling": fields, where the model has a guidance scale of its own
text_encoder.safetensors   and unet, autoencoder, safety, image_encoder, as listed in model.json
vocab.json, merges.txt     only where the vocabulary is not CLIP's own
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weights_convert.architecture import COMPONENTS, Architecture, Sampling, Schedule, from_json, to_json
from weights_convert.checkpoint import Checkpoint
from weights_convert.component import is_listed, match
from weights_convert.containers import open_tensors
from weights_convert.detect import Found
from weights_convert.errors import CheckpointError, shown
from weights_convert.files import appearing_folder, read_json, write_json
from weights_convert.naming import to_foreign
from weights_convert.tokenizer_files import read_vocabulary, write_vocabulary

INDEX = "model.json"
FORMAT = 1


def read(path: Path, *, ignore: Sequence[str] = ()) -> Checkpoint:
    """Read the model in folder `path`."""
    index, where = _index(path), str(path / INDEX)
    schedule = from_json(Schedule, index.get("schedule", {}), where)
    components = {}
    for kind, architecture in architectures(path).items():
        file = open_tensors(path / f"{kind}.safetensors")
        specs = {name: spec for name, spec in file.specs.items() if not is_listed(name, ignore)}
        components[kind] = match(file, Found(kind, "native", ""), specs, stated=architecture)
    sampling = from_json(Sampling, index.get("sampling", {}), where)
    return Checkpoint(path, "native", components, schedule, read_vocabulary(path), sampling)


def architectures(path: Path) -> dict[str, Architecture]:
    """What the model in folder `path` has, by kind; each is in `KIND.safetensors`."""
    stated, where = _index(path).get("components"), str(path / INDEX)
    if not isinstance(stated, dict) or not stated or not set(stated) <= set(COMPONENTS):
        raise CheckpointError(f"{where}: components is {shown(stated)}; expected an object of {', '.join(COMPONENTS)}")
    return {kind: from_json(COMPONENTS[kind], fields, f"{where}, {kind}") for kind, fields in stated.items()}


def _index(path: Path) -> dict[str, Any]:
    index = read_json(path / INDEX)
    if index.get("format") != FORMAT:
        raise CheckpointError(f"{path / INDEX}: format is {shown(index.get('format'))}; this version reads {FORMAT}")
    return index


def write(checkpoint: Checkpoint, path: Path, dtype: str | None = None) -> list[str]:
    """Write every component. Returns what was left out: nothing."""
    from weights_convert.writing import cast, save

    with appearing_folder(path) as folder:
        for kind, component in checkpoint.components.items():
            foreign = to_foreign(component.architecture, "native", cast(component, dtype))
            save(foreign, folder / f"{kind}.safetensors", {})
        components = {kind: to_json(component.architecture) for kind, component in checkpoint.components.items()}
        index = {"format": FORMAT, "components": components, "schedule": to_json(checkpoint.schedule)}
        if checkpoint.sampling != Sampling():
            index["sampling"] = to_json(checkpoint.sampling)
        write_json(folder / INDEX, index)
        if checkpoint.vocabulary:
            write_vocabulary(folder, checkpoint.vocabulary)
    return []
