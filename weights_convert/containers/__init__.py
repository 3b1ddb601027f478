"""Containers: a file of named tensors, opened without loading it. See `open_tensors`.

tensor_file.py         what all have in common once open
safetensors_file.py    safetensors
torch_file.py          what torch.save writes (`.ckpt`, `.bin`, `.pt`), and
pickled.py             the pickle in it, read without running it
"""

from pathlib import Path

from weights_convert.containers import safetensors_file, torch_file
from weights_convert.containers.tensor_file import Spec, TensorFile
from weights_convert.errors import CheckpointError
from weights_convert.files import open_file

__all__ = ["Spec", "TensorFile", "open_tensors", "pickles"]


def open_tensors(path: Path) -> TensorFile:
    """Open `path` by what its first bytes say it is. Raises CheckpointError where it is no file of tensors."""
    with open_file(path) as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path}: the file is empty; expected a checkpoint")
    if start.startswith(b"PK"):
        return torch_file.open_zip(path)
    if start.startswith(torch_file.LEGACY_MAGIC):
        return torch_file.open_legacy(path)
    if start.startswith(b"version https://git"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return safetensors_file.open_safetensors(path)
    raise CheckpointError(f"{path}: neither a safetensors file nor one that torch.save wrote; it starts with {start[:8]!r}")


def pickles(path: Path) -> list[bytes]:
    """The pickles in a file of torch.save, as they are; none in other files. Raises CheckpointError where it is damaged."""
    with open_file(path) as file:
        start = file.read(64)
    if start.startswith(b"PK"):
        return [torch_file.pickle_of_zip(path)]
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return torch_file.pickles_of_legacy(path)
    return []
