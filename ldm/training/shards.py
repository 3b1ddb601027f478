"""Data in shards, of any size: see `data.py` for what data have in common, `shard_index.py` for what a shard is.

Before the first step every shard is walked through once, each by one of the processes, to know how many samples it has and
where; what was found is kept, so that it is not done again. After that, samples are read from the shards by their place. Open
at a time are at most twice as many shards as are shuffled together.
"""

import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm import images as pictures
from ldm.processes import Processes
from ldm.training import shard_index
from ldm.training.filters import Drops, FilterConfig
from ldm.training.folder import READERS, attempt, square
from ldm.training.keeping import ALONE
from ldm.training.order import ShardOrder
from ldm.training.shard_index import METADATA, MOMENTS, PICTURE, STATES, TEXT, Encoding, Index

WINDOW = 4  # shards that are shuffled together


class Shards:
    """The samples of shards, pictures scaled and cut to a square; or, where `encoding` is not None, what frozen networks made
    of them, and no pictures.

    limit: how many samples are kept at most, 0 for all; of the shards beyond it nothing is read. cache: the folder of what is
    kept; without one, it is found anew. `drops` tells of the samples that are not kept.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        *,
        filters: FilterConfig | None = None,
        limit: int = 0,
        window: int = WINDOW,
        cache: Path | None = None,
        processes: Processes = ALONE,
    ):
        self.paths, self.size, self.filters, self.limit = list(paths), size, filters or FilterConfig(), limit
        self.folder = cache and cache / "shards"
        self.identity = self._identity()
        self.most_open = 2 * window
        self._open = lru_cache(maxsize=self.most_open)(self._opened)
        self._readers = ThreadPoolExecutor(READERS)
        counts = self._surveyed(processes)
        where = f"{self.paths[0]} and {len(self.paths) - 1} further" if len(self.paths) > 1 else f"{self.paths[0]}"
        if not sum(counts):
            raise ValueError(f"{where}: no sample is left; {self.drops.summary()}")
        if self.encoding and self.encoding.size != size:
            raise ValueError(f"{where}: encoded at {self.encoding.size} pixels; expected data.size {size}, or set it to that")
        self.where, self.order = where, ShardOrder(counts, window)

    @property
    def listing(self) -> str:
        """What a run that is resumed must find again: how many samples there are, and a hash of which shard has how many."""
        about = json.dumps([[path.name for path in self.paths], [int(count) for count in self.order.counts]])
        return f"{len(self)} samples, {hashlib.sha256(about.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return self.order.total

    def batch(self, seed: int, step: int, batch: int) -> list[int]:
        """Indices of the batch of this step; see `order.py`."""
        return self.order.batch(seed, step, batch)

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(self._each(indices, self._picture))

    def try_images(self, indices: Sequence[int]) -> list[Tensor | ValueError]:
        """Each picture (3, size, size), or why it cannot be read."""
        return self._each(indices, lambda shard, row: attempt(lambda: self._picture(shard, row)))

    def captions(self, indices: Sequence[int]) -> list[str]:
        return self._each(indices, lambda shard, row: shard.read(row, TEXT).decode("utf-8", errors="replace").strip())

    def moments(self, indices: Sequence[int]) -> Tensor:
        """Of encoded shards, mean and log variance of each posterior: (b, 2, c, h, w), float16."""
        return torch.stack(self._each(indices, lambda shard, row: shard.array(row, MOMENTS)))

    def states(self, indices: Sequence[int]) -> Tensor:
        """Of encoded shards, the text encoder's states of each caption: (b, n, d), float16."""
        return torch.stack(self._each(indices, lambda shard, row: shard.array(row, STATES)))

    def empty(self) -> Tensor:
        """Of encoded shards, the states of the empty text: (n, d)."""
        first = next(i for i, count in enumerate(self.order.counts) if count)
        shard = self._open(first)
        return _array(shard.read_at(shard.index.empty), str(shard.path))

    def name(self, index: int) -> str:
        """Of a sample, as in "00003.tar: 000030012"."""
        (found,) = self._each([index], lambda shard, row: f"{shard.path.name}: {shard.index.keys[row]}")
        return found

    def metadata(self, index: int) -> dict[str, Any]:
        """What `key.json` says; nothing where there is none."""
        (text,) = self._each([index], lambda shard, row: shard.read(row, METADATA))
        return shard_index.metadata_of(text)

    def _picture(self, shard: "_Shard", row: int) -> Tensor:
        if self.encoding:
            raise ValueError(f"{shard.path}: holds latents and no pictures; autoencoders and text encoders need those")
        data = shard.read(row, PICTURE)
        return square(pictures.read(io.BytesIO(data), name=f"{shard.path}: {shard.index.keys[row]}"), self.size)

    def _each(self, indices: Sequence[int], do: Callable[["_Shard", int], Any]) -> list[Any]:
        """do(shard, row in it) of every index, in their order; as many shards at a time as may be open."""
        places: dict[int, list[tuple[int, int]]] = {}
        for place, i in enumerate(indices):
            if not 0 <= i < len(self):
                raise IndexError(f"sample {i} of {len(self)}")
            shard = int(np.searchsorted(self.order.starts, i, side="right")) - 1
            places.setdefault(shard, []).append((place, i - int(self.order.starts[shard])))
        found, numbers = [None] * len(indices), sorted(places)
        for at in range(0, len(numbers), self.most_open):
            chosen = [(self._open(n), *where) for n in numbers[at : at + self.most_open] for where in places[n]]
            for (_, place, _), made in zip(chosen, self._readers.map(lambda c: do(c[0], c[2]), chosen), strict=True):
                found[place] = made
        return found

    def _opened(self, number: int) -> "_Shard":
        return _Shard(self.paths[number], self._index(number), open(self.paths[number], "rb"), threading.Lock())

    # -- What is in which shard ---------------------------------------------------------------------------------------------

    def _identity(self) -> str:
        """What names this data, and no other, in files made of it: a hash of the shards' names, sizes and times of change, and
        of what is kept of them."""
        about = [(path.name, stat.st_size, stat.st_mtime_ns) for path in self.paths for stat in [path.stat()]]
        key = json.dumps([about, asdict(self.filters), self.limit])
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def _index(self, number: int) -> Index:
        """Of one shard, from its file; made now if there is none."""
        path = self.paths[number]
        kept = self.folder and self.folder / shard_index.name_of_index(path, self.filters)
        if kept and kept.exists():
            return shard_index.load(kept)
        made = shard_index.read_index(path, self.filters)
        if kept:
            made.save(kept)
        return made

    def _surveyed(self, processes: Processes) -> list[int]:
        """How many samples of each shard are kept; sets `drops` and `encoding`. Shards beyond the limit are left out."""
        kept = self.folder and self.folder / f"survey-{self.identity}.json"
        if kept and kept.exists():
            found = json.loads(kept.read_text(encoding="utf-8"))
            self.drops = Drops.from_json(found["drops"])
            self.encoding = Encoding(**found["encoding"]) if found["encoding"] else None
            return found["counts"]
        counts, self.drops, encodings = self._survey(processes)
        if len(encodings) > 1:
            names = " and ".join(str(path) for path in list(encodings.values())[:2])
            raise ValueError(f"{names} were not encoded alike; use shards of one `ldm encode` at a time")
        self.encoding = next(iter(encodings), None)
        if kept and processes.leads:
            about = {"counts": counts, "drops": self.drops.to_json()}
            about["encoding"] = asdict(self.encoding) if self.encoding else None
            partial = kept.with_name(kept.name + ".partial")
            partial.write_text(json.dumps(about), encoding="utf-8")
            os.replace(partial, kept)
        return counts

    def _survey(self, processes: Processes) -> tuple[list[int], Drops, dict[Encoding | None, Path]]:
        """Counts, drops, and each encoding with the first shard of it. With a limit, only a few are looked at at a time."""
        counts, drops, encodings, left = [], Drops(), {}, self.limit or math.inf
        at_once = processes.count if self.limit else len(self.paths)
        bar = tqdm(total=len(self.paths), desc="shards", unit="shard", disable=None if processes.leads else True)
        for start in range(0, len(self.paths), at_once):
            if left <= 0:
                break
            block = range(start, min(start + at_once, len(self.paths)))
            for number in block[processes.rank :: processes.count] if self.folder else ():
                self._index(number)
                bar.update(min(processes.count, len(self.paths) - bar.n))
            processes.wait()
            for number in block:
                if left <= 0:
                    break
                count, dropped, encoding = self._summary(number)
                drops.include(dropped)
                if count > left:
                    drops.add("beyond the limit", count=int(count - left))
                if not dropped.broken:
                    encodings.setdefault(encoding, self.paths[number])
                counts.append(int(min(count, left)))
                left -= counts[-1]
        bar.close()
        return counts, drops, encodings

    def _summary(self, number: int) -> tuple[int, Drops, Encoding | None]:
        if self.folder:
            return shard_index.load_summary(self.folder / shard_index.name_of_index(self.paths[number], self.filters))
        made = self._index(number)
        return len(made.keys), made.drops, made.encoding


@dataclass(frozen=True)
class _Shard:
    """A shard that is open. It closes when nobody reads in it any more."""

    path: Path
    index: Index
    file: io.BufferedReader
    lock: threading.Lock

    def read(self, row: int, part: int) -> bytes:
        return self.read_at(self.index.spans[row, part])

    def read_at(self, span: Any) -> bytes:
        with self.lock:
            return shard_index.read_span(self.file, span)

    def array(self, row: int, part: int) -> Tensor:
        return _array(self.read(row, part), f"{self.path}: {self.index.keys[row]}")


def _array(data: bytes, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: cannot be read as an array ({error}); make it again with `ldm encode`") from None
