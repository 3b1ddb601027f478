"""The folder of a whole CLIP, as transformers writes it: `config.json`, `model.safetensors` (or `pytorch_model.bin`), and the
vocabulary where it is not CLIP's own. It is no checkpoint of a diffusion model; pictures and prompts are measured with it.

Both towers have the names of `naming/clip.py`; beside the image tower's projection stands one of the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_convert.component import FLOATS, Component, check_none_left, is_listed, match
from weights_convert.containers import TensorFile, open_tensors
from weights_convert.detect import Found
from weights_convert.errors import CheckpointError, shown
from weights_convert.files import read_json
from weights_convert.layouts import diffusers_config
from weights_convert.layouts.diffusers_folder import weights_file
from weights_convert.layouts.single_file import POSITION_IDS
from weights_convert.tokenizer_files import Vocabulary, read_vocabulary

CONFIG, PREPARATION = "config.json", "preprocessor_config.json"
TEXT, PROJECTION = "text_model.", "text_projection.weight"
TOLERATED = ("logit_scale", TEXT + POSITION_IDS, "vision_model." + POSITION_IDS)
# transformers' own defaults, for what a config leaves out: those of ViT-B/32.
COMMON = {"num_hidden_layers": 12, "projection_dim": 512}
TEXT_DEFAULTS = {**COMMON, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408}
IMAGE_DEFAULTS = {**COMMON, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}


@dataclass(frozen=True)
class ClipFolder:
    """Both towers by kind, the text's projection (width, text width), and the words; None for CLIP's own vocabulary."""

    components: Mapping[str, Component]
    text_projection: Any
    vocabulary: Vocabulary | None


def read(path: Path) -> ClipFolder:
    """Read the CLIP in folder `path`. Raises CheckpointError, one line, where it is not a whole one."""
    config, where = read_json(path / CONFIG), path / CONFIG
    if config.get("model_type", "clip") != "clip":
        raise CheckpointError(f"{where}: model_type is {shown(config['model_type'])}; expected clip")
    width = config.get("projection_dim", COMMON["projection_dim"])
    text = diffusers_config.architecture("text_encoder", {**TEXT_DEFAULTS, **_tower(config, "text_config", where)}, where)
    stated = {**IMAGE_DEFAULTS, "patch_size": 32, **_tower(config, "vision_config", where), "projection_dim": width}
    image = diffusers_config.architecture("image_encoder", stated, where)
    _check_preparation(path / PREPARATION, image.image_size)

    file = open_tensors(weights_file(path, "auto"))
    specs = {name: spec for name, spec in file.specs.items() if not is_listed(name, (*TOLERATED, PROJECTION))}
    texts = {name.removeprefix(TEXT): spec for name, spec in specs.items() if name.startswith(TEXT)}
    images = {name: spec for name, spec in specs.items() if name.startswith(("vision_model.", "visual_projection."))}
    check_none_left(file, [name for name in specs if not name.startswith(TEXT) and name not in images])
    components = {
        "text_encoder": match(file, Found("text_encoder", "transformers", TEXT), texts, stated=text),
        "image_encoder": match(file, Found("image_encoder", "transformers", ""), images, stated=image),
    }
    return ClipFolder(components, _projection(file, (width, text.width)), read_vocabulary(path))


def _tower(config: Mapping[str, Any], name: str, where: Path) -> Mapping[str, Any]:
    """What the config says of one tower; older files say it, or some of it, under a second name, which counts more."""
    stated = [config.get(key) or {} for key in (name, f"{name}_dict")]
    for fields in stated:
        if not isinstance(fields, dict):
            raise CheckpointError(f"{where}: {name} is {shown(fields)}; expected a JSON object")
    return {**stated[0], **stated[1]}


def _check_preparation(file: Path, size: int) -> None:
    """Raise CheckpointError where the folder asks for another preparation of pictures than CLIP's own."""
    if not file.exists():
        return
    stated = read_json(file)
    usual = diffusers_config.preparation(size)
    plain = {"size": size, "crop_size": size}  # as the first versions wrote it
    for name, value in usual.items():
        found = stated.get(name, value)
        if found != value and found != plain.get(name, value):
            raise CheckpointError(f"{file}: {name} is {shown(found)}; expected {shown(value)}, as CLIP was trained")


def _projection(file: TensorFile, shape: Sequence[int]) -> Any:
    spec = file.specs.get(PROJECTION)
    if spec is None or spec.shape != tuple(shape) or spec.dtype not in FLOATS:
        found = "is missing" if spec is None else f"has shape {list(spec.shape)} and type {spec.dtype}"
        raise CheckpointError(f"{file.path}: {PROJECTION} {found}; expected {list(shape)} of floating-point numbers")
    return file.tensor(PROJECTION)
