"""Comparing: how far two traces are apart, tensor by tensor, and which is the first that is past tolerance.

Traces need not be of the same program: tensors are matched by name and call, texts by their token ids, and arranged alike
(channels last or first, a map or a row of pixels, one row for a whole batch).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.numerics.traces import Key, Trace

# By the type that most tensors of the coarser side have: what rounding alone leaves of two runs, relative to the largest value,
# after 50 steps.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
PICTURES = 1e-4  # of the mean of 8 bits: one value in forty is off by one
TEXT = "text_encoder"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far b is from a in one tensor.

    largest: max |a - b|. relative: that over max |a|; infinite where one has NaN that the other has not; of pictures of 8
    bits the mean |a - b| over 255, since a few of them round the other way. cosine: of the angle between the two. ulp: the
    median of |a - b| in units of the last place of the coarser type. tolerance: what `relative` is held against. arranged: how
    b had to be turned to have a's shape, "" for not at all, None where it cannot be.
    """

    key: Key
    largest: float
    relative: float
    cosine: float
    ulp: float
    tolerance: float
    shape: tuple[int, ...]
    arranged: str | None = ""

    @property
    def past(self) -> bool:
        return not self.relative <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """Of two traces: all tensors that both have, in the order in which a computed them, and the names that one lacks."""

    rows: list[Difference]
    only_a: list[str]
    only_b: list[str]

    @property
    def first(self) -> Difference | None:
        """The first tensor past its tolerance."""
        return next((row for row in self.rows if row.past), None)


def compare(a: Trace, b: Trace, tolerance: float | None = None) -> Comparison:
    """Compare all tensors of two traces. tolerance: relative, for all; else by their types, see `TOLERANCES`."""
    dtype = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    held = TOLERANCES[dtype] if tolerance is None else tolerance
    rows = [difference(key, first, second, held) for key, first, second in pairs(a, b)]
    names_a, names_b = ({key.name: None for key in trace.keys} for trace in (a, b))
    return Comparison(rows, [n for n in names_a if n not in names_b], [n for n in names_b if n not in names_a])


def pairs(a: Trace, b: Trace) -> Iterator[tuple[Key, Tensor, Tensor]]:
    """What both have, in a's order, as far as both go. What one side computes once and the other at every call is compared at
    every call."""
    texts, calls = _Texts(a, b), min(a.calls, b.calls)
    for key in _keys(a, b):
        if key.call is not None and key.call >= calls:
            continue
        if texts.are_matched and key.name.startswith(f"{TEXT}."):
            found = texts.pair(key)
            if found is not None:
                yield key, *found
            continue
        of_a, of_b = a.find(key), b.find(key)
        if of_a is not None and of_b is not None:
            yield key, a[of_a], b[of_b]


def _keys(a: Trace, b: Trace) -> list[Key]:
    """Those of a, and those of b whose names a has at an earlier call, each at the beginning of its call."""
    known = {key.name for key in a.keys}
    further: dict[int | None, list[Key]] = {}
    for key in b.keys:
        if key not in a and key.name in known and key.call is not None and a.find(key) is not None:
            further.setdefault(key.call, []).append(key)
    keys: list[Key] = []
    for key in a.keys:
        keys += further.pop(key.call, ())
        keys.append(key)
    return keys


class _Texts:
    """Texts may be encoded together or one after another, in any order: their rows are matched by their token ids."""

    def __init__(self, a: Trace, b: Trace):
        self.a, self.b = a, b
        self.rows_a, rows_b = _rows(a), _rows(b)
        self.places = {row: (at, i) for at, rows in reversed(rows_b.items()) for i, row in enumerate(rows)}
        wanted = {row for rows in self.rows_a.values() for row in rows}
        self.are_matched = bool(wanted) and wanted <= set(self.places)

    def pair(self, key: Key) -> tuple[Tensor, Tensor] | None:
        if key not in self.a:
            return None
        mine, rows = self.a[key], self.rows_a.get(key.repeat, [])
        if len(rows) != len(mine):
            return None
        theirs = []
        for row in rows:
            at, i = self.places[row]
            other = Key(key.name, key.call, at)
            if other not in self.b:
                return None
            tensor = self.b[other]
            theirs.append(tensor[min(i, len(tensor) - 1)])
        return mine, torch.stack(theirs)


def _rows(trace: Trace) -> dict[int, list[tuple[int, ...]]]:
    """Of each encoding, by its number, the ids of its texts."""
    found = {key.repeat: ids for key, ids in trace.named(f"{TEXT}.ids")}
    return (
        {at: [tuple(row) for row in ids.tolist()] for at, ids in found.items()}
        if all(i.ndim == 2 for i in found.values())
        else {}
    )


# -- Two tensors ---------------------------------------------------------------------------------------------------------


def difference(key: Key, a: Tensor, b: Tensor, tolerance: float) -> Difference:
    """How far b is from a. Whole numbers must be equal, pictures nearly. Shapes that cannot be arranged alike are infinitely
    far apart."""
    picture = a.dtype == b.dtype == torch.uint8
    held = max(PICTURES, tolerance / 20) if picture else tolerance if a.dtype.is_floating_point else 0.0
    found = arranged(a.shape, b)
    if found is None:
        nothing = {"largest": math.inf, "relative": math.inf, "cosine": math.nan, "ulp": math.inf}
        return Difference(key=key, **nothing, tolerance=held, shape=tuple(a.shape), arranged=None)
    turned, how = found
    x, y = a.double(), turned.double()
    measures = _measures(x, y, _coarser(a, b))
    if picture:
        measures["relative"] = float((x - y).abs().mean()) / 255
    return Difference(key=key, **measures, tolerance=held, shape=tuple(a.shape), arranged=how)


def _measures(x: Tensor, y: Tensor, dtype: torch.dtype) -> dict[str, float]:
    same = (x == y) | (x.isnan() & y.isnan())
    if same.all():
        return {"largest": 0.0, "relative": 0.0, "cosine": 1.0, "ulp": 0.0}
    apart = torch.where(same, 0.0, x - y).abs()
    largest, scale = float(apart.nan_to_num(nan=math.inf).max()), float(x.nan_to_num(0.0, 0.0, 0.0).abs().max())
    norms = float(x.norm() * y.norm())
    unit = _spacing(x, dtype)
    return {
        "largest": largest,
        "relative": largest / scale if scale else math.inf,
        "cosine": float((x * y).sum()) / norms if norms and math.isfinite(norms) else math.nan,
        "ulp": float((apart / unit).nan_to_num(nan=math.inf).median()),
    }


def _spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each value to the next one of the type."""
    info = torch.finfo(dtype if dtype.is_floating_point else torch.float32)
    exponent = torch.frexp(x.abs().clamp(min=info.tiny)).exponent
    return info.eps * torch.exp2(exponent.double() - 1)


def _coarser(a: Tensor, b: Tensor) -> torch.dtype:
    floats = [t.dtype for t in (a, b) if t.dtype.is_floating_point]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=torch.int64)


def arranged(shape: torch.Size | tuple[int, ...], b: Tensor) -> tuple[Tensor, str] | None:
    """b with a's shape, and how it came to have it; None where there is no way."""
    shape, given = tuple(shape), tuple(b.shape)
    if given == shape:
        return b, ""
    for turned, how in _turns(shape, b):
        if tuple(turned.shape) == shape:
            return turned, how
        try:
            together = torch.broadcast_shapes(turned.shape, shape)
        except RuntimeError:
            continue
        if turned.ndim == len(shape) and (together == shape or together == tuple(turned.shape)):
            rows = "one row for all" if together == shape else "rows that are one here"
            used = turned.expand(shape) if together == shape else turned[: shape[0]]
            if tuple(used.shape) == shape:
                return used, f"{how}, {rows}" if how else rows
    return None


def _turns(shape: tuple[int, ...], b: Tensor) -> Iterator[tuple[Tensor, str]]:
    yield b, ""
    if b.ndim == len(shape) == 4:
        yield b.permute(0, 3, 1, 2), "channels last"
    if b.ndim == 4 and len(shape) == 3:  # a map for a row of pixels
        yield b.flatten(2).transpose(1, 2), "a map"
        yield b.flatten(1, 2), "a map, channels last"
        yield b.flatten(2), "a map, where a row of pixels has channels first"
    if b.ndim == 3 and len(shape) == 4 and b.shape[1] == shape[2] * shape[3]:
        yield b.transpose(1, 2).unflatten(2, shape[2:]), "a row of pixels"
    if b.ndim == 3 and len(shape) == 4 and b.shape[2] == shape[2] * shape[3]:
        yield b.unflatten(2, shape[2:]), "a row of pixels, channels first"
    if _plain(b.shape) == _plain(shape):
        yield b.reshape(shape), "other axes of length 1"


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)
