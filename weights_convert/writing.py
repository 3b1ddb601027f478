"""What every writer needs: tensors cast and checked as they pass, and a file of them saved."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weights_convert.component import FLOATS, Component, check_finite
from weights_convert.errors import CheckpointError, brief


class _Cast(Mapping):
    """A component's tensors in another precision, each checked for numbers that are none."""

    def __init__(self, component: Component, dtype: Any):
        self.component = component
        self.dtype = dtype

    def __getitem__(self, native: str) -> Any:
        found = self.component.tensors[native]
        tensor = found if self.dtype is None else found.to(self.dtype)
        check_finite(self.component, native, tensor, found)
        return tensor.contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.component.tensors)

    def __len__(self) -> int:
        return len(self.component.tensors)


def cast(component: Component, dtype: str | None) -> Mapping[str, Any]:
    """The component's tensors in `dtype` (None: as they are), read when asked for."""
    import torch

    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"{component.source}: cannot be written in dtype {dtype!r}; expected one of {', '.join(FLOATS)}")
    return _Cast(component, None if dtype is None else getattr(torch, dtype))


def save(tensors: Mapping[str, Any], path: Path, strings: Mapping[str, str]) -> None:
    """Save to `path` by its suffix: `.safetensors`, or torch.save's format with the strings beside `state_dict`.

    Raises OSError where the file cannot be written; either library has an error of its own for a full disk.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = _unshared(tensors)
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, path, metadata={"format": "pt", **strings})
            _order_strings(path)
        else:
            torch.save({"state_dict": tensors, **strings}, path)
    except SafetensorError as error:
        raise OSError(brief(error)) from None
    except RuntimeError as error:  # torch's own words do not say so
        raise OSError(f"is the disk full? torch.save failed with: {brief(error)}") from None
    path.chmod(0o666 & ~_umask())  # safetensors leaves the file to its owner alone


def _order_strings(path: Path) -> None:
    """Put the strings of a safetensors file's header in order: the library leaves them in a new one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            file.seek(8)
            file.write(ordered.ljust(length))


def _unshared(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors, copied where an earlier one lies in the same memory: safetensors refuses those."""
    kept, storages = {}, set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return kept


def _umask() -> int:
    """The process's umask; there is no way to read it but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
