"""What a checkpoint's components look like, in numbers. The defaults are Stable Diffusion v1.

These few numbers decide every tensor's name and shape (`naming/` enumerates them). They are what `model.json` of a native
folder holds, field by field. `heads`, `norm_groups` and `sample_size` leave no mark on any tensor's shape, so a single file
cannot tell them: there the defaults stand, and a text or image encoder has heads 64 wide, as every CLIP has.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weights_convert.errors import CheckpointError, shown


@dataclass(frozen=True, kw_only=True)
class UNet:
    """The denoiser. `level_widths` and `attention_levels` run from the finest resolution to the coarsest.

    `sample_size`, the side of the latents it was trained on, decides no tensor: only what size a picture has by default.
    """

    in_channels: int = 4
    out_channels: int = 4
    level_widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    residual_blocks: int = 2
    heads: int = 8
    context_width: int = 768
    norm_groups: int = 32
    sample_size: int = 64


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """The KL autoencoder. Each level but the last halves the resolution."""

    image_channels: int = 3
    latent_channels: int = 4
    level_widths: tuple[int, ...] = (128, 256, 512, 512)
    residual_blocks: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """CLIP's text transformer."""

    vocabulary_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """CLIP's image tower with its projection."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    projection_width: int = 768


@dataclass(frozen=True, kw_only=True)
class SafetyChecker(ImageEncoder):
    """The image tower with the concepts whose cosine similarity is bounded by a threshold each."""

    concepts: int = 17
    special_care_concepts: int = 3


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How noise was added in training. `beta_schedule` is "scaled_linear", "linear" or "cosine" (which has no start and end of
    its own); `prediction` "epsilon" or "v_prediction"."""

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    prediction: str = "epsilon"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a model is sampled with where nobody says otherwise. Large guidance spoils a small model's colours."""

    guidance_scale: float = 7.5


Architecture = UNet | Autoencoder | TextEncoder | ImageEncoder | SafetyChecker

COMPONENTS: dict[str, type] = {
    "text_encoder": TextEncoder,
    "unet": UNet,
    "autoencoder": Autoencoder,
    "image_encoder": ImageEncoder,
    "safety": SafetyChecker,
}


def to_json(architecture: Architecture | Schedule | Sampling) -> dict[str, Any]:
    """The fields as JSON takes them (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(architecture).items()}


def from_json(kind: type, fields: Any, where: str, called: Mapping[str, str] | None = None) -> Any:
    """Build `kind` from the JSON object `fields`. Unknown fields are refused.

    For an error, `where` names the file, and `called` says what the file calls our fields where it has other names.
    """
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{where}: expected a JSON object of {kind.__name__} fields, found {type(fields).__name__}")
    known, called = {f.name: f for f in dataclasses.fields(kind)}, called or {}
    for name, value in fields.items():
        if name not in known:
            raise CheckpointError(f"{where}: unknown field {shown(name)} of {kind.__name__}; known are {', '.join(known)}")
        given = f"{where}: {called.get(name, name)} is {shown(value)}"
        if not _is_like(value, known[name].default):
            raise CheckpointError(f"{given}; expected something like {known[name].default!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise CheckpointError(f"{given}; expected {' or '.join(CHOICES[name])}")
        for number, largest in _sizes(name, value):
            if number > largest:
                raise CheckpointError(f"{given}; expected at most {largest}, found {shown(number)}")
    built = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    if isinstance(built, UNet) and len(built.level_widths) != len(built.attention_levels):
        widths, attention = (called.get(name, name) for name in ("level_widths", "attention_levels"))
        raise CheckpointError(f"{where}: {len(built.level_widths)} {widths} but {len(built.attention_levels)} {attention}")
    return built


CHOICES = {"beta_schedule": ("scaled_linear", "linear", "cosine"), "prediction": ("epsilon", "v_prediction")}
LARGEST_NUMBER = 2**20
LARGEST = {
    # These multiply the number of tensors; a mistyped file must not ask for billions of them.
    "layers": 256,
    "residual_blocks": 64,
    "level_widths": 16,
    "attention_levels": 16,
    # With a variance of 1 nothing would be left of the data.
    "beta_start": 0.999,
    "beta_end": 0.999,
}


def _sizes(name: str, value: Any) -> list[tuple[float, float]]:
    """Every number that the field holds or that counts what it holds, with the largest it may be."""
    if isinstance(value, list):
        return [(len(value), LARGEST[name]), *((v, LARGEST_NUMBER) for v in value)]
    return [(value, LARGEST.get(name, LARGEST_NUMBER))] if isinstance(value, int | float) else []


def _is_like(value: Any, example: Any) -> bool:
    """Whether `value` could stand where `example` stands: the same type, and positive where it is a number."""
    if isinstance(example, tuple):
        return isinstance(value, list) and len(value) > 0 and all(_is_like(v, example[0]) for v in value)
    if isinstance(example, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    if isinstance(example, bool | str):
        return type(value) is type(example)
    return type(value) is int and value > 0
