"""What a malformed request is answered: 422 with a list `detail` of {type, loc, msg}, whatever was in it.

FastAPI's own answer repeats the input, which JSON cannot always carry back: an infinity, half of a surrogate pair, bytes. It
would fail there with a 500, or send 40 MB back to whoever sent them.
"""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

MOST = 20  # details that are told of one request
LONGEST = 1000  # letters of a text in one


def add(app: FastAPI) -> None:
    """So that its own routes answer thus. What is mounted in it has its own refusals, as the page has."""
    app.add_exception_handler(RequestValidationError, _refuse)


async def _refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    details = [
        {"type": _text(one["type"]), "loc": [_text(part) for part in one["loc"]], "msg": _text(one["msg"])}
        for one in error.errors()[:MOST]
    ]
    return JSONResponse({"detail": details}, status_code=422)


def _text(part: Any) -> Any:
    """Text that UTF-8 can carry: a ? for each lone surrogate. Numbers, which are positions in lists, stay as they are."""
    return part[:LONGEST].encode(errors="replace").decode() if isinstance(part, str) else part
