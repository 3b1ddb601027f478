"""Arrays that are made once, by all processes together, and kept in a file.

    NAME.npy             the array, whole
    NAME.npy.partial     the same while it is made: every process writes the portions that are its own into their places
    NAME.npy.N.done      which portions process N has written; a killed preparation goes on from there

Portions are of a fixed size, so the values depend neither on the number of processes nor on where a preparation was stopped.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.processes import Processes

PORTION = 128  # indices that are made together
ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))


@torch.no_grad()
def keep(
    path: Path,
    count: int,
    shape: tuple[int, ...],
    make: Callable[[list[int]], Tensor],
    dtype: Any = np.float16,
    processes: Processes = ALONE,
) -> None:
    """See that the file holds make(i) for every index i below `count`, (count, *shape), as numpy's; whole or not at all.

    All processes call it alike, and it returns when the file is there.
    """
    if path.exists():
        return
    partial, kind = path.with_name(path.name + ".partial"), [PORTION, count, *shape, np.dtype(dtype).str]
    if processes.leads:
        _begin(path, partial, kind)
    processes.wait()
    done = _done(path, kind)
    processes.wait()  # until all have read what each is about to write on
    left = [start for start in range(0, count, PORTION) if start not in done]
    mine = left[processes.rank :: processes.count]
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize  # of what an index has, in bytes
    head = partial.stat().st_size - count * size
    with open(partial, "r+b") as file, open(_journal(path, processes.rank), "a", encoding="utf-8") as journal:
        if not journal.tell():
            journal.write(json.dumps(kind) + "\n")
        for start in tqdm(mine, desc=path.stem, unit="portion", disable=None if processes.leads else True):
            part = make(list(range(start, min(start + PORTION, count)))).numpy().astype(dtype)
            file.seek(head + start * size)
            file.write(part.tobytes())
            file.flush()
            os.fsync(file.fileno())  # before the journal says so
            journal.write(f"{start}\n")
            journal.flush()
    processes.wait()
    if processes.leads:
        os.replace(partial, path)
        for journal in _journals(path):
            journal.unlink()
    processes.wait()


def _begin(path: Path, partial: Path, kind: list[Any]) -> None:
    """A file of the right size, with nothing in it, unless one of just this kind was begun; and one journal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _, count, *shape, dtype = kind
    done = _done(path, kind) if _is_of(partial, kind) else set()
    if not done:
        partial.unlink(missing_ok=True)
    gathered = path.with_name(path.name + ".journal")
    gathered.write_text("".join(f"{line}\n" for line in (json.dumps(kind), *sorted(done))), encoding="utf-8")
    os.replace(gathered, _journal(path, 0))  # in which every line is whole
    for journal in _journals(path):
        if journal != _journal(path, 0):
            journal.unlink()
    if not done:
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.dtype(dtype), shape=(count, *shape))


def _is_of(partial: Path, kind: list[Any]) -> bool:
    _, count, *shape, dtype = kind
    try:
        array = np.load(partial, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return array.shape == (count, *shape) and array.dtype.str == dtype


def _done(path: Path, kind: list[Any]) -> set[int]:
    """Where the portions start that are written, as all journals of this kind say. A line that was cut short says nothing."""
    found = set()
    for journal in _journals(path):
        head, *lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        if head == json.dumps(kind) + "\n":
            found |= {int(line) for line in lines if line.endswith("\n")}
    return found


def _journal(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.{rank}.done")


def _journals(path: Path) -> list[Path]:
    start = path.name + "."
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(start) and p.name.endswith(".done"))
