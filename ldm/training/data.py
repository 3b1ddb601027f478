"""What is trained on: pictures with captions, either scenes that are drawn here, or one's own in a folder or in shards.

All are used alike: `len(data)`, `data.images(indices)` -> uint8 (b, 3, size, size), `data.captions(indices)` -> texts, and
`data.batch(seed, step, batch)`, the indices that a step sees: a fresh order for every pass, and a function of the step alone.
`data.identity` names the data in files made of it, `data.listing` the samples that a resumed run must find again.
`data.encoding` is None, but where shards hold what frozen networks made of the pictures in their stead (`ldm encode`).
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.processes import Processes
from ldm.scenes import captions
from ldm.scenes.render import render
from ldm.scenes.world import Scene, draw
from ldm.training.filters import FilterConfig
from ldm.training.folder import Folder
from ldm.training.keeping import ALONE, keep
from ldm.training.order import batch_of
from ldm.training.shard_index import shards_of
from ldm.training.shards import WINDOW, Shards

UNSEEN = 1 << 20  # added to the seed of the data


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`source`, in pictures of `size` pixels, is

    - "scenes": `count` of them from `seed`,
    - a folder of pictures with captions,
    - or shards: a folder that holds .tar files, a pattern "a/{000..099}.tar", or a .txt or .json file that lists them. `window`
      of them are shuffled together.

    limit: at most so many samples, 0 for all. filter: which of one's own are kept.
    """

    source: str = "scenes"
    size: int = 64
    count: int = 20_000
    seed: int = 0
    limit: int = 0
    window: int = WINDOW
    filter: FilterConfig = field(default_factory=FilterConfig)

    def open(self, cache: Path, processes: Processes, *, quiet: bool = False) -> "Scenes | Folder | Shards":
        """The data. What needs time is done by all processes together, once, and kept in the folder `cache`.

        What was dropped of one's own is in its `drops-*.json`, and said unless quiet. Raises ValueError, one line, for what
        cannot be used.
        """
        self.filter.check()
        if self.source == "scenes":
            return drawn(Scenes(self.seed, min(self.count, self.limit or self.count), self.size), cache, processes)
        data = self._own(self.limit, cache, processes)
        if processes.leads:
            report(data, cache / f"drops-{data.identity}.json", quiet=quiet)
        return data

    def open_unseen(self, count: int) -> "Scenes | Folder | Shards":
        """Data to look at in between: scenes that are not trained on; of one's own, the first."""
        if self.source == "scenes":
            return Scenes(self.seed + UNSEEN, count, self.size)
        return self._own(min(count, self.limit or count), None, ALONE)

    def _own(self, limit: int, cache: Path | None, processes: Processes) -> "Folder | Shards":
        shards = shards_of(self.source)
        if shards is None:
            return Folder(Path(self.source), self.size, limit or None, self.filter)
        how = {"filters": self.filter, "limit": limit, "window": self.window}
        return Shards(shards, self.size, **how, cache=cache, processes=processes)


def report(data: Folder | Shards, file: Path, *, quiet: bool) -> None:
    """Write how many samples were kept and dropped, and why; a line of it too where some were."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(data.drops.to_json(), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
    if not quiet and (data.drops.counts or data.drops.broken):
        tqdm.write(data.drops.summary(), file=sys.stderr)


class Scenes:
    """The first `count` scenes of the data set `seed`. Pictures are rendered anew each time; see `drawn`."""

    encoding = None

    def __init__(self, seed: int, count: int, size: int, *, split: str = "train"):
        self.seed, self.count, self.size, self.split = seed, count, size, split
        self.file: np.ndarray | None = None

    @property
    def identity(self) -> str:
        """What names this data, and no other, in files made of it."""
        return f"scenes-{self.split}-{self.seed}-{self.count}"

    @property
    def listing(self) -> str:
        """What a run that is resumed must find again: which samples there are, in which order."""
        return self.identity

    def __len__(self) -> int:
        return self.count

    def batch(self, seed: int, step: int, batch: int) -> list[int]:
        """Indices of the batch of this step; see `order.py`."""
        return batch_of(seed, step, batch, len(self))

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


Data = Scenes | Folder | Shards


def drawn(scenes: Scenes, cache: Path, processes: Processes) -> Scenes:
    """The scenes with their pictures in a file of the folder `cache`, rendered now unless they are there."""
    file = cache / f"{scenes.identity}-{scenes.size}.npy"
    keep(file, scenes.count, (3, scenes.size, scenes.size), scenes.images, np.uint8, processes)
    scenes.file = np.load(file, mmap_mode="r")
    return scenes


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
