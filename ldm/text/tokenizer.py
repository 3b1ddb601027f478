"""CLIP's tokenizer: a prompt -> 77 token ids, by byte-pair encoding.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909, over bytes, as in
Radford et al. 2021 (arXiv:2103.00020, section 2.4). A text is cleaned, split into words, each word into bytes, and the
bytes are merged pair by pair in the order of the shipped merges. Two styles of cleaning are in circulation, and they differ
on curly quotes, HTML entities, ligatures, final sigma and the like:

    "hf"      transformers' CLIPTokenizer: NFC, white space collapsed, lower case. The default, as transformers 5 has it.
    "openai"  OpenAI's own: ftfy, HTML unescaped twice, white space collapsed, lower case (extra `openai`).

A text has room for 75 tokens between start and end mark. What does not fit is cut off, and reported. The rest is padded
with end marks, as Stable Diffusion was trained (OpenAI's own code pads with 0).

Placeholders are words with ids of their own, for vectors that were learned for them (Gal et al. 2022, arXiv:2208.01618). They
are found first, in the cleaned text, and what stands between them is split as if it stood alone. That is what transformers
does with added tokens, but that a placeholder which begins or ends with a letter or digit is not found within a word.
"""

import copy
import gzip
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
STYLES = ("hf", "openai")
CLIP_MERGES = 49152 - 256 - 2  # of the lines in the file, those that CLIP uses
# The marks, English contractions, runs of letters, single digits, runs of anything else but white space.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SEAM = r"(?:(?<![\p{L}\p{N}])|(?![\p{L}\p{N}]))"  # anywhere but between two letters or digits


class Token(NamedTuple):
    """One token: its id, and the place in the text at which it starts."""

    id: int
    start: int


@dataclass(frozen=True)
class Tokens:
    """Token ids (b, n), int64, and for each prompt the part of its text that did not fit ("" where all did)."""

    ids: Tensor
    cut_off: tuple[str, ...]


class Tokenizer:
    """Prompts -> token ids. `start` and `end` are the ids of the marks, `length` is what every prompt is padded to.

    `placeholders`: the words with ids of their own, as they look once cleaned -> their ids.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[str], length: int = 77, style: str = "hf"):
        """vocabulary: token -> id; merges: "left right" in order of rank. See `clip` for CLIP's own."""
        if style not in STYLES:
            raise ValueError(f"tokenizer style {style!r}; expected one of {', '.join(STYLES)}")
        self.vocabulary, self.merges = vocabulary, merges
        self.length = length
        self.style = style
        self.start, self.end = vocabulary[START], vocabulary[END]
        pairs = [tuple(merge.split(" ")) for merge in merges]
        self._merger = models.BPE(
            vocab=dict(vocabulary), merges=pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
        )
        self._style = {"hf": _HuggingFace, "openai": _OpenAI}[style](self._merger, vocabulary)
        self.placeholders: Mapping[str, tuple[int, ...]] = {}
        self._split = self._style.split

    @classmethod
    def clip(cls, length: int = 77, style: str = "hf") -> "Tokenizer":
        """The tokenizer of CLIP and Stable Diffusion v1, from the merges that ship with the package."""
        return cls(*clip_vocabulary(), length, style)

    def with_placeholders(self, placeholders: Mapping[str, Sequence[int]]) -> "Tokenizer":
        """A tokenizer that also puts these ids wherever their placeholder stands: in any case, the longest where several fit.

        A placeholder may be a word that the vocabulary has, which it then hides. Where its ids do not all fit, those that do
        are kept, as diffusers does, and the placeholder is reported as cut off.
        Raises ValueError for one that is blank, holds white space or a mark, or is taken by another one.
        """
        known = dict(self.placeholders)
        for placeholder, ids in placeholders.items():
            _check_whole(placeholder, f"placeholder {placeholder!r}")
            name = self._style.written(placeholder)
            if not name or re.search(r"\s", name) or START in name or END in name:
                rule = f"a word without white space, {START} or {END}"
                raise ValueError(f"placeholder {placeholder!r}; expected {rule}; give it another name")
            if name in known:
                raise ValueError(f"placeholder {placeholder!r} is taken; give one of the two another name")
            known[name] = tuple(ids)
        made = copy.copy(self)
        made.placeholders = known
        made._split = _Placeholders(self._style, known).split if known else self._style.split
        return made

    def __call__(self, prompts: str | Iterable[str]) -> Tokens:
        """Start mark, at most length - 2 tokens, end mark, end marks to fill: ids (b, length) and what was cut off."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows, cut_off = [], []
        for prompt in prompts:
            text, tokens = self.tokens(prompt)
            room = self.length - 2
            rows.append([self.start, *(token.id for token in tokens[:room])])
            rows[-1] += [self.end] * (self.length - len(rows[-1]))
            cut_off.append(text[tokens[room].start :] if len(tokens) > room else "")
        return Tokens(torch.tensor(rows, dtype=torch.int64).reshape(len(prompts), self.length), tuple(cut_off))

    def tokens(self, prompt: str) -> tuple[str, list[Token]]:
        """The text that was split (the prompt itself, or OpenAI's cleaned form of it) and all its tokens, without marks.

        All tokens of a placeholder start where it starts.
        """
        _check_whole(prompt, "the prompt")
        text = self._style.clean(prompt)
        return text, self._split(text)


def _check_whole(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character (a lone surrogate) at position {error.start}") from None


class _HuggingFace:
    """Cleaning and splitting as transformers sets up the tokenizers library, which cleans as it splits: positions are in the
    prompt as given."""

    def __init__(self, merger: models.BPE, vocabulary: Mapping[str, int]):
        self._tokenizer = tokenizers.Tokenizer(merger)
        self.prepare(self._tokenizer)
        split = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])

    def prepare(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Make it find the marks, as they are, and then clean what is between them."""
        tokenizer.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in (START, END)])
        cleaning = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        tokenizer.normalizer = normalizers.Sequence(cleaning)

    def clean(self, prompt: str) -> str:
        return prompt

    def written(self, placeholder: str) -> str:
        return self._tokenizer.normalizer.normalize_str(placeholder)

    def split(self, text: str) -> list[Token]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [Token(i, start) for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]


class _OpenAI:
    """Cleaning and splitting by the libraries that OpenAI's code uses; positions are in the cleaned text."""

    def __init__(self, merger: models.BPE, vocabulary: Mapping[str, int]):
        try:
            import ftfy
            import regex
        except ImportError as error:
            raise ImportError(f"the openai tokenizer needs {error.name}; install it with: pip install 'ldm[openai]'") from None
        self._merger = merger
        self._marks = {mark: vocabulary[mark] for mark in (START, END)}
        self._repair = ftfy.fix_text
        self._white_space = regex.compile(r"\s+")
        self._word = regex.compile(WORD, regex.IGNORECASE)

    def clean(self, prompt: str) -> str:
        text = html.unescape(html.unescape(self._repair(prompt))).strip()
        return self._white_space.sub(" ", text).strip().lower()

    def prepare(self, tokenizer: tokenizers.Tokenizer) -> None:
        """The text is cleaned before, and marks are words like others."""

    def written(self, placeholder: str) -> str:
        return self.clean(placeholder)

    def split(self, text: str) -> list[Token]:
        return [token for word in self._word.finditer(text) for token in self._merge(word.group(), word.start())]

    def _merge(self, word: str, start: int) -> list[Token]:
        if word in self._marks:
            return [Token(self._marks[word], start)]
        letters = byte_letters()
        raw = word.encode()
        merged = self._merger.tokenize("".join(letters[byte] for byte in raw))
        return [Token(t.id, start + len(raw[: t.offsets[0]].decode(errors="ignore"))) for t in merged]


class _Placeholders:
    """Finds placeholders and lets a style split the text between them. The tokenizers library looks for them, since it alone
    knows where in the prompt a place in the cleaned text comes from: each is a word to it, and all else is word 0."""

    def __init__(self, style: _HuggingFace | _OpenAI, placeholders: Mapping[str, tuple[int, ...]]):
        numbers = {"": 0} | {name: number for number, name in enumerate(placeholders, start=1)}
        self._finder = tokenizers.Tokenizer(models.WordLevel(numbers, unk_token=""))
        style.prepare(self._finder)
        longest_first = "|".join(map(re.escape, sorted(placeholders, key=len, reverse=True)))
        self._finder.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SEAM}(?:{longest_first}){SEAM}"), behavior="isolated")
        self._style, self._ids = style, dict(enumerate(placeholders.values(), start=1))

    def split(self, text: str) -> list[Token]:
        """Each piece ends where the next begins, since an accent written apart counts to nobody once it has been composed."""
        found, tokens = self._finder.encode(text, add_special_tokens=False), []
        starts = [start for start, _ in found.offsets]
        for number, (start, stop) in zip(found.ids, pairwise([*starts, len(text)]), strict=True):
            if number in self._ids:
                tokens += [Token(i, start) for i in self._ids[number]]
            else:
                tokens += [Token(i, start + at) for i, at in self._style.split(text[start:stop])]
        return tokens


@lru_cache(maxsize=1)
def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of their ids: printable bytes are themselves, the rest follow U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], tuple[str, ...]]:
    """256 bytes, 256 bytes that end a word, one token a merge, the two marks: 49,408 in all, and the merges."""
    compressed = (files("ldm") / "assets" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = tuple(gzip.decompress(compressed).decode().split("\n")[1 : 1 + CLIP_MERGES])
    letters = list(byte_letters().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), START, END]
    return {word: i for i, word in enumerate(words)}, merges
