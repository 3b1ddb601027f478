"""Small files: JSON with a bound and a clear error, and results that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weights_convert.errors import CheckpointError

MAX_TEXT_BYTES = 32 << 20


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises CheckpointError where it is missing, too large or not text."""
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes; expected at most {MAX_TEXT_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: is not UTF-8 text") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: is not JSON ({error.msg} at line {error.lineno})") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its JSON is nested too deep") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


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
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path}: exists already; give another name or remove it first")
    if not path.parent.is_dir():
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
