"""The checkpoint doctor: what a file of tensors is, and what is wrong with it, without refusing it and without running it.

`examine(path)` tells of any file that a checkpoint may be in: container, hashes, the components in it and in which naming, type
of the weights, averaged or raw, names that are missing, unexpected or misshapen, the instructions of a pickle, and the range of
the numbers. Where `convert.read` says in one line why it refuses a file, this says all there is to say.
"""

import difflib
import hashlib
import pickletools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights_convert.architecture import COMPONENTS, Architecture
from weights_convert.component import is_listed
from weights_convert.containers import TensorFile, open_tensors, pickles
from weights_convert.detect import Found, components, infer, other_model
from weights_convert.errors import CheckpointError
from weights_convert.files import open_file
from weights_convert.known_files import KNOWN, KnownFile
from weights_convert.layouts import native_folder
from weights_convert.layouts.single_file import EMA_PREFIX, TOLERATED, ema_name
from weights_convert.naming import shapes

OLD_HASH = 0x100000, 0x10000  # what A1111 took its first, now useless, hash of: a start and a length
ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
COMPARED = 20  # missing names for which the nearest is looked for
HALF_RANGE = 65504.0  # the largest float16


@dataclass(frozen=True)
class Names:
    """A component's names against its table: those missing, each with the nearest found one, unexpected and misshapen ones."""

    missing: dict[str, str | None]
    unexpected: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # expected, found

    @property
    def right(self) -> bool:
        return not (self.missing or self.unexpected or self.misshapen)


@dataclass(frozen=True)
class Part:
    """One component: its naming, its sizes as far as shapes tell them, how it differs from SD v1, and its names."""

    kind: str
    naming: str
    prefix: str
    architecture: Architecture | None
    otherwise: dict[str, tuple[Any, Any]]  # field -> (SD v1's, here)
    count: int
    parameters: int
    dtypes: Counter
    names: Names


@dataclass(frozen=True)
class Numbers:
    """The values of a component. bad: names of tensors with NaN or infinity, and how many. zero: those that are 0 throughout.
    beyond_half: those that reach more than float16 holds."""

    lowest: float
    highest: float
    deviation: float
    bad: dict[str, int]
    zero: list[str]
    beyond_half: list[str]


@dataclass(frozen=True)
class Pickle:
    """instructions: how often each stands in the pickle. names: the globals it would have looked up, in order."""

    instructions: Counter
    names: list[str]


@dataclass(frozen=True)
class Findings:
    """All that is told of a file. trouble: why its tensors cannot be read, where they cannot."""

    path: Path
    size: int
    sha256: str
    old_hash: str | None
    container: str
    known: KnownFile | None = None
    other: str | None = None  # another model, by its names
    parts: list[Part] = field(default_factory=list)
    ema: str = ""
    leftovers: dict[str, int] = field(default_factory=dict)  # tensors that are no weights, by what their names begin with
    strangers: list[str] = field(default_factory=list)  # tensors of no component
    metadata: Mapping[str, str] = field(default_factory=dict)
    pickle: Pickle | None = None
    numbers: dict[str, Numbers] = field(default_factory=dict)
    trouble: str | None = None


def examine_folder(path: str | Path, *, values: bool = True) -> list[Findings]:
    """Examine every file of weights in a folder; of a native one, the model's. Raises CheckpointError where there is none."""
    path = Path(path)
    if (path / native_folder.INDEX).exists():
        stated = native_folder.architectures(path)
        return [examine(path / f"{kind}.safetensors", values=values, stated=(kind, one)) for kind, one in stated.items()]
    files = sorted(file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file())
    if not files:
        raise CheckpointError(f"{path}: a folder without weights ({', '.join(ENDINGS)}); expected those of a model")
    return [examine(file, values=values) for file in files]


def examine(path: str | Path, *, values: bool = True, stated: tuple[str, Architecture] | None = None) -> Findings:
    """Examine one file. values: also read every number. stated: the component that it has in native names, where a native
    folder says so. Raises CheckpointError where it is none that could hold tensors."""
    path = Path(path)
    with open_file(path) as file:
        start = file.read(4096)
        if not start:
            raise CheckpointError(f"{path}: the file is empty; expected a checkpoint")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(OLD_HASH[0])
        old = file.read(OLD_HASH[1])
    common = {"path": path, "size": path.stat().st_size, "sha256": sha256, "known": KNOWN.get(sha256)}
    common["old_hash"] = hashlib.sha256(old).hexdigest()[:8] if old else None
    program = _pickle(path)
    try:
        opened = open_tensors(path)
    except CheckpointError as error:
        if program is None and not start[8:9] == b"{":
            raise
        kind = "pickle" if program else "safetensors"
        return Findings(**common, container=kind, pickle=program, trouble=str(error).removeprefix(f"{path}: "))
    return _of_tensors(opened, program, common, values, stated)


def _of_tensors(
    file: TensorFile, program: Pickle | None, common: dict[str, Any], values: bool, stated: tuple[str, Architecture] | None
) -> Findings:
    found = sorted(components(file.specs), key=lambda one: -len(one.prefix))
    if stated:
        found = [Found(stated[0], "native", "")]
    claimed: dict[str, str] = {}
    for one in found:
        for name in file.specs:
            if name.startswith(one.prefix) and name not in claimed and not _is_leftover(name):
                claimed[name] = one.kind
    parts = [_part(file, one, stated, [name for name, kind in claimed.items() if kind == one.kind]) for one in found]
    left = [name for name in file.specs if name not in claimed]
    leftovers = Counter(_group(name) for name in left if _is_leftover(name))
    numbers = {}
    for part in parts if values else ():
        numbers[part.kind] = _numbers(file, [name for name, kind in claimed.items() if kind == part.kind])
    return Findings(
        **common,
        container=file.kind,
        other=other_model(file.specs),
        parts=parts,
        ema=_ema(file, parts),
        leftovers=dict(leftovers),
        strangers=[name for name in left if not _is_leftover(name)],
        metadata=file.metadata,
        pickle=program,
        numbers=numbers,
    )


def _is_leftover(name: str) -> bool:
    return name.startswith(EMA_PREFIX) or is_listed(name, TOLERATED)


def _group(name: str) -> str:
    return "model_ema.*" if name.startswith("model_ema.") else name.split(".")[0] + (".*" if "." in name else "")


def _part(file: TensorFile, found: Found, stated: tuple[str, Architecture] | None, names: Sequence[str]) -> Part:
    inner = {name.removeprefix(found.prefix): file.specs[name] for name in names}
    sizes = {name: spec.shape for name, spec in inner.items()}
    usual = COMPONENTS[found.kind]()
    candidates = [stated[1]] if stated else [candidate for candidate in (infer(found, sizes), usual) if candidate]
    architecture = min(candidates, key=lambda one: len(set(shapes(one, found.naming).items()) ^ set(sizes.items())))
    table = shapes(architecture, found.naming)
    unexpected = [name for name in sizes if name not in table]
    missing = [name for name in table if name not in sizes]
    nearest = {name: _nearest(name, unexpected) if i < COMPARED else None for i, name in enumerate(missing)}
    misshapen = {name: (table[name], sizes[name]) for name in table if name in sizes and sizes[name] != table[name]}
    fields = vars(architecture)
    return Part(
        kind=found.kind,
        naming=found.naming,
        prefix=found.prefix,
        architecture=architecture,
        otherwise={name: (getattr(usual, name), value) for name, value in fields.items() if value != getattr(usual, name)},
        count=len(inner),
        parameters=sum(_count(spec.shape) for spec in inner.values()),
        dtypes=Counter(spec.dtype for spec in inner.values()),
        names=Names(nearest, unexpected, misshapen),
    )


def _nearest(name: str, unexpected: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, unexpected[:500], n=1, cutoff=0.8)), None)


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _ema(file: TensorFile, parts: Sequence[Part]) -> str:
    """In words: averaged weights, raw ones, or both."""
    averages = [name for name in file.specs if name.startswith(EMA_PREFIX)]
    unet = next((part for part in parts if part.kind == "unet"), None)
    if not averages:
        return "one set of UNet weights; whether raw or averaged, only their maker knows" if unet else ""
    if unet is None:
        return f"{len(averages)} averaged UNet weights (EMA) alone"
    wanted = [ema_name(name) for name in shapes(unet.architecture, unet.naming)] if unet.architecture else []
    missing = sum(name not in file.specs for name in wanted)
    return f"raw UNet weights and their average (EMA){f', of which {missing} are missing' if missing else ''}"


def _numbers(file: TensorFile, names: Sequence[str]) -> Numbers:
    lowest, highest, squares, count = float("inf"), float("-inf"), 0.0, 0
    bad: dict[str, int] = {}
    zero, beyond = [], []
    for i, name in enumerate(names):
        if i % 64 == 0:
            file.release()
        values = file.tensor(name)
        if not values.is_floating_point() or not values.numel():
            continue
        values = values.float() if values.dtype.itemsize < 4 else values
        finite = values.isfinite()
        if not finite.all():
            bad[name] = int((~finite).sum())
            values = values[finite]
        if not values.numel():
            continue
        low, high = (float(extreme) for extreme in values.aminmax())
        lowest, highest = min(lowest, low), max(highest, high)
        squares, count = squares + float(values.double().square().sum()), count + values.numel()
        if low == high == 0:
            zero.append(name)
        if max(-low, high) > HALF_RANGE:
            beyond.append(name)
    file.release()
    return Numbers(lowest, highest, (squares / max(count, 1)) ** 0.5, bad, zero, beyond)


# -- Pickles ---------------------------------------------------------------------------------------------------------------


def _pickle(path: Path) -> Pickle | None:
    """The instructions of the pickles in a file of torch.save, listed and not run; None where there is none."""
    try:
        programs = pickles(path)
    except CheckpointError:
        return None
    if not programs:
        return None
    instructions: Counter = Counter()
    names: dict[str, None] = {}
    for program in programs:
        for name, dotted in _steps(program):
            instructions[name] += 1
            if dotted:
                names[dotted] = None
    return Pickle(instructions, list(names))


def _steps(program: bytes) -> Iterator[tuple[str, str | None]]:
    """Each instruction, and the global that it names. A STACK_GLOBAL's name is in the last two texts before it."""
    texts: list[str] = []
    memo: dict[int, str] = {}
    last = None
    try:
        for opcode, argument, _ in pickletools.genops(program):
            dotted = None
            if opcode.name in ("GLOBAL", "INST"):
                dotted = ".".join(argument.split(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                dotted = ".".join(texts[-2:])
            elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE") and last is not None:
                memo[len(memo) if argument is None else argument] = last
            elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                texts = [*texts[-1:], memo.get(argument, "?")]
            if isinstance(argument, str) and "UNICODE" in opcode.name:
                texts, last = [*texts[-1:], argument], argument
            elif opcode.name not in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                last = None
            yield opcode.name, dotted
    except Exception:  # of a damaged one what there is; why it is damaged is told by who reads it
        return
