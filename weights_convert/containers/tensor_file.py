"""A file of named tensors: safetensors, or what torch.save writes (`.ckpt`, `.bin`, `.pt`). Which one is seen in its bytes.

Opening one reads names, types and shapes only. A tensor is then a view of the memory-mapped file: nothing is copied until
somebody writes to it (the mapping is private) or converts it.
"""

import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from weights_convert.containers.pickled import MAX_BYTES, PickledTensor, Storage, read_pickle
from weights_convert.errors import CheckpointError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch.save before 1.6
MAX_DIRECTORY_BYTES = 16 << 20  # of a zip archive; a full checkpoint with optimizer state needs below 1 MB
ITEM_SIZES = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}
SAFETENSORS_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
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


def open_tensors(path: Path) -> TensorFile:
    """Open `path` by what its first bytes say it is. Raises CheckpointError where it is no file of tensors."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; expected a checkpoint")
    if start.startswith(b"PK"):
        return _open_zip(path)
    if start.startswith(LEGACY_MAGIC):
        return _open_legacy(path)
    if start.startswith(b"version https://git"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if (len(start) > 8 and start[8:9] == b"{") or path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise CheckpointError(f"{path}: neither a safetensors file nor one that torch.save wrote; it starts with {start[:8]!r}")


# -- safetensors -------------------------------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> TensorFile:
    import safetensors

    def opener() -> Callable[[str], Any]:
        return safetensors.safe_open(path, framework="pt").get_tensor

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a safe_open is no mapping
            specs = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({_one_line(error)}); fetch it again") from None
    for name, (_, dtype) in specs.items():
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has type {dtype}; known are {', '.join(SAFETENSORS_DTYPES)}")
    known = {name: Spec(shape, SAFETENSORS_DTYPES[dtype]) for name, (shape, dtype) in specs.items()}
    return TensorFile(path, "safetensors", known, metadata, opener)


# -- torch.save --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """Where in the file a storage's bytes lie."""

    start: int
    size: int


def _open_zip(path: Path) -> TensorFile:
    """The format since torch 1.6: an uncompressed zip of `data.pkl` and one entry `data/KEY` a storage."""
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "constants.pkl" in entries:
                raise CheckpointError(
                    f"{path}: a TorchScript program, not a checkpoint; load it with torch.jit.load and save its state_dict()"
                )
            if "data.pkl" not in entries:
                raise CheckpointError(f"{path}: a zip archive without the data.pkl that torch.save writes")
            regions = {
                name.removeprefix("data/"): _region(path, file, entry)
                for name, entry in entries.items()
                if name == "data.pkl" or name.startswith("data/")
            }
            if "byteorder" in entries and _region(path, file, entries["byteorder"]).size == 3:
                raise CheckpointError(f"{path}: written on a big-endian machine; save it again on a little-endian one")
            pickle = _read_region(path, file, regions.pop("data.pkl"))
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: the archive is damaged or cut short ({_one_line(error)}); fetch it again") from None
    return _pickled_file(path, read_pickle(BytesIO(pickle), str(path)), regions)


def _check_directory(path: Path) -> None:
    """Refuse an archive whose directory alone would fill the memory; zipfile reads it whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 66_000))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise zipfile.BadZipFile("no end of central directory")
    directory_bytes = struct.unpack_from("<I", tail, end + 12)[0]
    big = tail.rfind(b"PK\x06\x06", 0, end)
    if directory_bytes == 0xFFFFFFFF and big >= 0:
        directory_bytes = struct.unpack_from("<Q", tail, big + 40)[0]
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{path}: the archive's directory takes {directory_bytes:,} bytes; no checkpoint needs over {MAX_DIRECTORY_BYTES:,}"
        )


def _region(path: Path, file: Any, entry: zipfile.ZipInfo) -> _Region:
    """Where an entry's bytes start: its local header has a length of its own."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError(f"{path}: entry {entry.filename[:80]} is compressed, which torch.save never does; refused")
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no entry where the directory puts {entry.filename[:80]}")
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return _Region(entry.header_offset + 30 + name_length + extra_length, entry.file_size)


def _read_region(path: Path, file: Any, region: _Region) -> bytes:
    if region.size > MAX_BYTES:
        raise CheckpointError(f"{path}: its pickle takes {region.size:,} bytes; no checkpoint needs over {MAX_BYTES:,}")
    file.seek(region.start)
    return file.read(region.size)


def _open_legacy(path: Path) -> TensorFile:
    """The format before torch 1.6: five pickles (magic, version, system, data, storage keys), then the storages in order."""
    with path.open("rb") as file:
        head = BytesIO(file.read(MAX_BYTES))
    for _ in range(3):
        read_pickle(head, str(path))
    content = read_pickle(head, str(path))
    keys = read_pickle(head, str(path))
    storages = {t.storage.key: t.storage for t in _tensors(path, content).values()}
    others = [key for key in keys if key not in storages] if isinstance(keys, list) else [keys]
    if others:
        raise CheckpointError(f"{path}: an old torch.save file with storage {_text(others[0])!r} outside its state dict")
    position, regions = head.tell(), {}
    for key in keys:  # each is its length, 8 bytes, and its numbers
        size = storages[key].length * ITEM_SIZES[storages[key].dtype]
        regions[key] = _Region(position + 8, size)
        position += 8 + size
    return _pickled_file(path, content, regions)


def _pickled_file(path: Path, content: Any, regions: Mapping[str, _Region]) -> TensorFile:
    tensors = _tensors(path, content)
    file_size, claimed = path.stat().st_size, 0
    for name, tensor in tensors.items():
        _check_inside(path, name, tensor, regions, file_size)
        claimed += _size(tensor)
    if claimed > file_size:
        raise CheckpointError(f"{path}: its tensors claim {claimed:,} bytes, but the file has {file_size:,}; refused")

    def opener() -> Callable[[str], Any]:
        import torch

        mapped = torch.UntypedStorage.from_file(str(path), False, file_size)
        return lambda name: _view(mapped, tensors[name], regions[tensors[name].storage.key])

    specs = {name: Spec(tensor.shape, tensor.storage.dtype) for name, tensor in tensors.items()}
    strings = content.items() if isinstance(content, dict) else ()
    metadata = {k: v for k, v in strings if isinstance(k, str) and isinstance(v, str)}
    return TensorFile(path, "pickle", specs, metadata, opener)


def _tensors(path: Path, content: Any) -> dict[str, PickledTensor]:
    """The tensors of the state dict, which may stand below a key `state_dict`."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dictionary of tensors")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, PickledTensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; its keys are {', '.join(map(_text, list(content)[:5])) or 'none'}")
    return tensors


def _size(tensor: PickledTensor) -> int:
    size = ITEM_SIZES[tensor.storage.dtype]
    for n in tensor.shape:
        size *= n
    return size


def _check_inside(path: Path, name: str, tensor: PickledTensor, regions: Mapping[str, _Region], file_size: int) -> None:
    """Refuse a tensor that reaches past its storage, or a storage past the file."""
    storage: Storage = tensor.storage
    region = regions.get(storage.key)
    if region is None:
        raise CheckpointError(f"{path}: tensor {name} needs storage {storage.key}, which the file does not have")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    used = 0 if 0 in tensor.shape else (last + 1) * ITEM_SIZES[storage.dtype]
    if used > region.size or _size(tensor) > region.size:
        raise CheckpointError(
            f"{path}: tensor {name} {list(tensor.shape)} needs {used:,} bytes, its storage has {region.size:,}"
        )
    if region.start + region.size > file_size:
        raise CheckpointError(f"{path}: tensor {name} ends at byte {region.start + region.size:,}, the file at {file_size:,}")


def _view(mapped: Any, tensor: PickledTensor, region: _Region) -> Any:
    """The tensor as a view of the mapped file, on a storage of its own so that saving it saves no more than itself."""
    import torch

    dtype = getattr(torch, tensor.storage.dtype)
    storage = mapped[region.start : region.start + region.size]
    if region.start % ITEM_SIZES[tensor.storage.dtype]:
        storage = storage.clone()  # numbers that straddle their natural boundaries cannot be used in place
    return torch.empty(0, dtype=dtype).set_(storage, tensor.offset, tensor.shape, tensor.strides)


def _text(value: Any) -> str:
    """A value from a pickle, short and whatever it is: its own text could be endless."""
    return value[:40] if isinstance(value, str) else type(value).__name__


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
