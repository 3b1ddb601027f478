"""What is trained on: pictures with captions, either scenes that are drawn here or a folder of one's own.

Both are used alike: `len(data)`, `data.images(indices)` -> uint8 (b, 3, size, size), `data.captions(indices)` -> texts.
`batch_of` says which indices a step sees: a fresh order for every pass, and a function of the step alone.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ldm import images as pictures
from ldm.processes import Processes, generator
from ldm.scenes import captions
from ldm.scenes.render import render
from ldm.scenes.world import Scene, draw

ORDER = 1  # purposes of random draws, so that none repeats another's numbers
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`source` is "scenes", `count` of them from `seed`, or a folder of pictures with captions. `size` in pixels."""

    source: str = "scenes"
    size: int = 64
    count: int = 20_000
    seed: int = 0

    def open(self, cache: Path, processes: Processes) -> "Scenes | Folder":
        """The data; scenes are drawn once, by the first process, and kept in the folder `cache`."""
        if self.source != "scenes":
            return Folder(Path(self.source), self.size)
        return drawn(Scenes(self.seed, self.count, self.size), cache, processes)

    def open_unseen(self, count: int) -> "Scenes | Folder":
        """Data to look at in between: scenes that are not trained on; of a folder, its first pictures."""
        if self.source != "scenes":
            return Folder(Path(self.source), self.size, count)
        return Scenes(self.seed + UNSEEN, count, self.size)


UNSEEN = 1 << 20  # added to the seed of the data


def batch_of(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Indices of the batch of this step: every pass over the data in a new order; a batch may span two passes."""
    first = step * batch
    return [_order(seed, i // count, count)[i % count] for i in range(first, first + batch)]


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, turn, ORDER)).tolist()


class Scenes:
    """The first `count` scenes of the data set `seed`. Pictures are rendered anew each time; see `drawn`."""

    def __init__(self, seed: int, count: int, size: int, *, split: str = "train"):
        self.seed, self.count, self.size, self.split = seed, count, size, split
        self.file: np.ndarray | None = None

    @property
    def identity(self) -> str:
        """What names this data, and no other, in files made of it."""
        return f"scenes-{self.split}-{self.seed}-{self.count}"

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        return draw(self.seed, index, split=self.split)

    def images(self, indices: Sequence[int]) -> Tensor:
        if self.file is not None:
            return torch.from_numpy(self.file[np.asarray(indices)])
        return render([self.scene(i) for i in indices], self.size)

    def captions(self, indices: Sequence[int]) -> list[str]:
        found = []
        for i in indices:
            rng = self.words(i)
            found.append(captions.words(captions.state(self.scene(i), rng), rng))
        return found

    def words(self, index: int) -> np.random.Generator:
        """Where the choices of a scene's caption come from."""
        return np.random.default_rng((self.seed, index, len(self.split), 1))


def drawn(scenes: Scenes, cache: Path, processes: Processes) -> Scenes:
    """The scenes with their pictures in a file of the folder `cache`, rendered now unless they are there."""
    file = cache / f"{scenes.identity}-{scenes.size}.npy"
    if processes.leads:
        keep(file, scenes.count, (3, scenes.size, scenes.size), scenes.images, np.uint8)
    processes.wait()
    scenes.file = np.load(file, mmap_mode="r")
    return scenes


class Folder:
    """Pictures of a folder with their captions: `name.txt` beside `name.png`, or lines of `metadata.jsonl`
    ({"file_name": ..., "text": ...}). Each is scaled and cut to a square about its middle."""

    def __init__(self, folder: Path, size: int, most: int | None = None):
        self.folder, self.size = folder, size
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder of pictures")
        table = folder / "metadata.jsonl"
        self.items = self._from_table(table) if table.exists() else self._from_texts()
        if not self.items:
            raise ValueError(f"{folder}: holds no picture with a caption; expected name.txt beside name.png, or metadata.jsonl")
        self.items = self.items[:most]
        self._readers = ThreadPoolExecutor(8)

    @property
    def identity(self) -> str:
        """What names this data, and no other, in files made of it: a hash of names, sizes and times of change, and captions."""
        digest = hashlib.sha256()
        for path, caption in self.items:
            about = path.stat()
            digest.update(json.dumps([os.path.relpath(path, self.folder), about.st_size, about.st_mtime_ns, caption]).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.items)

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(list(self._readers.map(lambda i: self._read(self.items[i][0]), indices)))

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self.items[i][1] for i in indices]

    def _read(self, path: Path) -> Tensor:
        picture = pictures.read(path)
        square = ImageOps.fit(pictures.rgb(picture), (self.size, self.size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)

    def _from_texts(self) -> list[tuple[Path, str]]:
        found = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        texts = [(path, path.with_suffix(".txt")) for path in found]
        return [(path, text.read_text(encoding="utf-8").strip()) for path, text in texts if text.exists()]

    def _from_table(self, table: Path) -> list[tuple[Path, str]]:
        items = []
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                items.append((self.folder / row["file_name"], str(row["text"])))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{table}, line {number}: expected {{"file_name": ..., "text": ...}}') from None
            if not items[-1][0].is_file():
                raise ValueError(f"{table}, line {number}: there is no picture {items[-1][0].name}")
        return items


@torch.no_grad()
def keep(path: Path, count: int, shape: tuple[int, ...], make: Callable[[list[int]], Tensor], dtype: Any = np.float16) -> None:
    """See that the file holds make(i) for every index i below `count`, (count, *shape), as numpy's; whole or not at all."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(count, *shape))
    for start in tqdm(range(0, count, 128), desc=path.stem, unit="portion", disable=None):
        part = list(range(start, min(start + 128, count)))
        array[start : start + len(part)] = make(part).numpy().astype(dtype)
    array.flush()
    os.replace(partial, path)


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
