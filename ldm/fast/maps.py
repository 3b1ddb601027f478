"""Maps and tokens, one memory and two views; and parts of maps."""

from collections.abc import Callable

import torch
from torch import Tensor

Write = Callable[[Tensor, Tensor], None]  # of a part of a map, and where what is made of it goes, both (b, h, w, c)


def tokens_of(x: Tensor) -> Tensor:
    """A map (b, c, h, w), channels_last, as tokens (b, h w, c): a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(tokens: Tensor, height: int) -> Tensor:
    """Tokens (b, h w, c) as a map (b, c, h, w), channels_last: a view."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def copy(part: Tensor, out: Tensor) -> None:
    """The part as it is: a `Write`."""
    out.copy_(part)


def padded(x: Tensor, top: int, height: int, left: int, width: int, write: Write = copy) -> Tensor:
    """`height` rows of x (b, h, w, c) from `top` on and `width` columns from `left` on, by `write`; zeros where x has none."""
    b, h, w, c = x.shape
    first, last, start, stop = max(top, 0), min(top + height, h), max(left, 0), min(left + width, w)
    made = x.new_empty(b, height, width, c)
    made[:, : first - top].zero_()
    made[:, last - top :].zero_()
    inside = made[:, first - top : last - top]
    inside[:, :, : start - left].zero_()
    inside[:, :, stop - left :].zero_()
    write(x[:, first:last, start:stop], inside[:, :, start - left : stop - left])
    return made


def as_many(x: Tensor, count: int) -> Tensor:
    """x (b, ...) repeated to `count` samples, if it has fewer. A map stays channels_last, as `repeat` would not leave it."""
    return x if x.shape[0] == count else torch.cat([x] * (count // x.shape[0]))
