"""The words of a text encoder as files: `vocab.json` (token -> id) and `merges.txt` (one byte-pair merge a line).

CLIP's own vocabulary is 256 bytes, the same 256 at the end of a word, one token a merge, and two marks for start and end of
a text; it follows from the merges alone. A checkpoint that brings another one carries it in these two files.
"""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from weights_convert.errors import CheckpointError, shown
from weights_convert.files import read_json, read_text, write_json

CLIP_MERGES = Path(__file__).resolve().parent.parent / "ldm" / "assets" / "bpe_simple_vocab_16e6.txt.gz"  # data, no import
CLIP_MERGE_COUNT = 49152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """Token -> id, and the merges in order of rank as "left right"."""

    tokens: dict[str, int]
    merges: tuple[str, ...]


@lru_cache(maxsize=1)
def clip_vocabulary() -> Vocabulary:
    """The 49,408 tokens of OpenAI's CLIP."""
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode().split("\n")
    merges = tuple(lines[1 : 1 + CLIP_MERGE_COUNT])
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges), START, END]
    return Vocabulary({word: i for i, word in enumerate(words)}, merges)


def byte_letters() -> list[str]:
    """One printable letter for each of the 256 bytes, in the order of their ids: printable bytes are themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(others)]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in `folder`, or None where it has none or CLIP's own.

    Folders written by transformers since 5 hold it in `tokenizer.json` instead of the two files.
    """
    if (folder / "vocab.json").exists():
        where = folder / "vocab.json"
        tokens = read_json(where)
        lines = read_text(folder / "merges.txt").split("\n")
        merges = list(filter(None, lines[lines[0].startswith("#version") :]))
    elif (folder / "tokenizer.json").exists():
        where = folder / "tokenizer.json"
        model = read_json(where).get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            raise CheckpointError(f"{where}: expected the model of a byte-pair tokenizer (type BPE)")
        tokens, merges = model.get("vocab"), model.get("merges")
        if isinstance(merges, list):  # of "left right", or of pairs
            merges = [" ".join(merge) if _is_pair(merge) else merge for merge in merges]
    else:
        return None
    if not isinstance(tokens, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{where}: expected an object of tokens and a list of merges")
    found = Vocabulary(tokens, tuple(merges))
    if found == clip_vocabulary():
        return None
    _check(tokens, merges, where)
    return found


def _check(tokens: dict[str, Any], merges: list[Any], where: Path) -> None:
    """Raise CheckpointError unless every token has an id of its own and every merge joins two tokens into a third."""
    if sorted(v for v in tokens.values() if type(v) is int) != list(range(len(tokens))):
        raise CheckpointError(f"{where}: expected every id from 0 to {len(tokens) - 1} once")
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else ()
        if len(parts) != 2 or not all(part in tokens for part in (*parts, "".join(parts))):
            raise CheckpointError(f"{where}: merge {shown(merge)} does not join two tokens into a third")
    if not {START, END} <= set(tokens):
        raise CheckpointError(f"{where}: has no {START} or no {END}")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: a token has half a character, {shown(error.object[error.start])}") from None


def _is_pair(merge: Any) -> bool:
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write both files."""
    write_json(folder / "vocab.json", vocabulary.tokens)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(vocabulary.merges) + "\n", encoding="utf-8")
