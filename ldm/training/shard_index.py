"""Shards: tar files as webdataset and img2dataset write them, and where in each of them the samples are.

The members of a sample share their name up to the first dot: `000012.jpg` (or png, webp), `000012.txt` its caption, and
`000012.json` what else is known of it. Of shards that `ldm encode` wrote it is `.moments.npy` and `.states.npy` instead of the
picture, and the folder `__encoding__` in each says which networks made them.

A shard's members are walked through once; nothing is unpacked. What is found is kept in a small file, so that any sample can
be read by its place.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm import images as pictures
from ldm.training.filters import Drops, FilterConfig, verdict
from ldm.training.folder import size_of

PICTURE, TEXT, METADATA, MOMENTS, STATES = range(5)
PARTS = {"jpg": PICTURE, "jpeg": PICTURE, "png": PICTURE, "webp": PICTURE, "txt": TEXT, "json": METADATA}
PARTS |= {"moments.npy": MOMENTS, "states.npy": STATES}
ENCODING = "__encoding__"  # a name that webdataset passes over
SETTINGS, EMPTY = f"{ENCODING}/settings.json", f"{ENCODING}/empty.npy"
BLOCK = 512  # bytes that a tar file is measured in
LISTS = (".txt", ".json")
BEGUN, ENDED = "encoding.json", "drops.json"  # of a folder that `ldm encode` writes


class BrokenShardError(ValueError):
    """A file that is no whole tar file."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What encoded shards were made with: fingerprints of the networks and the tokenizer, and the pictures' size in pixels."""

    autoencoder: str
    text_encoder: str
    tokenizer: str
    size: int


@dataclass(frozen=True)
class Index:
    """The samples of one shard that are kept. spans (n, 5, 2): of each sample and part, the first byte and how many; 0 of what
    it does not have. empty: where the states of the empty text are."""

    keys: np.ndarray
    spans: np.ndarray
    drops: Drops
    encoding: Encoding | None = None
    empty: tuple[int, int] = (0, 0)

    def save(self, path: Path) -> None:
        """Whole or not at all, though several processes may write it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        encoding = asdict(self.encoding) if self.encoding else None
        about = json.dumps({"drops": self.drops.to_json(), "encoding": encoding, "count": len(self.keys), "empty": self.empty})
        with open(partial, "wb") as file:
            np.savez(file, about=np.array(about), keys=self.keys, spans=self.spans)
        os.replace(partial, path)


def load(path: Path) -> Index:
    """What `save` wrote."""
    with np.load(path) as arrays:
        about = json.loads(str(arrays["about"]))
        encoding = Encoding(**about["encoding"]) if about["encoding"] else None
        return Index(arrays["keys"], arrays["spans"], Drops.from_json(about["drops"]), encoding, tuple(about["empty"]))


def load_summary(path: Path) -> tuple[int, Drops, Encoding | None]:
    """How many samples an index has, what was dropped, and how it was encoded; without reading the rest."""
    with np.load(path) as arrays:
        about = json.loads(str(arrays["about"]))
    return about["count"], Drops.from_json(about["drops"]), Encoding(**about["encoding"]) if about["encoding"] else None


def name_of_index(path: Path, filters: FilterConfig) -> str:
    """What the index of just this shard, filtered so, is kept as."""
    about = path.stat()
    key = json.dumps([str(path.resolve()), about.st_size, about.st_mtime_ns, asdict(filters)])
    return f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"


def read_index(path: Path, filters: FilterConfig) -> Index:
    """Walk through a shard. Raises ValueError, one line, where it is broken, unless such are dropped."""
    drops, keys, spans = Drops(), [], []
    with open(path, "rb") as file:
        try:
            samples, twice, notes = _samples(file, path)
        except BrokenShardError:
            if filters.unreadable == "refuse":
                raise
            return Index(np.array([], dtype=str), np.zeros((0, len(PARTS), 2), np.int64), Drops(broken=[str(path)]))
        for key, sample in samples.items():
            drops.seen += 1
            reason = "a member twice" if key in twice else _reason(file, f"{path}: {key}", sample, filters, bool(notes))
            if reason:
                drops.add(reason, f"{path.name}: {key}")
            else:
                keys.append(key)
                spans.append([sample.get(part, (0, 0)) for part in range(5)])
        encoding = _encoding(file, path, notes) if notes else None
    places = np.array(spans, dtype=np.int64).reshape(-1, 5, 2)
    return Index(np.array(keys, dtype=str), places, drops, encoding, notes.get(EMPTY, (0, 0)))


Span = tuple[int, int]


def _samples(file: BinaryIO, path: Path) -> tuple[dict[str, dict[int, Span]], set[str], dict[str, Span]]:
    """Key -> part -> span, the keys of which a part is there twice, and the spans of what `ldm encode` noted."""
    split = key_and_suffix()
    samples: dict[str, dict[int, Span]] = {}
    twice, notes, end = set(), {}, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as members:
            for member in members:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                span = (member.offset_data, member.size)
                if member.isreg() and member.name.startswith(f"{ENCODING}/"):
                    notes[member.name] = span
                key, suffix = split(member.name)
                if not member.isreg() or key is None or key.startswith("__"):
                    continue
                sample, part = samples.setdefault(key, {}), PARTS.get(suffix.lower())
                if part in sample:
                    twice.add(key)
                elif part is not None:
                    sample[part] = span
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BrokenShardError(f"{path}: cannot be read as a tar file ({error}); fetch it again, or leave it out") from None
    file.seek(end)
    if file.read(BLOCK) != bytes(BLOCK):  # where a tar file is cut off or overwritten, tarfile may just end
        raise BrokenShardError(f"{path}: is cut off or damaged at byte {end:,}; fetch it again, or leave it out")
    return samples, twice, notes


def _reason(file: BinaryIO, name: str, sample: dict[int, Span], filters: FilterConfig, encoded: bool) -> str | None:
    """Why a sample is dropped, if it is."""
    if (MOMENTS not in sample or STATES not in sample) if encoded else (PICTURE not in sample):
        return "no picture"
    if not encoded and not read_span(file, sample.get(TEXT, (0, 0))).strip():
        return "no caption"

    def picture() -> io.BytesIO:
        return io.BytesIO(read_span(file, sample.get(PICTURE, (0, 0))))

    try:
        metadata = metadata_of(read_span(file, sample.get(METADATA, (0, 0)))) if filters.asks_metadata else {}
        reason = verdict(filters, metadata, lambda: size_of(picture(), name))
        if reason is None and filters.unreadable == "drop" and not encoded:
            pictures.read(picture(), name=name)
    except ValueError:
        return "unreadable picture"
    return reason


def read_span(file: BinaryIO, span: Any) -> bytes:
    file.seek(int(span[0]))
    return file.read(int(span[1]))


def metadata_of(text: bytes) -> dict[str, Any]:
    """What is no JSON object says nothing."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _encoding(file: BinaryIO, path: Path, notes: dict[str, Span]) -> Encoding:
    try:
        return Encoding(**json.loads(read_span(file, notes[SETTINGS])))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: does not say how it was encoded; make it again with `ldm encode`") from None


@lru_cache(maxsize=1)
def webdataset() -> Any:
    """The library, or one line that says where it is from."""
    try:
        import webdataset
        import webdataset.tariterators
    except ImportError:
        raise ImportError("shards need webdataset; install the extra: pip install 'ldm[train]'") from None
    return webdataset


def key_and_suffix() -> Callable[[str], tuple[str | None, str | None]]:
    """webdataset's own rule of what a member's name says."""
    return webdataset().tariterators.base_plus_ext


def shards_of(source: str) -> list[Path] | None:
    """The shards that a source names: "a/{000..099}.tar", a folder that holds .tar files, or a .txt or .json file that lists
    some, relative to itself. None where it names something else. Raises ValueError for those that are not there."""
    path = Path(source)
    if path.is_dir():
        if (path / BEGUN).exists() and not (path / ENDED).exists():
            raise ValueError(f"{path}: `ldm encode` was stopped before it had written all shards; give the same command again")
        return sorted(path.glob("*.tar")) or None
    if path.suffix in LISTS and path.is_file():
        names = [str(path.parent / name) for name in _listed(path)]
    elif path.suffix == ".tar":
        names = [source]
    else:
        return None
    found = [Path(name) for pattern in names for name in _expanded(pattern)]
    missing = [shard for shard in found if not shard.is_file()]
    if missing or not found:
        which = f"{missing[0]}: there is no such shard" if missing else f"{source}: names no shards"
        raise ValueError(which + (f", nor are {len(missing) - 1} others of {source}" if len(missing) > 1 else ""))
    return found


def _expanded(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    webdataset()
    from braceexpand import braceexpand  # which webdataset itself expands with

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{pattern}: is no pattern of shards ({error}); expected one as in shards/{{000..099}}.tar") from None


def _listed(path: Path) -> list[str]:
    """A name or pattern a line; or JSON: a list of names, or webdataset's index, {"shardlist": [{"url": ...}, ...]}."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        found = json.loads(text)
        found = found["shardlist"] if isinstance(found, dict) else found
        return [entry if isinstance(entry, str) else entry["url"] for entry in found]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path}: expected a list of shards, or {{"shardlist": [{{"url": ...}}, ...]}}') from None
