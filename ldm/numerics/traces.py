"""The trace on disk: named tensors in the order in which they were computed, as plain safetensors and a manifest.

`docs/traces.md` tells writers of ports what is in it; nothing of this project is needed to write one. A trace is a folder:

    manifest.json      {"format": "ldm trace", "version": 1, "about": {...}, "tensors": [{...}, ...]}
    00000.safetensors  some of the tensors, 00001.safetensors the next ...

Each entry of `tensors` has `name`, `file`, `key` (the tensor's name in that file) and, of what the UNet and the sampler
compute, `call`: at which of the network's calls, counted from 0.
"""

import json
import math
import queue
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "ldm trace", 1
MANIFEST = "manifest.json"
SHARD = 32 * 2**20  # bytes of tensors in a file
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WAITING = 64 * 2**20  # bytes of tensors that may wait to be written


class TraceError(ValueError):
    """A folder that is no trace, or a damaged one: one line that names the file and what is wrong with it."""


@dataclass(frozen=True)
class Key:
    """Which tensor: its name, at which call of the network (None outside of it), and which of several under that name."""

    name: str
    call: int | None = None
    repeat: int = 0

    def __str__(self) -> str:
        return (
            self.name + (f", call {self.call}" if self.call is not None else "") + (f" ({self.repeat})" if self.repeat else "")
        )


class TraceWriter:
    """Writes tensors as they come, on a thread of its own, and holds no more than `WAITING` bytes and two shards of them.

    The folder appears under its name when `close` is called; until then, and after `discard`, nothing is there.

        with TraceWriter("run.trace", about={"port": "mine"}) as writer:
            writer.add("unet.conv_in", tensor, call=0)
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any] | None = None):
        """Raises TraceError where `path` exists, or its folder does not."""
        self.path = check_new(path)
        self.about: dict[str, Any] = dict(about or {})
        self._entries: list[dict[str, Any]] = []
        self._shard: dict[str, Tensor] = {}
        self._size, self._files = 0, 0
        self._last: tuple[Tensor, float, dict[str, Any]] | None = None
        self._failure: BaseException | None = None
        self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))
        self._queue: queue.Queue[tuple[Path, dict[str, Tensor]] | None] = queue.Queue(maxsize=max(WAITING // SHARD, 1))
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def add(self, name: str, tensor: Tensor, *, call: int | None = None) -> None:
        """Note the tensor down as it is now. The same object again, as of a block whose last layer's output is its own, costs
        nothing."""
        if self._failure is not None:
            raise self._failure
        where = {} if call is None else {"call": call}
        if self._last is not None and self._last[0] is tensor and self._last[1] == _version(tensor):
            self._entries.append({"name": name, **where, **self._last[2]})
            return
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._size + size > SHARD:
            self._flush()
        place = {"file": f"{self._files:05}.safetensors", "key": f"{len(self._shard)}"}
        self._shard[place["key"]] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._size += size
        self._last = tensor, _version(tensor), place
        self._entries.append({"name": name, **where, **place})

    def close(self) -> None:
        """Write what is left, and the manifest; the folder gets its name."""
        self._flush()
        self._stop()
        if self._failure is not None:
            self.discard()
            raise self._failure
        lines = ",\n".join(json.dumps(entry) for entry in self._entries)
        head = json.dumps({"format": FORMAT, "version": VERSION, "about": self.about}, sort_keys=True)[:-1]
        (self._folder / MANIFEST).write_text(f'{head}, "tensors": [\n{lines}\n]}}\n')
        mode = (self._folder / MANIFEST).stat().st_mode & 0o666  # as the umask has it; safetensors' files have less
        for file in self._folder.iterdir():
            file.chmod(mode)
        self._folder.chmod(mode | (mode & 0o444) >> 2)
        self._folder.rename(self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _flush(self) -> None:
        if self._shard:
            self._queue.put((self._folder / f"{self._files:05}.safetensors", self._shard))
            self._shard, self._size, self._files = {}, 0, self._files + 1
            self._last = None

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            path, tensors = item
            try:
                if self._failure is None:
                    save_file(tensors, path)
            except OSError as error:
                self._failure = TraceError(f"{self.path}: cannot be written ({error.strerror or error})")
            except SafetensorError as error:
                self._failure = TraceError(f"{self.path}: cannot be written ({error})")
            del item, tensors


def _version(tensor: Tensor) -> float:
    """How often the tensor was written to; NaN, which is equal to nothing, where torch does not count."""
    try:
        return tensor._version
    except RuntimeError:  # in inference mode
        return math.nan


class Trace:
    """A trace that is read tensor by tensor. `keys` are in the order of execution; `about` is what its writer said."""

    def __init__(self, path: str | Path):
        """Raises TraceError, one line, for a folder that is no trace and for one that is damaged."""
        self.path = Path(path).expanduser()
        manifest = _manifest(self.path)
        self.about: dict[str, Any] = manifest["about"]
        self._places: dict[Key, tuple[str, str]] = {}
        counts: dict[tuple[str, int | None], int] = {}
        for number, entry in enumerate(manifest["tensors"]):
            name, call, place = _entry(entry, f"{self.path / MANIFEST}: tensor {number}")
            repeat = counts.get((name, call), 0)
            counts[name, call] = repeat + 1
            self._places[Key(name, call, repeat)] = place
        self._files = {file: _opened(self.path / file) for file in sorted({file for file, _ in self._places.values()})}
        for key, (file, inside) in self._places.items():
            if inside not in self._files[file][1]:
                raise TraceError(f"{self.path / file}: has no tensor {inside!r}, which the manifest names for {key}")

    @property
    def keys(self) -> list[Key]:
        return list(self._places)

    @property
    def calls(self) -> int:
        """How often the network was called."""
        return max((key.call + 1 for key in self._places if key.call is not None), default=0)

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of its tensors have, of types that hold fractions."""
        counts: dict[str, int] = {}
        for file, inside in self._places.values():
            name = self._files[file][0].get_slice(inside).get_dtype()
            counts[name] = counts.get(name, 0) + 1
        found = [name for name in counts if name in FLOATS]
        return FLOATS[max(found, key=counts.__getitem__)] if found else torch.float32

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: Key) -> Tensor:
        file, inside = self._places[key]
        try:
            return self._files[file][0].get_tensor(inside)
        except SafetensorError as error:
            raise TraceError(f"{self.path / file}: tensor {inside!r} cannot be read ({error})") from None

    def find(self, key: Key) -> Key | None:
        """The key itself; or, of what does not change from call to call and was noted down once, that one."""
        if key in self._places or key.call is None:
            return key if key in self._places else None
        earlier = (Key(key.name, call, key.repeat) for call in (*reversed(range(key.call)), None))
        return next((candidate for candidate in earlier if candidate in self._places), None)

    def named(self, name: str) -> Iterator[tuple[Key, Tensor]]:
        """All tensors of a name, call after call."""
        for key in self._places:
            if key.name == name:
                yield key, self[key]


def check_new(path: str | Path) -> Path:
    """The path of a trace to be written. Raises TraceError where something has the name, or where there is no such folder."""
    path = Path(path).expanduser()
    if path.exists() or path.is_symlink():
        raise TraceError(f"{path} exists already; remove it, or give the trace another name")
    if not path.parent.is_dir():
        raise TraceError(f"{path}: there is no folder {path.parent}; create it first")
    return path


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise TraceError(f"{path}: {what}; expected a trace, a folder with a {MANIFEST}")
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise TraceError(f"{path}: has no {MANIFEST}; expected a trace") from None
    except OSError as error:
        raise TraceError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{file}: is no JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise TraceError(f'{file}: is not of a trace; expected "format": "{FORMAT}"')
    if manifest.get("version") != VERSION:
        raise TraceError(f"{file}: is of version {manifest.get('version')!r}; expected {VERSION}")
    if not isinstance(manifest.get("tensors"), list) or not isinstance(manifest.setdefault("about", {}), dict):
        raise TraceError(f'{file}: expected "tensors", a list, and "about", an object')
    return manifest


def _entry(entry: Any, where: str) -> tuple[str, int | None, tuple[str, str]]:
    fields = ("name", "file", "key")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in fields):
        raise TraceError(f"{where}: expected an object with {', '.join(fields)}, all text")
    call = entry.get("call")
    if call is not None and (type(call) is not int or call < 0):
        raise TraceError(f"{where}: call is {call!r}; expected a whole number from 0, or none")
    if Path(entry["file"]).name != entry["file"]:
        raise TraceError(f"{where}: file is {entry['file']!r}; expected the name of a file in the trace's own folder")
    return entry["name"], call, (entry["file"], entry["key"])


def _opened(path: Path) -> tuple[Any, set[str]]:
    try:
        file = safe_open(path, framework="pt")
        return file, set(file.keys())
    except FileNotFoundError:
        raise TraceError(f"{path}: is missing, though the manifest names it") from None
    except (OSError, SafetensorError) as error:
        raise TraceError(f"{path}: is no safetensors file, or a damaged one ({error})") from None
