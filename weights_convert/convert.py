"""Reading and writing whole checkpoints of any layout: `read` finds out what a path is, `write` makes another of it."""

import os
from collections.abc import Sequence
from pathlib import Path

from weights_convert.checkpoint import Checkpoint
from weights_convert.errors import CheckpointError
from weights_convert.layouts import diffusers_folder, native_folder, single_file

LAYOUTS = {"native": native_folder, "compvis": single_file, "diffusers": diffusers_folder}


def read(source: str | Path, *, weights: str = "auto", variant: str = "auto", ignore: Sequence[str] = ()) -> Checkpoint:
    """Open the checkpoint at `source`: a native or diffusers folder, or a single file. No tensor is read yet.

    weights: "ema" or "raw" for a single file that holds both; "auto" takes EMA where there is.
    variant: "fp16" for a diffusers folder's half-precision files, "" for the full ones; "auto" takes the full ones if there.
    ignore: names of unexpected tensors to read the file without; a last "*" stands for any ending.
    Raises CheckpointError, one line, where the path is not a whole Stable Diffusion v1 checkpoint.
    """
    path, ignore = Path(source), (ignore,) if isinstance(ignore, str) else tuple(ignore)
    if "*" in ignore:
        raise CheckpointError(f"{path}: ignore='*' would ignore every tensor; name those to leave out")
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: there is no such file or folder")
    try:
        return _read(path, weights, variant, ignore)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None


def _read(path: Path, weights: str, variant: str, ignore: Sequence[str]) -> Checkpoint:
    """`read`, by layout."""
    if path.is_file():
        if variant != "auto":
            raise CheckpointError(f"{path}: variant={variant!r} chooses among a diffusers folder's files; this is one file")
        return single_file.read(path, weights=weights, ignore=ignore)
    if weights != "auto":
        raise CheckpointError(f"{path}: weights={weights!r} chooses within a single file; this is a folder")
    if (path / native_folder.INDEX).exists():
        if variant != "auto":
            raise CheckpointError(
                f"{path}: variant={variant!r} chooses among a diffusers folder's files; this is a native folder"
            )
        return native_folder.read(path, ignore=ignore)
    return diffusers_folder.read(path, variant=variant, ignore=ignore)


def write(checkpoint: Checkpoint, path: str | Path, to: str, dtype: str | None = None) -> list[str]:
    """Write `checkpoint` to `path` in layout `to`, weights in `dtype` (None: as they are).

    The result appears under its name only when whole. Returns what the layout has no place for, in words.
    """
    if to not in LAYOUTS:
        raise CheckpointError(f"{path}: layout {to!r}; expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[to].write(checkpoint, Path(path), dtype)
