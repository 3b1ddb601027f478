"""Letters and their positions: what the reader of compel's syntax stands on.

A `Source` is the text to read, a `Scanner` a place in it that moves forward over what it is asked for, or stays.
"""

import re
import string
from dataclasses import dataclass
from typing import Any

from ldm.text.prompt import Fragment, PromptError

SYNTAX = '(),".+-='
NUMBER = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+)|-?\d+")
KEYWORD = re.compile(r"[A-Za-z0-9_-]+")
SIGNS = re.compile(r"\++|-+")


@dataclass(frozen=True)
class Source:
    """Characters, and for each where it stands in the prompt as given (there is one position more, for the end)."""

    text: str
    positions: list[int]

    @classmethod
    def of(cls, text: str) -> "Source":
        """With a blank after each comma that has none."""
        letters, positions, skip = [], [], False
        for i, letter in enumerate(text):
            letters.append(letter)
            positions.append(i)
            follows = text[i + 1 : i + 2]
            skip = letter == "," and not skip and follows != "" and not follows.isspace()
            if skip:
                letters.append(" ")
                positions.append(i)
        return cls("".join(letters), [*positions, len(text)])

    def part(self, start: int, end: int) -> "Source":
        r"""What stands between two quotes; a quote in it, `\"`, opens and closes a quotation of its own."""
        return Source(self.text[start:end], self.positions[start : end + 1])

    def error(self, at: int, what: str) -> PromptError:
        return PromptError(f"position {self.positions[min(at, len(self.text))] + 1}: {what}")

    def number(self, value: Any, at: int) -> float:
        if not isinstance(value, float):
            raise self.error(at, f"{value!r} is no weight; expected a number")
        return value


class Scanner:
    """Reads from `at` onwards. Where what a method looks for is not there, it returns None or False and leaves `at` alone."""

    def __init__(self, source: Source):
        self.source, self.at = source, 0

    def match(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self.source.text, self.blank())
        if found is None:
            return None
        self.at = found.end()
        return found.group()

    def take(self, literal: str, then: str = "") -> bool:
        """Step over the literal, and what must follow it, if they are there."""
        start = self.at
        for part in (literal, then) if then else (literal,):
            if not self.source.text.startswith(part, self.blank()):
                self.at = start
                return False
            self.at += len(part)
        return True

    def blank(self) -> int:
        """Step over white space."""
        while self.at < len(self.source.text) and self.source.text[self.at] in string.whitespace:
            self.at += 1
        return self.at

    def word(self) -> Fragment | None:
        """Letters that mean nothing here: no syntax but what is escaped, and signs with a letter after them."""
        text, start = self.source.text, self.blank()
        end = start
        while end < len(text):
            follows = text[end + 1 : end + 2]
            if text[end] == "\\" and follows and follows in SYNTAX:
                end += 2
            elif text[end] in "+-" and follows and not follows.isspace() and follows not in SYNTAX:
                end += 1
            elif text[end] in string.whitespace or text[end] in SYNTAX:
                break
            else:
                end += 1
        self.at = end
        return Fragment(_unescaped(text[start:end])) if end > start else None

    def free_word(self) -> Fragment:
        """Anything up to the next white space, as long as its brackets and quotes are escaped."""
        text, start = self.source.text, self.at
        while self.at < len(text) and text[self.at] not in string.whitespace:
            letter = text[self.at]
            if letter == "\\":
                self.at += 1
            elif letter in '()"':
                what = "no bracket is open" if letter == ")" else "it stands within a word"
                raise self.source.error(self.at, f"unexpected {letter} ({what}); write \\{letter} where it is text")
            self.at += 1
        self.at = min(self.at, len(text))
        return Fragment(_unescaped(text[start : self.at]))

    def options(self) -> list[tuple[str, Any]] | None:
        """name=value, a number, or a word each, separated by commas; None where one cannot be read."""
        found: list[tuple[str, Any]] = []
        if self.source.text[self.blank() : self.at + 1] == ")":
            return found
        while True:
            start = self.at
            keyword = self.match(KEYWORD)
            if keyword and self.take("="):
                value = self.match(NUMBER)
                value = self.match(KEYWORD) if value is None else float(value)
                found.append((keyword, value))
            else:
                self.at = start
                number = self.match(NUMBER)
                value = self.match(KEYWORD) if number is None else float(number)
                found.append(("", value))
            if value is None:
                return None
            if not self.take(","):
                return found


def _unescaped(text: str) -> str:
    return text.replace("\\(", "(").replace("\\)", ")").replace('\\"', '"')
