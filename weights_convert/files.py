"""Small files: JSON with a bound and a clear error, and results that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from weights_convert.errors import CheckpointError, brief

MAX_TEXT_BYTES = 8 << 20  # CLIP's tokenizer.json has below 4 MB; parsed, JSON can take twenty times its size


def open_file(path: Path) -> BinaryIO:
    """The file, open for reading. Raises CheckpointError where there is none, or a pipe or device, which may never end."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: expected a file, found a folder, pipe or device")
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises CheckpointError where it is missing, too large or not text."""
    with open_file(path) as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; expected at most {MAX_TEXT_BYTES:,}")
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is not UTF-8 text") from None


def parse_json(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in `text`; `where` names it for an error."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{where}: its JSON is nested too deep") from None
    except ValueError as error:  # no JSON, no text, or a number of thousands of digits
        raise CheckpointError(f"{where}: is not JSON ({brief(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file."""
    return parse_json(read_text(path), path)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def appearing_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to it when all went well and removed when not."""
    _check_free(path)
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder and everything in it."""
    _check_free(path)
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already; give another name or remove it first")
    if not os.path.isdir(path.parent):
        raise CheckpointError(f"{path}: there is no folder {path.parent}; create it first")


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield folder
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
