"""The folder of a run that many processes share, or that may be stopped and resumed.

    run.json          what the pictures are of: task, settings, seed, hashes of model, prompts and sources, total
    00012-1012.png    picture 12 of the run, whose seed is 1012: its name is known before it is made

A picture is written under a hidden name and renamed, so that what has its name is whole; that is looked at all the same, since
disks fill and files are copied.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.output.claim import Claim
from ldm.output.files import NUMBERED

RECORD = "run.json"


class RunFolder:
    """A folder with the pictures of one run and no other; in a `with`, which lets go of it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.claim: Claim | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self.claim is not None:
            self.claim.release()

    def begin(self, record: Mapping[str, Any], *, seed_given: bool) -> dict[str, Any]:
        """Begin the run that `record` tells of, or go on with it: the record that holds, and its seed, from now on.

        One process does this before any other writes. What killed processes left half written is removed. seed_given: where it
        is not, a run that was begun keeps the seed it has. Raises ValueError, one line, where the folder is of another run, or
        where a run is at work in it.
        """
        now = json.loads(json.dumps(record))
        self.claim = Claim(self.path)
        for name in os.listdir(self.path):
            if name.endswith(".partial") and (name.startswith(".") or name == RECORD + ".partial"):
                (self.path / name).unlink()
        if (self.path / RECORD).exists():
            before = self._read()
            if not seed_given:
                now["seed"] = before.get("seed")
            changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            if changed:
                was = ", ".join(f"{name} {_shown(before.get(name))} and not {_shown(now.get(name))}" for name in changed[:3])
                raise ValueError(f"{self.path}: holds a run with {was}; go on with those, or name another folder")
            return now
        if any(NUMBERED.fullmatch(name) for name in os.listdir(self.path)):
            raise ValueError(f"{self.path}: holds pictures, and no {RECORD} that says of which run; name another folder")
        write(self.path / RECORD, json.dumps(now, indent=1) + "\n")
        return now

    def missing(self, names: Sequence[str], *, listed: bool) -> list[int]:
        """Which of these pictures are not there, or not whole, by their places in `names`.

        listed: go by the folder's listing. Otherwise each name is looked up: a listing may be old on a network's file system,
        where other machines write, and so would be the memory of a name that was once looked up in vain.
        """
        there = set(os.listdir(self.path)) if listed else set(names)
        return [i for i, name in enumerate(names) if name not in there or not is_whole(self.path / name)]

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path / RECORD}: cannot be read ({' '.join(str(error).split())[:80]})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{self.path / RECORD}: is not the record of a run; name another folder")
        return record


def is_whole(path: Path) -> bool:
    """Whether a file is a PNG from its first chunk to its last, with all sums right."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
        return True
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        return False


def write(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 40 else f"{text[:37]}..."
