"""What torch.save writes: a pickle that names tensors and the storages they are windows on, and the storages' bytes.

Since torch 1.6 that is an uncompressed zip archive, TOP/data.pkl and one entry TOP/data/KEY a storage; before, it was five
pickles (magic, version, system, the data, the storages' keys), then the storages in order. Both are little-endian.
"""

import io
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights_convert.containers.pickled import MAX_BYTES, PickledTensor, Storage, read_pickle
from weights_convert.containers.tensor_file import ITEM_SIZES, Spec, TensorFile
from weights_convert.errors import CheckpointError, brief

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first of the five pickles
MAX_DIRECTORY_BYTES = 4 << 20  # of a zip archive; a full checkpoint with optimizer state needs below 1 MB
LEGACY_PICKLES = 5
BIG_ENDIAN = "written on a big-endian machine; save it again on a little-endian one"


@dataclass(frozen=True)
class _Region:
    """Where in the file a storage's bytes lie."""

    start: int
    size: int


# -- The two containers ------------------------------------------------------------------------------------------------


class _DirectoryReader(io.FileIO):
    """What zipfile reads through: it would read a directory of any size whole."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise CheckpointError(
                f"{self.name}: the archive's directory takes {size:,} bytes; no checkpoint needs over {MAX_DIRECTORY_BYTES:,}"
            )
        return super().read(MAX_DIRECTORY_BYTES if size < 0 else size)


def open_zip(path: Path) -> TensorFile:
    """Open the archive by its directory; entries are then found in the file itself."""
    pickle, regions = _regions(path)
    return _tensor_file(path, read_pickle(io.BytesIO(_bytes(path, pickle)), str(path)), regions)


def pickle_of_zip(path: Path) -> bytes:
    """The pickle in the archive, as it is."""
    return _bytes(path, _regions(path)[0])


def _bytes(path: Path, region: _Region) -> bytes:
    with path.open("rb") as file:
        file.seek(region.start)
        return file.read(region.size)


def _regions(path: Path) -> tuple[_Region, dict[str, _Region]]:
    """Where the pickle lies, and each storage by its key."""
    try:
        with _DirectoryReader(path) as file, zipfile.ZipFile(file) as archive:
            entries = _entries(path, archive)
            regions = {
                name.removeprefix("data/"): _region(path, file, entry)
                for name, entry in entries.items()
                if name == "data.pkl" or name.startswith("data/")
            }
            if "byteorder" in entries and _region(path, file, entries["byteorder"]).size == len("big"):
                raise CheckpointError(f"{path}: {BIG_ENDIAN}")
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, OSError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: the archive is damaged or cut short ({brief(error)}); fetch it again") from None
    pickle = regions.pop("data.pkl")
    if pickle.size > MAX_BYTES:
        raise CheckpointError(f"{path}: its pickle takes {pickle.size:,} bytes; no checkpoint needs over {MAX_BYTES:,}")
    return pickle, regions


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The entries by their name below the top folder."""
    named = [(entry.filename.partition("/")[2], entry) for entry in archive.infolist()]
    twice = [name for name, times in Counter(name for name, _ in named).items() if name and times > 1]
    if twice:
        raise CheckpointError(f"{path}: the archive has {len(twice)} names twice, such as {twice[0][:80]}; expected each once")
    entries = dict(named)
    if "constants.pkl" in entries:
        raise CheckpointError(
            f"{path}: a TorchScript program, not a checkpoint; load it with torch.jit.load and save its state_dict()"
        )
    if "data.pkl" not in entries:
        raise CheckpointError(f"{path}: a zip archive without the data.pkl that torch.save writes")
    return entries


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


def open_legacy(path: Path) -> TensorFile:
    """Open a file of five pickles and the storages, each of which is its length, 8 bytes, and its numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_BYTES))
        storages: dict[str, Storage] = {}
        _, _, system, content, keys = (read_pickle(head, str(path), storages) for _ in range(LEGACY_PICKLES))
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise CheckpointError(f"{path}: {BIG_ENDIAN}")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{path}: the pickle is damaged (a list of storages was expected, and not found)")
        position, regions = head.tell(), {}
        for key in keys:
            if key not in storages:
                raise CheckpointError(f"{path}: an old torch.save file whose storage {key[:40]} nothing refers to")
            length = storages[key].length
            regions[key] = _Region(position + 8, length * ITEM_SIZES[storages[key].dtype])
            if position + 8 <= size:
                file.seek(position)
                found = int.from_bytes(file.read(8), "little")
                if found != length:
                    raise CheckpointError(f"{path}: storage {key[:40]} has {found:,} numbers; expected {length:,}")
            position = regions[key].start + regions[key].size
    return _tensor_file(path, content, regions)


def pickles_of_legacy(path: Path) -> list[bytes]:
    """The pickles before the storages, as they are; the last one as far as it can be read."""
    with path.open("rb") as file:
        head, found = io.BytesIO(file.read(MAX_BYTES)), []
    for _ in range(LEGACY_PICKLES):
        start = head.tell()
        try:
            for _ in pickletools.genops(head):
                pass
        except Exception:  # whatever a damaged one raises
            return [*found, head.getvalue()[start:]]
        found.append(head.getvalue()[start : head.tell()])
        if head.tell() >= len(head.getvalue()):
            break
    return found


# -- The tensors in either ---------------------------------------------------------------------------------------------


def _tensor_file(path: Path, content: Any, regions: Mapping[str, _Region]) -> TensorFile:
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
        return lambda name: _view(mapped, tensors[name], regions[tensors[name].storage.key].start)

    specs = {name: Spec(tensor.shape, tensor.storage.dtype) for name, tensor in tensors.items()}
    strings = content.items() if isinstance(content, dict) else ()
    metadata = {k: v for k, v in strings if isinstance(k, str) and isinstance(v, str)}
    return TensorFile(path, "pickle", specs, metadata, opener)


def _tensors(path: Path, content: Any) -> dict[str, PickledTensor]:
    """The tensors of the state dict, which may stand below a key: `string_to_param` in files of textual inversion."""
    for key in ("state_dict", "string_to_param"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
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


def _span(tensor: PickledTensor) -> int:
    """Bytes from the first of its numbers to the end of the last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    return 0 if 0 in tensor.shape else (last + 1) * ITEM_SIZES[tensor.storage.dtype]


def _check_inside(path: Path, name: str, tensor: PickledTensor, regions: Mapping[str, _Region], file_size: int) -> None:
    """Refuse a tensor that reaches past its storage, or a storage past the file."""
    storage: Storage = tensor.storage
    region = regions.get(storage.key)
    if region is None:
        raise CheckpointError(f"{path}: tensor {name} needs storage {storage.key}, which the file does not have")
    needed = max(tensor.offset * ITEM_SIZES[storage.dtype] + _span(tensor), _size(tensor))
    if needed > region.size:
        raise CheckpointError(
            f"{path}: tensor {name} {list(tensor.shape)} needs {needed:,} bytes, its storage has {region.size:,}"
        )
    if region.start + region.size > file_size:
        raise CheckpointError(f"{path}: tensor {name} ends at byte {region.start + region.size:,}, the file at {file_size:,}")


def _view(mapped: Any, tensor: PickledTensor, start: int) -> Any:
    """The tensor as a view of the mapped file, on a storage of its own so that saving it saves no more than itself."""
    import torch

    dtype, size = getattr(torch, tensor.storage.dtype), ITEM_SIZES[tensor.storage.dtype]
    strides = [stride if n > 1 else 1 for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    begin = start + tensor.offset * size
    if begin % size == 0:
        return torch.empty(0, dtype=dtype).set_(mapped[begin : begin + _span(tensor)], 0, tensor.shape, strides)
    # Numbers that straddle their natural boundaries cannot be used in place: copy them byte by byte, and no others.
    bytes_ = torch.empty(0, dtype=torch.uint8).set_(mapped, begin, (*tensor.shape, size), (*(s * size for s in strides), 1))
    return bytes_.clone(memory_format=torch.contiguous_format).view(dtype).reshape(tensor.shape)


def _text(value: Any) -> str:
    """A value from a pickle, short and whatever it is: its own text could be endless."""
    return value[:40] if isinstance(value, str) else type(value).__name__
