"""Reading a pickle without running it: what a `.ckpt` or `.bin` says, as plain data.

A pickle is a program for a small stack machine, and the standard unpickler lets it call any function it names. This one
is a machine of our own that knows a few dozen instructions and has nothing to call: a global becomes a `Name`, and
calling one is only ever looked up in a table of six, for what torch.save writes. Names that training code is known to leave
in checkpoints (Lightning's callbacks, numpy scalars) become inert; every other name is refused.

The standard library's `pickletools` decodes the instructions and checks their arguments against the bytes there are. How
long a pickle may be, how deep its stack, and how many steps it may take are bounded, and so are memory and time.
"""

import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from weights_convert.containers.tensor_file import MAX_DIMENSIONS
from weights_convert.errors import CheckpointError, brief, shown

MAX_BYTES = 16 << 20  # a checkpoint's pickle is below 1 MB: it holds names and shapes, not weights
MAX_STACK = 20_000  # torch.save needs a few thousand
MAX_STEPS = 2_000_000  # some 40 a tensor; a whole training state of SD v1 has below 10,000 tensors
MAX_KEY = 2**63  # larger integers can be made to share a hash, and a dictionary of those is slow beyond use

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
INERT_PREFIXES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.dtypes.")
INERT_NAMES = {
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "_codecs.encode",
    "argparse.Namespace",
    "collections.defaultdict",
    "collections.Counter",
    "collections.deque",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.device",
    *(f"torch.{dtype}" for dtype in STORAGE_DTYPES.values()),
    "typing.Any",
    *(f"builtins.{name}" for name in ("set", "dict", "list", "int", "long")),
}
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # what protocols 0 to 2 call them


@dataclass(frozen=True)
class Storage:
    """A block of numbers kept outside the pickle, by its key."""

    key: str
    dtype: str
    length: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle describes it: a strided window on a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A global the pickle mentions, as "module.name". It stays a name."""

    dotted: str


class Inert:
    """Stands for an object of a class that was not loaded."""

    __slots__ = ()


class Parameters(dict):
    """Stands for torch's ParameterDict, in which files of textual inversion hold their vectors: its parameters by name."""


def read_pickle(file: BytesIO, where: str, storages: dict[str, Storage] | None = None) -> Any:
    """Run the pickle that starts at `file`'s position; `where` names it for errors. Leaves the position after its end.

    Every storage it refers to, whether for a tensor that is wanted or not, is entered in `storages` by its key.
    """
    machine = _Machine(where, {} if storages is None else storages)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where}: the pickle is damaged ({type(error).__name__}: {brief(error)})") from None
    raise CheckpointError(f"{where}: the pickle ends before its STOP")


class _Machine:
    """The stack, the marks into it, and the memo."""

    def __init__(self, where: str, storages: dict[str, Storage]):
        self.where = where
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise CheckpointError(f"{self.where}: the pickle takes more than {MAX_STEPS:,} steps; no checkpoint does")

    def step(self, name: str, argument: Any) -> None:
        self.spend(1)
        if len(self.stack) + len(self.marks) > MAX_STACK:
            raise CheckpointError(f"{self.where}: the pickle is nested more than {MAX_STACK} deep; no checkpoint is")
        if name in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif name in _PUSH_CONSTANT:
            self.stack.append(_PUSH_CONSTANT[name]())
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"{self.where}: the pickle uses {name}, which no checkpoint needs; refused, nothing was run")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Everything pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, index: int | None = None) -> None:
        index = len(self.memo) if index is None else index
        if not 0 <= index < MAX_KEY:
            raise ValueError(f"a memo entry numbered {shown(index)}")
        self.memo[index] = self.stack[-1]

    def push_global(self, dotted: str) -> None:
        prefix, _, name = dotted.rpartition(".")
        prefix = OLD_MODULES.get(prefix, prefix)
        dotted = f"{prefix}.{name}"
        known = dotted in _CALLS or (prefix in ("torch", "torch.storage") and name in STORAGE_DTYPES)
        if not (known or dotted in INERT_NAMES or dotted.startswith(INERT_PREFIXES)):
            raise CheckpointError(
                f"{self.where}: the pickle names {dotted[:100]!r}, which is no part of a checkpoint and may run code when "
                "opened by others; refused, nothing was run"
            )
        self.stack.append(Name(dotted))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a global whose name is no string")
        self.push_global(f"{module}.{name}")

    def call(self, argument_count: int = 1) -> None:
        arguments = [self.pop() for _ in range(argument_count)][-1]
        function = self.pop()
        handler = _CALLS.get(function.dotted) if isinstance(function, Name) else None
        if handler and not isinstance(arguments, tuple):
            raise ValueError(f"a call of {function.dotted} without arguments")
        if handler:
            self.spend(sum(len(a) for a in arguments if isinstance(a, tuple | list | dict | str | bytes)))  # what it may copy
        self.stack.append(handler(*arguments) if handler else Inert())

    def build(self) -> None:
        """Give an object its attributes: those of an object that is not there are dropped, but a ParameterDict's parameters."""
        state, target = self.pop(), self.stack[-1]
        held = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(target, Parameters) and isinstance(held, dict):
            self.spend(len(held))
            target.update(held)

    def persistent(self) -> None:
        """A tag of torch.save's: ("storage", type, key, location, length, ...), or in old files ("module", class, ...)."""
        kind, storage_type, *rest = self.pop()
        if kind == "module" and isinstance(storage_type, Name):
            return self.stack.append(storage_type)
        key, _, length, *view = rest
        if kind != "storage" or not isinstance(storage_type, Name) or view not in ([], [None]):
            raise ValueError("a reference to something outside the pickle that is no storage")
        dtype = STORAGE_DTYPES.get(storage_type.dotted.rpartition(".")[2])
        if dtype is None or not isinstance(key, str) or not _is_count(length):
            raise ValueError("a storage without a readable type, key and length")
        self.storages[key] = Storage(key, dtype, length)
        self.stack.append(self.storages[key])

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_dictionary(zip(items[::2], items[1::2], strict=True)))
        elif not isinstance(target, Inert):
            raise ValueError("items set on something that is no dictionary")

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise ValueError("items appended to something that is no list")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _dictionary(pairs: Iterable = ()) -> dict:
    """A dictionary of the pairs whose key is a plain value: hashing a nested one could go as deep as the file likes."""
    return {key: value for key, value in pairs if _is_plain(key)}


def _is_plain(key: Any) -> bool:
    return abs(key) < MAX_KEY if isinstance(key, int) else isinstance(key, str | float | bytes | Name | Inert | None)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor without a storage, shape and strides")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, (offset, *shape, *strides))):
        raise ValueError(f"a tensor of shape {shown(shape)}, strides {shown(strides)} and offset {shown(offset)}")
    return PickledTensor(storage, offset, shape, strides)


_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": tuple,
    "torch.nn.modules.container.ParameterDict": lambda *_: Parameters(),
}
_PUSH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_PUSH_CONSTANT: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": Inert,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "PUT": lambda m, index: m.put(index),
    "BINPUT": lambda m, index: m.put(index),
    "LONG_BINPUT": lambda m, index: m.put(index),
    "MEMOIZE": lambda m, _: m.put(),
    "GET": lambda m, index: m.stack.append(m.memo[index]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "GLOBAL": lambda m, names: m.push_global(names.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "BINPERSID": lambda m, _: m.persistent(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.call(),
    "NEWOBJ_EX": lambda m, _: m.call(argument_count=2),
    "BUILD": lambda m, _: m.build(),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "DICT": lambda m, _: (items := m.pop_mark(), m.stack.append({}), m.set_items(items)),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.pop_mark(),
}
