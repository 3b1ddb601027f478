"""A file of named tensors. Opening one reads names, types and shapes only. A tensor is then a view of the memory-mapped
file: nothing is copied until somebody writes to it (the mapping is private) or converts it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_DIMENSIONS = 8  # of a tensor; a model's have up to 5
ITEM_SIZES = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor not yet read; `dtype` is torch's name for it."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile:
    """Named tensors of one file. `specs` lists them, `metadata` has the strings stored beside them."""

    def __init__(self, path: Path, kind: str, specs: Mapping[str, Spec], metadata: Mapping[str, str], opener: Callable):
        self.path = path
        self.kind = kind  # "safetensors" or "pickle"
        self.specs = dict(specs)
        self.metadata = dict(metadata)
        self._opener = opener
        self._get: Callable[[str], Any] | None = None

    def tensor(self, name: str) -> Any:
        """The torch tensor `name`, a view of the mapped file."""
        if self._get is None:
            self._get = self._opener()
        return self._get(name)

    def release(self) -> None:
        """Drop the mapping. Tensors handed out keep theirs; the next one maps the file anew, so that pages read so far
        no longer count as this process's memory."""
        self._get = None
