"""Features of many pictures, or prompts, computed by all processes, a portion each, and kept in files.

    FOLDER/00000.npy    rows 0 to 31, (32, width) float32; and so on

Portions do not depend on the number of processes, so neither do the features, to the last bit where the arithmetic is the same.
What is there is not computed again.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm import images
from ldm.evaluation import frechet
from ldm.evaluation.features import ClipInstrument, Instrument
from ldm.evaluation.frechet import Statistics
from ldm.evaluation.whole_file import write_whole
from ldm.pipelines.agreement import Agreement

PORTION = 32

Tell = Callable[[str, int, int], None]  # of a stage: its name, portions done and portions to do


def of_pictures(
    instrument: Instrument, paths: Sequence[Path], folder: Path, agreement: Agreement, tell: Tell, name: str
) -> Tensor:
    """(n, width) in the first process, nothing (0, width) in the others. `folder` must be of these pictures and no others."""

    def compute(rows: range) -> Tensor:
        return instrument.pictures([images.read(paths[i]) for i in rows])

    return _shared(len(paths), instrument.width, folder / instrument.fingerprint, compute, agreement, tell, name)


def of_prompts(clip: ClipInstrument, prompts: Sequence[str], folder: Path, agreement: Agreement, tell: Tell) -> Tensor:
    """The same of prompts; the folder is theirs by their hash."""
    mark = sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]

    def compute(rows: range) -> Tensor:
        return clip.texts([prompts[i] for i in rows])

    place = folder / f"prompts-{mark}" / clip.fingerprint
    return _shared(len(prompts), clip.width, place, compute, agreement, tell, "prompts")


def of_reference(
    instrument: Instrument, reference: Path, paths: Sequence[Path], cache: Path, agreement: Agreement, tell: Tell
) -> Statistics | None:
    """Statistics of the pictures at `paths`, below `reference`, in the first process. They are kept in `cache`, as of files of
    these names, sizes and times of change."""
    mark = agreement.first(lambda: _mark(instrument, reference, paths))
    file = cache / f"reference-{mark}.safetensors"
    if not agreement.first(file.exists):
        features = of_pictures(instrument, paths, cache / f"reference-{mark}", agreement, tell, "reference")
        agreement.first(lambda: frechet.write(frechet.statistics(features, instrument), file))
        agreement.first(lambda: _remove(cache / f"reference-{mark}" / instrument.fingerprint))
    return agreement.each(lambda: frechet.read(file) if agreement.processes.leads else None)


def pictures_below(folder: Path) -> list[Path]:
    """All pictures of a folder and the folders in it, by name. Raises ValueError where there are not two."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; expected one with pictures to compare with")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES and path.is_file())
    if len(found) < frechet.FEWEST:
        kinds = ", ".join(images.SUFFIXES)
        raise ValueError(f"{folder}: holds {len(found)} pictures ({kinds}); expected {frechet.FEWEST} or more")
    return found


def _shared(
    count: int,
    width: int,
    folder: Path,
    compute: Callable[[range], Tensor],
    agreement: Agreement,
    tell: Tell,
    name: str,
) -> Tensor:
    """All rows in the first process, none in the others."""
    portions = [range(start, min(start + PORTION, count)) for start in range(0, count, PORTION)]
    files = [folder / f"{k:05}.npy" for k in range(len(portions))]
    left = agreement.first(lambda: _left(folder, files, portions, width))
    mine = agreement.share(left)
    for done, k in enumerate(mine):
        tell(name, done, len(mine))
        buffer = io.BytesIO()
        np.save(buffer, compute(portions[k]).numpy())
        write_whole(files[k], buffer.getvalue())
    agreement.each(lambda: None)  # when all of them are there

    def gathered() -> Tensor:
        there = zip(files, portions, strict=True) if agreement.processes.leads else ()
        return torch.cat([torch.empty(0, width), *(torch.from_numpy(_read(file, len(rows), width)) for file, rows in there)])

    return agreement.each(gathered)


def _left(folder: Path, files: list[Path], portions: list[range], width: int) -> list[int]:
    """Which portions are to be computed. What killed processes left half written is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(folder))
    for name in there:
        if name.startswith(".") and name.endswith(".partial"):
            (folder / name).unlink()
    return [k for k, rows in enumerate(portions) if files[k].name not in there or not _is_sound(files[k], len(rows), width)]


def _is_sound(file: Path, count: int, width: int) -> bool:
    try:
        _read(file, count, width)
        return True
    except ValueError:
        return False


def _read(file: Path, count: int, width: int) -> np.ndarray:
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())[:80]})") from None
    if rows.shape != (count, width) or rows.dtype != np.float32:
        raise ValueError(f"{file}: holds {rows.dtype} {list(rows.shape)}; expected float32 {[count, width]}")
    return rows


def _mark(instrument: Instrument, reference: Path, paths: Sequence[Path]) -> str:
    facts = [(path.relative_to(reference).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return sha256(json.dumps([instrument.fingerprint, facts]).encode()).hexdigest()[:16]


def _remove(folder: Path) -> None:
    """Away with portions that have come together in another file, and with their folders."""
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.parent.rmdir()
