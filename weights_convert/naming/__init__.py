"""Namings: what each tensor of a component is called, and how it is arranged, in every file format in circulation.

`bijection(architecture, naming)` enumerates a naming: one `Entry` for each native tensor, saying which foreign tensor holds
it. Nothing is matched by pattern, so a name that is not listed is a name that is not known. The same list is read from
left to right by `to_native` and from right to left by `to_foreign`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from weights_convert.architecture import Architecture, Autoencoder, ImageEncoder, SafetyChecker, TextEncoder, UNet
from weights_convert.naming import autoencoder, clip, unet
from weights_convert.naming.layers import KEY, PLAIN, POINTWISE, QUERY, TRANSPOSED, VALUE

TABLES: dict[type, tuple[tuple[str, ...], Callable]] = {
    UNet: (unet.NAMINGS, unet.lines),
    Autoencoder: (autoencoder.NAMINGS, autoencoder.lines),
    TextEncoder: (clip.NAMINGS, clip.text_lines),
    ImageEncoder: (clip.NAMINGS, clip.image_lines),
    SafetyChecker: (clip.SAFETY_NAMINGS, clip.safety_lines),
}
THIRDS = {QUERY: 0, KEY: 1, VALUE: 2}


@dataclass(frozen=True)
class Entry:
    """One native tensor and where a naming keeps it: `foreign` holds it, or a third of it, in this `arrangement`."""

    native: str
    shape: tuple[int, ...]
    foreign: str
    arrangement: str

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """Shape of the tensor called `foreign`."""
        if self.arrangement == POINTWISE:
            return (*self.shape, 1, 1)
        if self.arrangement == TRANSPOSED:
            return self.shape[::-1]
        if self.arrangement in THIRDS:
            return (3 * self.shape[0], *self.shape[1:])
        return self.shape


@lru_cache(maxsize=64)
def bijection(architecture: Architecture, naming: str) -> tuple[Entry, ...]:
    """Every tensor of a component in `naming`, in the order data flows through the model."""
    namings, lines = TABLES[type(architecture)]
    column = namings.index(naming)
    return tuple(
        Entry(
            native=_join(line[0], parameter.name),
            shape=parameter.shape,
            foreign=_join(line[column], parameter.name),
            arrangement=parameter.arrangements.get(naming, PLAIN),
        )
        for line in lines(architecture)
        for parameter in line[-1]
    )


def shapes(architecture: Architecture, naming: str) -> dict[str, tuple[int, ...]]:
    """Every foreign name with its shape."""
    return {entry.foreign: entry.foreign_shape for entry in bijection(architecture, naming)}


def to_native(entry: Entry, foreign: Any) -> Any:
    """The native tensor as a view of the foreign one, shape `entry.foreign_shape` -> `entry.shape`."""
    if entry.arrangement == TRANSPOSED:
        return foreign.t()
    if entry.arrangement in THIRDS:
        return foreign.chunk(3)[THIRDS[entry.arrangement]]
    return foreign.reshape(entry.shape)


def to_foreign(architecture: Architecture, naming: str, native: Mapping[str, Any]) -> dict[str, Any]:
    """Every foreign tensor by name, made of the native ones: a view of them wherever the arrangement allows."""
    sources: dict[str, list[Entry]] = {}
    for entry in bijection(architecture, naming):
        sources.setdefault(entry.foreign, []).append(entry)
    return {name: _assemble(parts, native) for name, parts in sources.items()}


def _assemble(parts: list[Entry], native: Mapping[str, Any]) -> Any:
    tensors = [native[entry.native] for entry in sorted(parts, key=lambda e: THIRDS.get(e.arrangement, 0))]
    if parts[0].arrangement == TRANSPOSED:
        return tensors[0].t().contiguous()
    if parts[0].arrangement in THIRDS:
        import torch

        return torch.cat(tensors)
    return tensors[0].reshape(parts[0].foreign_shape)


def _join(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if parameter else layer
