"""Captions to make pictures of: a text file with one a line, or COCO's JSON.

COCO's `captions_val2014.json` (Lin et al. 2014, arXiv:1405.0312) has five or more captions of each picture in `annotations`,
each with `image_id`, `id` and `caption`. Here each picture gives one, that of the lowest `id`, and pictures stand in the order
of `image_id`, so that the first N captions are the same for everybody who has the file.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Captions:
    """texts: those that are used, in order. name, sha256: of the whole file."""

    texts: list[str]
    name: str
    sha256: str


def read(path: str | Path, count: int | None = None) -> Captions:
    """The first `count` captions of a file, or all. Raises ValueError, one line, where it holds none, or not as many."""
    path = Path(path)
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text at byte {error.start}") from None
    is_json = path.suffix.lower() == ".json"
    texts = _coco(path, text) if is_json else [line for line in text.splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{path}: holds no caption; expected one a line, or COCO's JSON in a file that ends in .json")
    if count is not None and count > len(texts):
        raise ValueError(f"{path}: holds {len(texts)} captions; {count} were asked for")
    return Captions(texts=texts[:count], name=path.name, sha256=sha256(content).hexdigest())


def _coco(path: Path, text: str) -> list[str]:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({' '.join(str(error).split())[:80]})") from None
    annotations = held.get("annotations") if isinstance(held, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: has no list of annotations; expected COCO's captions, or a text file with one a line")
    first: dict[int, tuple[int, str]] = {}
    for place, told in enumerate(annotations):
        image, number, caption = _annotation(path, place, told)
        if image not in first or number < first[image][0]:
            first[image] = (number, " ".join(caption.split()))
    return [first[image][1] for image in sorted(first)]


def _annotation(path: Path, place: int, told: Any) -> tuple[int, int, str]:
    for name, kind in (("image_id", int), ("id", int), ("caption", str)):
        if not isinstance(told, dict) or type(told.get(name)) is not kind:
            raise ValueError(
                f"{path}: annotation {place} has no {name} as COCO's captions do; expected image_id, id and caption"
            )
    return told["image_id"], told["id"], told["caption"]
