"""Self-attention with fewer tokens, an approximation: Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion",
arXiv:2303.17604.

Of every 2x2 pixels one is a destination. Those of the others that are most like a destination are averaged into it before
queries, keys and values are computed, and get its result. Only the order of similarities chooses them, and sums have one order,
so a picture made again is the same picture; the paper draws its destinations, ours are the first of their four.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 0.75  # of the tokens: all but the destinations


class Merging:
    """Which tokens of each sample become one, from tokens (b, n, c) of maps `height` pixels high."""

    def __init__(self, tokens: Tensor, height: int, share: float):
        """share: of the tokens that are merged into others, 0 to MOST."""
        n = tokens.shape[1]
        numbers = torch.arange(n, device=tokens.device).view(height, -1)
        self.destinations = numbers[::2, ::2].flatten()
        # Not by a mask, whose count a GPU would have to tell: a CUDA graph cannot be captured of that.
        sources = torch.cat([numbers[::2, 1::2].flatten(), numbers[1::2].flatten()]).sort().values
        directions = F.normalize(tokens, dim=-1)
        likeness = directions[:, sources] @ directions[:, self.destinations].mT
        most, nearest = likeness.max(dim=-1)
        order = most.sort(dim=-1, descending=True, stable=True).indices
        merged, kept = order.tensor_split([min(int(share * n), len(sources))], dim=1)
        self.kept, self.merged = sources[kept], sources[merged]  # (b, ...), numbers of tokens
        self.into = nearest.gather(1, merged)  # (b, ...), places among the destinations

    def merge(self, x: Tensor) -> Tensor:
        """(b, n, c) -> (b, m, c): those that were kept, and the destinations, each the mean of what is merged into it."""
        merged = x.gather(1, _rows(self.merged, x))
        means = (scattered if x.device.type == "cpu" else multiplied)(x[:, self.destinations], merged, self.into)
        return torch.cat([x.gather(1, _rows(self.kept, x)), means], dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """(b, m, c) -> (b, n, c): to each token its own row, or its destination's."""
        count = self.kept.shape[1]
        own, shared = y[:, :count], y[:, count:]
        out = y.new_empty(y.shape[0], count + self.merged.shape[1] + len(self.destinations), y.shape[2])
        out[:, self.destinations] = shared
        out.scatter_(1, _rows(self.kept, y), own)
        return out.scatter_(1, _rows(self.merged, y), shared.gather(1, _rows(self.into, y)))


def scattered(own: Tensor, merged: Tensor, into: Tensor) -> Tensor:
    """The mean of each row of own (b, m, c) and those of merged (b, k, c) that go into it: into (b, k), places in own."""
    return own.scatter_reduce(1, _rows(into, own), merged, reduce="mean", include_self=True)


def multiplied(own: Tensor, merged: Tensor, into: Tensor) -> Tensor:
    """The same as a matrix product, which a GPU sums in one order and in float32: it would scatter as its threads come, in the
    type of the rows."""
    to = into[:, None] == torch.arange(own.shape[1], device=own.device)[:, None]  # (b, m, k)
    share = (1 / (1 + to.sum(dim=-1, keepdim=True, dtype=torch.float64))).to(own)
    return torch.baddbmm(own * share, to * share, merged)


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """index (b, k) as gather wants it for whole rows of x (b, n, c)."""
    return index[..., None].expand(-1, -1, x.shape[2])
