"""In which order the data are seen: a function of seed and step alone, so that a run may be stopped, resumed, and shared by
any number of processes, and every pass sees each sample exactly once.

What is quick to reach anywhere is shuffled as a whole (`batch_of`). Shards are read well only one after the other
(`ShardOrder`): each pass takes them in a new order, a window of a few at a time, and shuffles within the window.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from ldm.processes import generator

ORDER, SHARDS = 1, 11  # purposes of random draws, so that none repeats another's numbers


def batch_of(seed: int, step: int, batch: int, count: int) -> list[int]:
    """Indices of the batch of this step: every pass over the data in a new order; a batch may span two passes."""
    first = step * batch
    return [_order(seed, i // count, count)[i % count] for i in range(first, first + batch)]


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, turn, ORDER)).tolist()


class ShardOrder:
    """The order of samples in shards of `counts` samples, numbered through; `window` shards are shuffled together.

    Where one window holds all shards, the order is that of `batch_of`.
    """

    def __init__(self, counts: Sequence[int], window: int):
        self.window, self.total = window, sum(counts)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], self.counts.cumsum()])
        self._turns, self._windows = lru_cache(maxsize=2)(self._turn), lru_cache(maxsize=3)(self._shuffled)

    def batch(self, seed: int, step: int, batch: int) -> list[int]:
        """Indices of the batch of this step; it may span two windows, and two passes."""
        first = step * batch
        return [self._at(seed, *divmod(i, self.total)) for i in range(first, first + batch)]

    def _at(self, seed: int, turn: int, place: int) -> int:
        begins = self._turns(seed, turn)[1]
        window = int(np.searchsorted(begins, place, side="right")) - 1
        return int(self._windows(seed, turn, window)[place - begins[window]])

    def _turn(self, seed: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of this pass, and the place at which each window begins."""
        shards = torch.randperm(len(self.counts), generator=generator(seed, turn, SHARDS)).numpy()
        places = np.concatenate([[0], self.counts[shards].cumsum()[:-1]])
        return shards, places[:: self.window]

    def _shuffled(self, seed: int, turn: int, window: int) -> np.ndarray:
        """The indices of the samples of one window."""
        shards, begins = self._turns(seed, turn)
        chosen = np.sort(shards[window * self.window : (window + 1) * self.window])
        indices = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in chosen])
        random = generator(seed, turn * len(begins) + window, ORDER)
        return indices[torch.randperm(len(indices), generator=random).numpy()]
