"""safetensors: 8 bytes with the length of the header, the header, and the tensors one after another without gaps.

The header is JSON, {name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}, and may have an object of strings
called "__metadata__". It is read here rather than by the library, so that an error can say which tensor is wrong in what.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from weights_convert.containers.tensor_file import ITEM_SIZES, MAX_DIMENSIONS, Spec, TensorFile
from weights_convert.errors import CheckpointError, brief, shown
from weights_convert.files import open_file, parse_json

MAX_HEADER_BYTES = 8 << 20  # a full checkpoint's takes below 1 MB
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}


def open_safetensors(path: Path) -> TensorFile:
    """Read the header and hold it against the file's size."""
    size = path.stat().st_size
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: cut short or no safetensors file: a header of {length:,} bytes in a file of {size:,}"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: its header takes {length:,} bytes; no checkpoint needs over {MAX_HEADER_BYTES:,}")
        header = parse_json(file.read(length), f"{path}, header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is {shown(metadata)}; expected an object of strings")
    specs = {name: _spec(fields, f"{path}: tensor {name}") for name, fields in header.items()}
    _check_layout(path, header, specs, size - 8 - length)

    def opener() -> Callable[[str], Any]:
        import safetensors

        try:
            return safetensors.safe_open(path, framework="pt").get_tensor
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({brief(error)})") from None

    return TensorFile(path, "safetensors", specs, metadata, opener)


def _spec(fields: Any, where: str) -> Spec:
    """Shape and type of one tensor, and its two offsets looked at."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {shown(fields)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has type {shown(dtype)}; known are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"{where} has shape {shown(shape)}; expected a list of at most {MAX_DIMENSIONS} counts")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has data_offsets {shown(offsets)}; expected where it begins and ends")
    return Spec(tuple(shape), DTYPES[dtype])


def _check_layout(path: Path, header: dict[str, Any], specs: dict[str, Spec], data_bytes: int) -> None:
    """Every tensor fills its place, the places follow one another without gap or overlap, and the last ends with the file."""
    position = 0
    for name in sorted(specs, key=lambda name: header[name]["data_offsets"]):
        begin, end = header[name]["data_offsets"]
        needed = prod(specs[name].shape) * ITEM_SIZES[specs[name].dtype]
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {begin:,} of the data; expected {position:,}")
        if end - begin != needed:
            shape = f"{list(specs[name].shape)} of {specs[name].dtype}"
            raise CheckpointError(f"{path}: tensor {name}, {shape}, has {end - begin:,} bytes; expected {needed:,}")
        position = end
    if position > data_bytes:
        raise CheckpointError(f"{path}: cut short: tensor {name} ends at byte {position:,} of the data; found {data_bytes:,}")
    if position < data_bytes:
        raise CheckpointError(f"{path}: {data_bytes:,} bytes of data; its tensors end at {position:,}")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
