"""The pictures of a folder as features through an instrument, kept on disk: a second run looks only at what is new.

    CACHE/FINGERPRINT-OF-FOLDER-AND-INSTRUMENT/
        1f0c....json    names, sizes and times of change of some pictures of the folder
        1f0c....npy     their features (n, width), float32, a row each

A picture is known by name, size and time of change, so one that was changed is looked at anew. Blocks are written whole under
hidden names, each as soon as it is full, so that what was stopped goes on where it was. Features stay in the files, mapped,
until somebody asks for rows: memory holds no more of a picture than its name.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ldm import images
from ldm.evaluation.features import Instrument
from ldm.evaluation.whole_file import write_whole

ROWS = 512  # pictures of a block
AT_ONCE = 64  # pictures that are open
KEPT_BY_DEFAULT = "embeddings"  # below `$XDG_CACHE_HOME/ldm`

Key = tuple[str, int, int]  # a picture's name within its folder, bytes, and time of change in nanoseconds


class FolderFeatures:
    """The features of a folder's pictures, in the order of their names: `rows(start, stop)` -> (stop - start, width)."""

    def __init__(self, folder: Path, names: list[str], places: np.ndarray, blocks: list[np.ndarray]):
        """places (n, 2): in which block, and in which of its rows, each picture's features are."""
        self.folder, self.names = folder, names
        self._places, self._blocks = places, blocks

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self.folder / self.names[i]

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.at(np.arange(start, min(stop, len(self))))

    def at(self, indices: np.ndarray) -> np.ndarray:
        """The features of these pictures, float32 (n, width)."""
        places = self._places[indices]
        found = np.empty((len(indices), self._blocks[0].shape[1]), dtype=np.float32)
        for block in np.unique(places[:, 0]):
            chosen = places[:, 0] == block
            found[chosen] = self._blocks[block][places[chosen, 1]]
        return found


def default_cache() -> Path:
    """Where features are kept unless somebody says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm" / KEPT_BY_DEFAULT


def pictures_in(folder: str | Path) -> list[Key]:
    """Every PNG, JPEG and WebP in the folder and those below it, in the order of their names; hidden ones left out.
    Raises ValueError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; expected one of pictures")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(images.SUFFIXES) and not name.startswith("."):
                path = Path(parent) / name
                try:
                    facts = path.stat()
                except OSError as error:  # a link to nowhere
                    raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
                found.append((path.relative_to(folder).as_posix(), facts.st_size, facts.st_mtime_ns))
    if not found:
        raise ValueError(f"{folder}: holds no picture; expected files that end in {', '.join(images.SUFFIXES)}")
    return sorted(found)


def look(
    folder: str | Path,
    instrument: Instrument,
    *,
    cache: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FolderFeatures:
    """The features of every picture in `folder`, from the cache where it has them.

    cache: a folder to keep them in (`default_cache()` where left out); it may serve many folders and instruments. progress:
    told how many of how many pictures are done. Raises ValueError, one line, that names a picture which cannot be read.
    """
    folder = Path(folder)
    keys = pictures_in(folder)
    mark = hashlib.sha256(f"{folder.resolve()}\n{instrument.fingerprint}".encode(errors="surrogateescape")).hexdigest()[:24]
    kept = Path(default_cache() if cache is None else cache) / mark
    kept.mkdir(parents=True, exist_ok=True)
    before = dict(_known(kept, instrument.width))
    new = [key for key in keys if key not in before]
    progress(len(keys) - len(new), len(keys))
    for start in range(0, len(new), ROWS):
        part, done = new[start : start + ROWS], len(keys) - len(new) + start
        _keep(kept, part, _features(folder, part, instrument, lambda k, done=done: progress(done + k, len(keys))))
    known = dict(_known(kept, instrument.width)) if new else before
    files = sorted({known[key][0] for key in keys})
    _forget({file for file, _ in before.values()} - set(files))
    numbers = {file: i for i, file in enumerate(files)}
    places = np.array([(numbers[known[key][0]], known[key][1]) for key in keys], dtype=np.int64)
    blocks = [np.load(file, mmap_mode="r") for file in files]
    return FolderFeatures(folder, [name for name, _, _ in keys], places, blocks)


def _features(folder: Path, keys: list[Key], instrument: Instrument, progress: Callable[[int], None]) -> np.ndarray:
    """(n, width) of these pictures, a few of which are open at a time."""
    rows = []
    for start in range(0, len(keys), AT_ONCE):
        part = [folder / name for name, _, _ in keys[start : start + AT_ONCE]]
        pictures = [images.read(path) for path in part]
        try:
            found = instrument.pictures(pictures).numpy()
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        for path, row in zip(part, found, strict=True):
            if not np.isfinite(row).all() or not row.any():
                raise ValueError(f"{path}: its features through {instrument.name} are NaN, infinite or all 0")
        rows.append(found)
        progress(start + len(part))
    return np.concatenate(rows).astype(np.float32)


def _keep(kept: Path, keys: list[Key], features: np.ndarray) -> None:
    """Write a block: the features first, since the list of names is what a reader goes by."""
    words = json.dumps(keys).encode()
    name = hashlib.sha256(words).hexdigest()[:24]
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_whole(kept / f"{name}.npy", buffer.getvalue())
    write_whole(kept / f"{name}.json", words)


def _known(kept: Path, width: int) -> Iterator[tuple[Key, tuple[Path, int]]]:
    """Which pictures the cache has, and where. A block that is damaged is as good as none."""
    for listing in sorted(kept.glob("*.json")):
        block = listing.with_suffix(".npy")
        try:
            keys = [(str(name), int(size), int(time)) for name, size, time in json.loads(listing.read_bytes())]
            array = np.load(block, mmap_mode="r")
        except (OSError, ValueError, TypeError):
            continue
        if array.shape == (len(keys), width) and array.dtype == np.float32:
            for row, key in enumerate(keys):
                yield key, (block, row)


def _forget(blocks: set[Path]) -> None:
    """Remove blocks of which no picture is there any more as it was."""
    for block in blocks:
        block.with_suffix(".json").unlink(missing_ok=True)
        block.unlink(missing_ok=True)
