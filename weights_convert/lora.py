"""LoRA files: for some of a model's layers, two thin matrices whose product is added to the weight.

Hu et al. 2021, arXiv:2106.09685, eq. 3: W + (alpha / r) B A, with A (r, in) called down and B (out, r) called up. Convolutions
have them too (LyCORIS' LoCon, Yeh et al. 2023, arXiv:2309.14859, section 3.1): down is then a convolution as the layer's own,
or 1 x 1 with a mid one between, and up is 1 x 1. How files spell the layers is in `naming/lora.py`. Alpha is a tensor, or in
the metadata of diffusers' file, or in the adapter_config.json beside PEFT's; where it is nowhere, it is r.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights_convert.architecture import Architecture
from weights_convert.component import FLOATS
from weights_convert.containers import TensorFile, open_tensors
from weights_convert.errors import CheckpointError, shown
from weights_convert.files import appearing_file, read_json
from weights_convert.naming.lora import NAMINGS, ROLE, Layer, kohya_names, layer_shapes, plain, spellings
from weights_convert.writing import save

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("pytorch_lora_weights", "adapter_model")  # what diffusers and PEFT call the file in a folder
METADATA = "lora_adapter_metadata"  # diffusers' key in a safetensors file
OTHERS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT", "ia3_": "IA3"}
OTHERS |= {".diff": "differences of whole weights", ".lora_B.bias": "LoRA with offsets"}
MODELS = {2048: "SDXL", 1280: "SDXL", 1024: "Stable Diffusion v2", 768: "Stable Diffusion v1"}  # by the width of the text


@dataclass(frozen=True, eq=False)
class Factors:
    """down (r, in) or (r, in, k, k), up (out, r) or (out, r, 1, 1), mid (r, r, k, k) or None; `scale` is alpha / r."""

    down: "Tensor"
    up: "Tensor"
    mid: "Tensor | None"
    scale: float


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA held against a model: `layers` by kind and native path, and the names in the file that are of no layer of it."""

    name: str
    path: Path
    sha256: str
    layers: Mapping[Layer, Factors]
    left: tuple[str, ...]


@dataclass(frozen=True)
class _Alphas:
    """What a configuration says of alpha: of all layers, and of those whose name ends as a pattern says."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False  # alpha / sqrt(r): Kalajdzievski 2023, arXiv:2312.03732

    def of(self, layer: str, rank: int) -> float:
        """alpha / r."""
        found = [alpha for pattern, alpha in self.patterns.items() if re.fullmatch(rf"(?:.*\.)?{re.escape(pattern)}", layer)]
        alpha = found[0] if found else self.alpha
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.by_root else rank)


def read_lora(path: str | Path, architectures: Mapping[str, Architecture]) -> LoRA:
    """Read a file, or a folder that diffusers or PEFT wrote, for a model with these architectures, by kind.

    Raises CheckpointError, one line, where nothing in it is of this model, a layer does not fit, or its numbers are not finite.
    """
    file = open_tensors(_weights_file(Path(path).expanduser()))
    _check_kind(file)
    table = dict(spellings(architectures))
    parts: dict[Layer, dict[str, str]] = {}
    spelled: dict[Layer, str] = {}
    left = []
    for name in file.specs:
        found = ROLE.fullmatch(name)
        layer = table.get(plain(found["layer"])) if found else None
        if not found or not layer:
            left.append(name)
            continue
        role = found["kohya"] or found["diffusers"] or {"A": "down", "B": "up"}.get(found["peft"] or "", "alpha")
        if role in parts.setdefault(layer, {}):
            raise CheckpointError(f"{file.path}: {parts[layer][role]} and {name} are of the same layer; expected one of them")
        parts[layer][role] = name
        spelled[layer] = found["layer"]
    if not parts:
        raise CheckpointError(f"{file.path}: {_stranger(file)}")
    shapes = dict(layer_shapes(architectures))
    alphas = _alphas(file)
    layers = {
        layer: _factors(file, roles, shapes[layer], alphas.get(layer[0], _Alphas()), spelled[layer])
        for layer, roles in parts.items()
    }
    with file.path.open("rb") as whole:
        sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
    name = file.path.stem if file.path.stem not in WEIGHTS else file.path.resolve().parent.name
    return LoRA(name, file.path, sha256, layers, tuple(left))


def write_lora(
    path: str | Path,
    layers: Mapping[Layer, tuple["Tensor", "Tensor", float]],
    architectures: Mapping[str, Architecture],
    metadata: Mapping[str, str],
) -> None:
    """Write down, up and alpha of layers as kohya spells them, to a new `.safetensors` file that appears when it is whole.

    Factors of a layer that is a 1 x 1 convolution elsewhere, and a matrix here, are written as convolutions.
    """
    import torch

    tensors = {}
    for layer, name, shape in kohya_names(architectures):
        if layer in layers:
            down, up, alpha = layers[layer]
            ones = (1,) * (len(shape) - down.ndim)
            tensors[f"{name}.lora_down.weight"] = down.detach().cpu().reshape(*down.shape, *ones).contiguous()
            tensors[f"{name}.lora_up.weight"] = up.detach().cpu().reshape(*up.shape, *ones).contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    with appearing_file(Path(path)) as temporary:
        save(tensors, temporary, metadata)


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for stem in WEIGHTS:
        for ending in (".safetensors", ".bin"):
            if (path / f"{stem}{ending}").exists():
                return path / f"{stem}{ending}"
    raise CheckpointError(f"{path}: no LoRA here; expected {' or '.join(f'{stem}.safetensors' for stem in WEIGHTS)}")


# -- Numbers ---------------------------------------------------------------------------------------------------------------


def _alphas(file: TensorFile) -> dict[str, _Alphas]:
    """By kind, what the file's metadata or the configuration beside it say."""
    if METADATA in file.metadata:
        try:
            stated = json.loads(file.metadata[METADATA])
        except (ValueError, RecursionError):
            stated = None
        if not isinstance(stated, dict):
            raise CheckpointError(f"{file.path}: its metadata {METADATA} is no JSON object")
        kinds = {
            kind: {k.removeprefix(f"{kind}."): v for k, v in stated.items() if k.startswith(f"{kind}.")} for kind in NAMINGS
        }
        return {kind: _configured(file, fields) for kind, fields in kinds.items() if fields}
    beside = file.path.parent / "adapter_config.json"
    if file.path.stem == "adapter_model" and beside.exists():
        return dict.fromkeys(NAMINGS, _configured(file, read_json(beside)))
    return {}


def _configured(file: TensorFile, fields: Mapping[str, Any]) -> _Alphas:
    if fields.get("use_dora"):
        raise CheckpointError(f"{file.path}: is DoRA, not LoRA; it cannot be used here")
    alpha, patterns = fields.get("lora_alpha"), fields.get("alpha_pattern") or {}
    numbers = [alpha, *patterns.values()] if isinstance(patterns, dict) else [patterns]
    if not all(n is None or (isinstance(n, int | float) and abs(n) < float("inf")) for n in numbers):
        raise CheckpointError(f"{file.path}: its configuration has lora_alpha {shown(alpha)}; expected numbers")
    return _Alphas(alpha, patterns, bool(fields.get("use_rslora")))


def _factors(file: TensorFile, roles: Mapping[str, str], shape: tuple[int, ...], alphas: _Alphas, spelled: str) -> Factors:
    """The factors of one layer, whose weight has `shape`, checked and brought to its number of dimensions."""
    if not {"down", "up"} <= set(roles):
        lacking = "up" if "down" in roles else "down"
        raise CheckpointError(
            f"{file.path}: {next(iter(roles.values()))} has no {lacking} beside it; half of the pair is missing"
        )
    held = {role: _tensor(file, name) for role, name in roles.items()}
    rank, kernel = held["down"].shape[0], shape[2:]
    ones = (1,) * len(kernel)
    expected = {"down": (rank, shape[1], *(ones if "mid" in held else kernel)), "up": (shape[0], rank, *ones)}
    if "mid" in held:
        expected["mid"] = (rank, rank, *kernel)
    for role, wanted in expected.items():
        found = tuple(held[role].shape)
        if found != wanted and _squeezed(found) != _squeezed(wanted):
            raise CheckpointError(
                f"{file.path}: {roles[role]} is {list(found)}; expected {list(wanted)}{_made_for(found, wanted)}"
            )
        held[role] = held[role].reshape(wanted)
    scale = alphas.of(plain(spelled), rank)
    if "alpha" in held:
        if held["alpha"].numel() != 1:
            raise CheckpointError(f"{file.path}: {roles['alpha']} has {held['alpha'].numel()} numbers; expected one")
        scale = float(held["alpha"]) / rank
    return Factors(held["down"], held["up"], held.get("mid"), scale)


def _tensor(file: TensorFile, name: str) -> "Tensor":
    spec = file.specs[name]
    if spec.dtype not in FLOATS and not name.endswith(".alpha"):
        raise CheckpointError(f"{file.path}: {name} is of type {spec.dtype}; expected one of {', '.join(FLOATS)}")
    tensor = file.tensor(name)
    if not tensor.isfinite().all() or 0 in spec.shape:
        raise CheckpointError(f"{file.path}: {name} holds NaN, infinite values or nothing; the file is damaged")
    return tensor


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1 x 1 convolution is a matrix."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _made_for(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    model = MODELS.get(found[1]) if len(found) > 1 and found[1] != wanted[1] else None
    return f"; it was made for another model, as {model}" if model else "; it was made for another model, or is damaged"


# -- What is no LoRA of this model -----------------------------------------------------------------------------------------


def _check_kind(file: TensorFile) -> None:
    for name in file.specs:
        for part, kind in OTHERS.items():
            if part in name:
                raise CheckpointError(f"{file.path}: holds {kind} ({name}), which cannot be used here; expected LoRA")


def _stranger(file: TensorFile) -> str:
    names = list(file.specs)
    if not names:
        return "holds no tensors; expected a LoRA"
    if any(name.startswith(("lora_te2_", "text_encoder_2.")) or "transformer_blocks_1_" in name for name in names):
        return "a LoRA of SDXL; expected one of Stable Diffusion v1"
    if not any("lora" in name for name in names):
        return f"no LoRA; its tensors are named {', '.join(names[:3])}"
    return f"no layer of this model is in it; its tensors are named {', '.join(names[:3])}"
