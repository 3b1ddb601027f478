"""A small vocabulary out of CLIP's large one: all bytes, and the merges that a list of words needs.

Any text can still be written in it, unlisted words in more and shorter tokens. Listed words are split exactly as CLIP splits
them: merging (Sennrich et al. 2016, arXiv:1508.07909) always takes the pair of lowest rank, and those kept keep their order.
An embedding of some 600 tokens takes 1 % of the memory of CLIP's 49,408.
"""

from collections.abc import Iterable
from itertools import pairwise

from ldm.text.tokenizer import END, START, byte_letters, clip_vocabulary


def cut_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Token -> id and merges, as `Tokenizer` takes them, for these lower-case words."""
    _, merges = clip_vocabulary()
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    kept = sorted({i for word in words for i in _merges_of(word, rank)})
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merges[i].replace(" ", "") for i in kept), START, END]
    return {token: i for i, token in enumerate(tokens)}, tuple(merges[i] for i in kept)


def _merges_of(word: str, rank: dict[tuple[str, str], int]) -> list[int]:
    """The merges that make tokens of a word, in the order in which they happen."""
    letters = byte_letters()
    parts = [letters[byte] for byte in word.encode()]
    parts[-1] += "</w>"
    used = []
    while len(parts) > 1:
        ranked = [(rank[pair], pair) for pair in pairwise(parts) if pair in rank]
        if not ranked:
            break
        best, (left, right) = min(ranked)
        used.append(best)
        joined: list[str] = []
        for part in parts:
            if joined and joined[-1] == left and part == right:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return used
