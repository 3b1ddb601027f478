"""A folder of pictures with captions, as data: see `data.py` for what data have in common."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm import images as pictures
from ldm.training.filters import Drops, FilterConfig, verdict
from ldm.training.order import batch_of

READERS = 8  # threads


class Folder:
    """Pictures of a folder with their captions: `name.txt` beside `name.png`, or lines of `metadata.jsonl`
    ({"file_name": ..., "text": ...}). Each is scaled and cut to a square about its middle.

    What filters ask for is in `name.json`, or in further fields of the line. most: how many are kept at most; `drops` tells
    of those looked at until then.
    """

    encoding = None

    def __init__(self, folder: Path, size: int, most: int | None = None, filters: FilterConfig | None = None):
        self.folder, self.size, self.drops = folder, size, Drops()
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder of pictures")
        table = folder / "metadata.jsonl"
        rows = self._from_table(table) if table.exists() else self._from_texts()
        self.items = self._kept(rows, most, filters or FilterConfig())
        if not any(row[1] is not None for row in rows):
            raise ValueError(f"{folder}: holds no picture with a caption; expected name.txt beside name.png, or metadata.jsonl")
        if not self.items:
            raise ValueError(f"{folder}: no picture is left; {self.drops.summary()}")
        self._readers = ThreadPoolExecutor(READERS)

    @property
    def identity(self) -> str:
        """What names this data, and no other, in files made of it: a hash of names, sizes and times of change, and captions."""
        digest = hashlib.sha256()
        for path, caption in self.items:
            about = path.stat()
            digest.update(json.dumps([os.path.relpath(path, self.folder), about.st_size, about.st_mtime_ns, caption]).encode())
        return digest.hexdigest()[:16]

    @property
    def listing(self) -> str:
        """What a run that is resumed must find again: a hash of names and captions, in their order."""
        names = [(os.path.relpath(path, self.folder), caption) for path, caption in self.items]
        return f"{len(names)} pictures, {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, seed: int, step: int, batch: int) -> list[int]:
        """Indices of the batch of this step; see `order.py`."""
        return batch_of(seed, step, batch, len(self))

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.stack(list(self._readers.map(lambda i: self._read(self.items[i][0]), indices)))

    def try_images(self, indices: Sequence[int]) -> list[Tensor | ValueError]:
        """Each picture (3, size, size), or why it cannot be read."""
        return list(self._readers.map(lambda i: attempt(lambda: self._read(self.items[i][0])), indices))

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self.items[i][1] for i in indices]

    def name(self, index: int) -> str:
        return os.path.relpath(self.items[index][0], self.folder)

    def metadata(self, index: int) -> dict[str, Any]:
        return self._about.get(self.items[index][0]) or _beside(self.items[index][0])

    def _read(self, path: Path) -> Tensor:
        return square(pictures.read(path), self.size)

    def _kept(self, rows: list[tuple[Path, str | None]], most: int | None, filters: FilterConfig) -> list[tuple[Path, str]]:
        items = []
        for path, caption in rows:
            if len(items) == most:
                break
            self.drops.seen += 1
            reason = "no caption" if caption is None else self._reason(path, filters)
            if reason:
                self.drops.add(reason, os.path.relpath(path, self.folder))
            else:
                items.append((path, caption))
        return items

    def _reason(self, path: Path, filters: FilterConfig) -> str | None:
        try:
            metadata = (self._about.get(path) or _beside(path)) if filters.asks_metadata else {}
            reason = verdict(filters, metadata, lambda: size_of(path, str(path)))
            if reason is None and filters.unreadable == "drop":
                pictures.read(path)
        except ValueError:
            return "unreadable picture"
        return reason

    def _from_texts(self) -> list[tuple[Path, str | None]]:
        self._about: dict[Path, dict[str, Any]] = {}
        found = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in pictures.SUFFIXES)
        texts = [(path, path.with_suffix(".txt")) for path in found]
        return [(path, _caption(text.read_text(encoding="utf-8")) if text.exists() else None) for path, text in texts]

    def _from_table(self, table: Path) -> list[tuple[Path, str | None]]:
        self._about, items = {}, []
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                items.append((self.folder / row["file_name"], None if row["text"] is None else _caption(str(row["text"]))))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{table}, line {number}: expected {{"file_name": ..., "text": ...}}') from None
            if not items[-1][0].is_file():
                raise ValueError(f"{table}, line {number}: there is no picture {items[-1][0].name}")
            self._about[items[-1][0]] = {key: value for key, value in row.items() if key not in ("file_name", "text")}
        return items


def _caption(text: str) -> str | None:
    """Blank says nothing: that is no caption, and not the empty one."""
    return text.strip() or None


def _beside(path: Path) -> dict[str, Any]:
    """What `name.json` beside `name.png` says; nothing where there is none."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def square(picture: Image.Image, size: int) -> Tensor:
    """A picture -> uint8 (3, size, size): scaled, and cut about its middle."""
    fitted = ImageOps.fit(pictures.rgb(picture), (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)


def size_of(file: Any, name: str) -> tuple[int, int]:
    """(width, height) of a picture, as its head says. Raises ValueError where it is none."""
    try:
        with Image.open(file, formats=pictures.FORMATS) as opened:
            return opened.size
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        raise ValueError(f"{name}: cannot be read as PNG, JPEG or WebP") from None


def attempt(make: Any) -> Any:
    """What make() returns, or the ValueError that it raises."""
    try:
        return make()
    except ValueError as error:
        return error
