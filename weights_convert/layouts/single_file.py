"""The single file: CompVis's `.ckpt`, the `.safetensors` of the same names, and files that hold one component alone.

CompVis saved its whole training module, so beside the three networks a file may hold schedule buffers, a second set of UNet
weights averaged over training (`model_ema.*`, names without dots) and whatever else the module had. What may be left over
is listed in `TOLERATED`; anything else is refused unless the caller names it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weights_convert.architecture import COMPONENTS, Architecture, Schedule, from_json, to_json
from weights_convert.checkpoint import Checkpoint, sampling_in_words
from weights_convert.component import Component, check_none_left, is_listed, match
from weights_convert.containers import Spec, TensorFile, open_tensors
from weights_convert.detect import Found, components, other_model
from weights_convert.errors import CheckpointError, shown
from weights_convert.files import appearing_file, parse_json
from weights_convert.layouts import schedule_buffers
from weights_convert.naming import shapes, to_foreign

ARCHITECTURE_KEY = "ldm.architecture"  # where our own files keep what shapes cannot tell
PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
NAMINGS = {"unet": "compvis", "autoencoder": "compvis", "text_encoder": "transformers"}
EMA_PREFIX = "model_ema.diffusion_model"
POSITION_IDS = "embeddings.position_ids"

# Names that carry no weights of ours. A last "*" stands for any ending.
TOLERATED = (
    *schedule_buffers.NAMES,
    *("logvar", "scale_factor", "denoiser.sigmas", "denoiser.log_sigmas"),
    *("model_ema.decay", "model_ema.num_updates"),
    *("first_stage_model.loss.*", "loss.*", "first_stage_model.model_ema.*"),  # the autoencoder's own training
    *("logit_scale", "text_projection", "text_projection.weight", "input_resolution", "context_length", "vocab_size"),
    *("cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight"),
    *(
        f"{prefix}{POSITION_IDS}"
        for prefix in (
            *("", "text_model.", "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."),
            *("vision_model.", "vision_model.vision_model."),
        )
    ),
)


# -- Reading -----------------------------------------------------------------------------------------------------------


def read(path: Path, *, weights: str = "auto", ignore: Sequence[str] = ()) -> Checkpoint:
    """Read every component of the file at `path`. `weights`: "ema", "raw", or "auto" for EMA where the file has it."""
    file = open_tensors(path)
    model = other_model(file.specs)
    if model:
        raise CheckpointError(f"{path}: this is {model}; expected a Stable Diffusion v1 checkpoint")
    found = sorted(components(file.specs), key=lambda f: -len(f.prefix))
    if not found:
        raise CheckpointError(f"{path}: no Stable Diffusion v1 component among its {len(file.specs)} tensors ({_first(file)})")
    stated, schedule = _stated(file)
    read_components, claimed = {}, set()
    for one in found:
        specs = {
            name.removeprefix(one.prefix): spec
            for name, spec in file.specs.items()
            if name.startswith(one.prefix) and name not in claimed and not _is_tolerated(name, ignore) and not _is_ema(name)
        }
        claimed.update(one.prefix + name for name in specs)
        read_components[one.kind] = match(file, one, specs, stated=stated.get(one.kind))
    check_none_left(file, [n for n in file.specs if n not in claimed and not _is_tolerated(n, ignore) and not _is_ema(n)])
    if "unet" in read_components:
        read_components["unet"] = _choose_weights(file, read_components["unet"], weights, ignore)
    elif weights != "auto":
        raise CheckpointError(f"{path}: {weights} weights asked for, but the file has no UNet")
    return Checkpoint(path, "compvis", read_components, schedule or schedule_buffers.infer(file))


def _first(file: TensorFile) -> str:
    return "such as " + ", ".join(name[:80] for name in list(file.specs)[:3])


def _is_ema(name: str) -> bool:
    return name.startswith(EMA_PREFIX)


def _is_tolerated(name: str, ignore: Sequence[str]) -> bool:
    return is_listed(name, (*TOLERATED, *ignore))


def _stated(file: TensorFile) -> tuple[dict[str, Architecture], Schedule | None]:
    """What a file written by `write` says of itself."""
    if ARCHITECTURE_KEY not in file.metadata:
        return {}, None
    where = f"{file.path}, metadata {ARCHITECTURE_KEY}"
    try:
        fields = parse_json(file.metadata[ARCHITECTURE_KEY], where)
        schedule = from_json(Schedule, fields.pop("schedule"), where)
        return {kind: from_json(COMPONENTS[kind], value, f"{where}, {kind}") for kind, value in fields.items()}, schedule
    except KeyError as error:
        expected = ", ".join(("schedule", *COMPONENTS))
        raise CheckpointError(f"{where}: {shown(error.args[0])} is missing or unknown; expected {expected}") from None


def _choose_weights(file: TensorFile, raw: Component, weights: str, ignore: Sequence[str]) -> Component:
    """The UNet from the averaged or from the raw weights. Both must be whole where both are there."""
    specs = {name: spec for name, spec in file.specs.items() if _is_ema(name) and not _is_tolerated(name, ignore)}
    if weights not in ("auto", "ema", "raw"):
        raise CheckpointError(f"{file.path}: weights={weights!r}; expected 'auto', 'ema' or 'raw'")
    if weights == "raw" or (weights == "auto" and not specs):
        return raw
    if not specs:
        raise CheckpointError(f"{file.path}: has no EMA weights; expected model_ema.*; ask for weights='raw' or 'auto'")
    dotless = {ema_name(name): name for name in shapes(raw.architecture, raw.naming)}
    named: dict[str, Spec] = {dotless.get(name, name): spec for name, spec in specs.items()}
    found = Found("unet", raw.naming, "")
    return match(file, found, named, stated=raw.architecture, full_name=_ema_name_once, note=" (EMA weights)")


def _ema_name_once(name: str) -> str:
    """The average's name, of a UNet tensor or of one that no UNet has."""
    return name if _is_ema(name) else ema_name(name)


def ema_name(name: str) -> str:
    """What CompVis's LitEma calls the average of a UNet tensor: its dots are gone, since buffers may have none."""
    return EMA_PREFIX + name.replace(".", "")


# -- Writing -----------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, path: Path, dtype: str | None = None) -> list[str]:
    """Write the three networks and the schedule's buffers to `path`, `.safetensors` or `.ckpt`. Returns what was left out."""
    from weights_convert.writing import cast, save

    if path.suffix not in (".safetensors", ".ckpt"):
        raise CheckpointError(f"{path}: a single file ends in .safetensors or .ckpt; found {path.suffix or 'no suffix'!r}")
    missing = [kind for kind in PREFIXES if kind not in checkpoint.components]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: has no {' and no '.join(missing)}; a single file holds all of {list(PREFIXES)}"
        )
    with appearing_file(path) as temporary:
        tensors: dict[str, Any] = schedule_buffers.tensors(checkpoint.schedule)
        for kind, prefix in PREFIXES.items():
            component = checkpoint.components[kind]
            foreign = to_foreign(component.architecture, NAMINGS[kind], cast(component, dtype))
            tensors |= {prefix + name: tensor for name, tensor in foreign.items()}
        tensors[PREFIXES["text_encoder"] + POSITION_IDS] = _position_ids(checkpoint)
        save(tensors, temporary, _description(checkpoint))
    left = [f"the {kind}" for kind in checkpoint.components if kind not in PREFIXES]
    left += (["the vocabulary"] if checkpoint.vocabulary else []) + sampling_in_words(checkpoint)
    return [f"{what} (a single file has no place for it)" for what in left]


def _position_ids(checkpoint: Checkpoint) -> Any:
    import torch

    return torch.arange(checkpoint.components["text_encoder"].architecture.context_length)[None]


def _description(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Nothing for SD v1 itself; for any other shape, what names and shapes do not tell."""
    architectures = {kind: checkpoint.components[kind].architecture for kind in PREFIXES}
    usual = all(architecture == COMPONENTS[kind]() for kind, architecture in architectures.items())
    if usual and checkpoint.schedule == Schedule():
        return {}
    fields = {kind: to_json(architecture) for kind, architecture in architectures.items()}
    return {ARCHITECTURE_KEY: json.dumps({**fields, "schedule": to_json(checkpoint.schedule)})}
