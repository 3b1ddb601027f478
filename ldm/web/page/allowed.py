"""What of gradio may be reached: an ASGI application around it that answers 404 to all that the page does not use.

gradio offers more than this page wants: files, uploads, a proxy, addresses that it fetches, links that save a session to the
disk. None of it passes. What passes has no query, but for the one that names a session's stream, and the body of a call is
written anew from what this page sends: a function that there is, and as many values as it takes, each of its kind. No object is
among them, so that gradio finds no file there that it would read or download. Long values, as pictures are, are set aside for
the function, since gradio keeps what it is given.
"""

import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse

API = "/gradio_api"
JOIN, PREDICT, STREAM = f"{API}/queue/join", f"{API}/run/predict", f"{API}/queue/data"
FIXED = frozenset({"/", "/theme.css", "/favicon.ico", "/manifest.json", f"{API}/app_id"})  # the last to reconnect
STATIC = re.compile(r"/(assets|static)(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}){1,6}")  # no name begins with a dot
SESSION = re.compile(r"[A-Za-z0-9]{1,40}")
DROPPED = (b"origin", b"x-gradio")  # headers: gradio would let other origins read its answers, and use stores of its own
KINDS = {"string": str, "number": (int, float), "boolean": bool, "array": list}  # of JSON Schema
MOST_NUMBER = 1e9
LONG, MOST_HELD = 1 << 16, 128 << 20  # letters of a value that is set aside, and of all such together
SESSIONS = 2000  # that are known, as many as gradio keeps


class Sessions:
    """What the page's functions do not learn from gradio: who listens, and the values that were set aside.

    listeners: how many streams a session has open, for each that has called a function.
    """

    def __init__(self):
        self.listeners: OrderedDict[str, int] = OrderedDict()
        self.held: OrderedDict[str, str] = OrderedDict()

    def join(self, session: str) -> None:
        """A session calls a function."""
        self.listeners.setdefault(session, 0)
        self.listeners.move_to_end(session)
        while len(self.listeners) > SESSIONS:
            self.listeners.popitem(last=False)

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """While a stream of the session is open."""
        self.listeners[session] += 1
        try:
            yield
        finally:
            if session in self.listeners:
                self.listeners[session] -= 1

    def set_aside(self, value: Any) -> Any:
        """The value, or, of a long text, a word for which `taken` gives it once; the oldest go where they are many."""
        if not isinstance(value, str) or len(value) <= LONG:
            return value
        word = secrets.token_urlsafe(24)
        self.held[word] = value
        while len(self.held) > 1 and sum(map(len, self.held.values())) > MOST_HELD:
            self.held.popitem(last=False)
        return word

    def taken(self, value: Any) -> Any:
        return self.held.pop(value, value) if isinstance(value, str) else value


class Allowed:
    """An ASGI application around gradio's.

    calls: by path and by a function's number, the kinds of the values that it takes, as JSON Schema calls them.
    """

    def __init__(self, app, calls: dict[str, dict[int, list[str]]], sessions: Sessions):
        self.app, self.calls, self.sessions = app, calls, sessions

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        asked, path = parse_qs(scope["query_string"].decode("latin-1")), scope["path"]
        headers = [(name, value) for name, value in scope["headers"] if not name.lower().startswith(DROPPED)]
        scope = {**scope, "query_string": b"", "headers": headers}
        if (scope["method"] == "GET" and (path in FIXED or STATIC.fullmatch(path))) or (scope["method"], path) == ("HEAD", "/"):
            await self.app(scope, receive, send)
        elif scope["method"] == "GET" and path == STREAM:
            await self._stream(scope, receive, send, asked.get("session_hash", [""])[0])
        elif scope["method"] == "POST" and path in self.calls:
            await self._call(scope, receive, send)
        else:
            await _refuse(scope, receive, send, 404, f"nothing is at {path[:80]!r}; the page is at / and the API under /v1")

    async def _stream(self, scope, receive, send, session: str) -> None:
        if session not in self.sessions.listeners:
            await _refuse(scope, receive, send, 404, "no such session; load the page again")
            return
        with self.sessions.listening(session):
            await self.app({**scope, "query_string": f"session_hash={session}".encode()}, receive, send)

    async def _call(self, scope, receive, send) -> None:
        try:
            call = self._checked(scope["path"], await Request(scope, receive).body())
        except ValueError as error:
            await _refuse(scope, receive, send, 422, str(error))
            return
        self.sessions.join(call["session_hash"])
        call["data"] = [self.sessions.set_aside(value) for value in call["data"]]
        body = json.dumps(call).encode()
        kept = [(name, value) for name, value in scope["headers"] if name.lower() not in (b"content-length", b"content-type")]
        own = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return messages.pop() if messages else await receive()

        await self.app({**scope, "headers": kept + own}, replay, send)

    def _checked(self, path: str, body: bytes) -> dict[str, Any]:
        """What gradio is told of a call. Raises ValueError."""
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ValueError("the body is no JSON object; use the page at /, or POST /v1/images")
        number, session, data = given.get("fn_index"), given.get("session_hash"), given.get("data")
        kinds = self.calls[path].get(number) if type(number) is int else None
        if kinds is None:
            raise ValueError(f"fn_index {ascii(number)[:40]}; expected one of {sorted(self.calls[path])}")
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise ValueError("session_hash; expected 1 to 40 letters and digits")
        if not isinstance(data, list) or len(data) != len(kinds):
            raise ValueError(f"data; expected a list of {len(kinds)} values")
        for place, (value, kind) in enumerate(zip(data, kinds, strict=True)):
            if not _fits(value, kind):
                raise ValueError(f"value {place} of data is no {kind}; expected what the page's field sends")
        return {"fn_index": number, "session_hash": session, "data": data}


def _fits(value: Any, kind: str) -> bool:
    """Whether a field of this kind sends such a value. An empty text can be null."""
    if value is None:
        return kind == "string"
    if not isinstance(value, KINDS[kind]) or isinstance(value, bool) != (kind == "boolean"):
        return False
    if kind == "number":
        return abs(value) <= MOST_NUMBER  # nor is it NaN
    return all(map(_is_text, value if kind == "array" else [value])) if kind in ("array", "string") else True


def _is_text(value: Any) -> bool:
    """Whether it is text that can be sent back: no half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


async def _refuse(scope, receive, send, status: int, detail: str) -> None:
    await JSONResponse({"detail": detail}, status)(scope, receive, send)
