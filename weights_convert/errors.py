"""The one error this package raises for a file it will not take, and how text out of such a file is shown in it."""

import reprlib

LONGEST = 1200  # characters of a message


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line: the file, the key, what was expected, what was found.

    Names and values in it come from the file, so characters that would break the line or steer a terminal are escaped, and
    what is too long loses its middle.
    """

    def __init__(self, message: str):
        escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in _cut(message))
        super().__init__(_cut(escaped))


def shown(value: object) -> str:
    """A value out of a file as short text, however large or deeply nested it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 80, 80
    return short.repr(value)


def brief(error: Exception) -> str:
    """A library's own complaint as one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST * 3 // 4]} ... {text[5 - LONGEST // 4 :]}"
