"""A component found in a file, held against its naming table: every tensor accounted for, or an error naming those not."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weights_convert.architecture import COMPONENTS, Architecture
from weights_convert.containers import Spec, TensorFile
from weights_convert.detect import Found, infer
from weights_convert.errors import CheckpointError
from weights_convert.naming import Entry, bijection, shapes, to_native

FLOATS = ("float64", "float32", "float16", "bfloat16")
IGNORE_HINT = "to read the file without them, name them in `ignore`"


class NativeTensors(Mapping):
    """The tensors of one component by native name: views of the mapped file, read when asked for."""

    def __init__(self, file: TensorFile, entries: Sequence[Entry], full_name: Callable[[str], str]):
        self.file = file
        self._entries = {entry.native: entry for entry in entries}
        self._full_name = full_name

    def __getitem__(self, native: str) -> Any:
        entry = self._entries[native]
        return to_native(entry, self.file.tensor(self._full_name(entry.foreign)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def foreign_name(self, native: str) -> str:
        """What the file calls the tensor."""
        return self._full_name(self._entries[native].foreign)

    def dtype(self, native: str) -> str:
        """Its type in the file."""
        return self.file.specs[self.foreign_name(native)].dtype

    def release(self) -> None:
        """Let go of the file's pages; see `TensorFile.release`."""
        self.file.release()


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint: what it is, how its file called things, and its tensors by native name."""

    kind: str
    architecture: Architecture
    naming: str
    source: str  # for people: the file, and which of its weights
    tensors: NativeTensors


def is_listed(name: str, listed: Sequence[str]) -> bool:
    """Whether `name` is in the list. A last "*" of the list's stands for any ending."""
    return any(name == one or (one.endswith("*") and name.startswith(one[:-1])) for one in listed)


def check_none_left(file: TensorFile, left: Sequence[str]) -> None:
    """Raise CheckpointError if there are tensors that belong to no component."""
    if left:
        names = ", ".join(name[:120] for name in left[:5])
        raise CheckpointError(f"{file.path}: {len(left)} unexpected tensors ({names}); {IGNORE_HINT}")


def check_finite(component: Component, native: str, tensor: Any, found: Any) -> None:
    """Raise CheckpointError if `tensor`, made from `found`, holds NaN or infinity, saying which of the two steps made it."""
    if all(math.isfinite(extreme) for extreme in tensor.aminmax()):  # both are NaN where any element is
        return
    name, path = component.tensors.foreign_name(native), component.tensors.file.path
    if found is not tensor and bool(found.isfinite().all()):
        largest = float(found.abs().max())
        raise CheckpointError(f"{path}: {name} reaches {largest:.4g}, more than {tensor.dtype} holds; use bfloat16 or float32")
    bad = int((~found.isfinite()).sum())
    raise CheckpointError(
        f"{path}: {name} holds {bad:,} of {found.numel():,} numbers that are NaN or infinite; the file is damaged"
    )


def match(
    file: TensorFile,
    found: Found,
    specs: Mapping[str, Spec],
    *,
    stated: Architecture | None = None,
    full_name: Callable[[str], str] | None = None,
    note: str = "",
) -> Component:
    """Hold `specs`, the component's tensors by name without the prefix, against the table of its naming.

    `stated` is the architecture that a configuration beside the file gives; without one it is inferred from the shapes.
    `full_name` turns a name of the table into the file's own. Raises CheckpointError naming every kind of difference.
    """
    full_name = full_name or (lambda name: found.prefix + name)
    found_shapes = {name: spec.shape for name, spec in specs.items()}
    candidates = [stated] if stated else [a for a in (infer(found, found_shapes), COMPONENTS[found.kind]()) if a]
    architecture = min(candidates, key=lambda a: len(_differences(shapes(a, found.naming), found_shapes)))
    differences = _differences(shapes(architecture, found.naming), found_shapes)
    if differences:
        raise CheckpointError(f"{file.path}: {found.kind} ({found.naming} names){note}: {_report(differences, full_name)}")
    for name, spec in specs.items():
        if spec.dtype not in FLOATS:
            raise CheckpointError(f"{file.path}: {full_name(name)} has type {spec.dtype}; expected one of {', '.join(FLOATS)}")
    tensors = NativeTensors(file, bijection(architecture, found.naming), full_name)
    return Component(found.kind, architecture, found.naming, f"{file.path}{note}", tensors)


def _differences(expected: Mapping[str, tuple], found: Mapping[str, tuple]) -> dict[str, tuple]:
    """Name -> (expected shape or None, found shape or None), where they differ."""
    names = [*expected, *(name for name in found if name not in expected)]
    return {n: (expected.get(n), found.get(n)) for n in names if expected.get(n) != found.get(n)}


def _report(differences: Mapping[str, tuple], full_name: Callable[[str], str]) -> str:
    missing = [name for name, (_, found) in differences.items() if found is None]
    unexpected = [name for name, (expected, _) in differences.items() if expected is None]
    parts = []
    if missing:
        parts.append(f"missing {_some(missing, lambda name: full_name(name) + _nearest(name, unexpected))}")
    if unexpected:
        parts.append(f"unexpected {_some(unexpected, full_name)}")
    wrong = [name for name, pair in differences.items() if None not in pair]
    if unexpected and not missing and not wrong:
        parts.append(IGNORE_HINT)
    if wrong:
        parts.append(f"misshapen {_some(wrong, lambda name: _shapes_of(full_name(name), *differences[name]))}")
    return "; ".join(parts)


def _some(names: Sequence[str], describe: Callable[[str], str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: " + ", ".join(describe(name)[:200] for name in names[:limit]) + more


def _nearest(name: str, unexpected: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, unexpected[:500], n=1, cutoff=0.8)
    return f" (found {near[0][:200]} instead?)" if near else ""


def _shapes_of(name: str, expected: tuple, found: tuple) -> str:
    return f"{name} (expected {list(expected)}, found {list(found)})"
