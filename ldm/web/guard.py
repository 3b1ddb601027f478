"""What may not pass: a middleware around the whole application, page, API and websockets alike.

- Host names: only those that the server is known under, so that a name that somebody else points at this address (DNS
  rebinding) reaches nothing. An address is no name: where a token is set, any will do.
- Origins: a request comes from a page of this very server, or from no page at all. From elsewhere one may only follow a link.
- A token, where one is set: as `Authorization: Bearer`, as the password of HTTP Basic, or as a cookie, which `/?token=` sets.
- Bodies: of so many bytes, within so many seconds; all large ones that are being read together have a budget. Where no token
  is wanted, none.

A refusal is JSON with one line, `detail`.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit

from starlette.requests import cookie_parser

COOKIE = "ldm_token"
OPEN = ("/health",)  # without a token, and without a body
SMALL = 1 << 20  # bytes of each body that the budget does not count, so that small requests pass when it is spent
RETRY_AFTER = "5"  # seconds, for whom the budget was spent
LINGER_SECONDS, LINGER_BYTES = 2.0, 64 << 20  # of what is still arriving when a refusal has been sent


class Guard:
    """An ASGI application around another.

    hosts: names and addresses, lower case, without ports. most_bytes, seconds: of one body. budget: bytes of all bodies that
    are being read at a time, beyond the first megabyte of each.
    """

    def __init__(
        self,
        app,
        *,
        hosts: frozenset[str],
        token: str | None = None,
        most_bytes: int = 48 << 20,
        seconds: float = 30.0,
        budget: int = 256 << 20,
    ):
        self.app, self.hosts, self.token = app, hosts, token
        self.most_bytes, self.seconds, self.budget, self.held = most_bytes, seconds, budget, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(scope, receive, send, *refusal)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        if self.token is not None and scope["path"] == "/" and _asked_token(scope) is not None:
            await _set_cookie(send, self.token)
            return
        await self._with_body(scope, headers, receive, send)

    def _refusal(self, scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        if name not in self.hosts and not (self.token is not None and _is_address(name)):
            known = ", ".join(sorted(self.hosts))
            return 421, f"this server is not called {host[:80]!r}; expected one of {known} (see --allow-host)"
        if origin is not None and _netloc(origin) != host.lower():
            return 403, f"a page of {origin[:80]!r} may not use this server"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and not _follows_a_link(scope, headers):
            return 403, "another site's page may not use this server"
        if self.token is not None and scope["path"] not in OPEN and not self._has_token(scope, headers):
            return 401, "this server wants its token: Authorization: Bearer TOKEN, the password of Basic, or /?token=TOKEN"
        return None

    def _has_token(self, scope, headers: dict[str, str]) -> bool:
        given = [_authorised(headers.get("authorization", "")), cookie_parser(headers.get("cookie", "")).get(COOKIE)]
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/":
            given.append(_asked_token(scope))
        return any(hmac.compare_digest(one.encode(), self.token.encode()) for one in given if one is not None)

    async def _with_body(self, scope, headers: dict[str, str], receive, send) -> None:
        """Read the whole body first, so that whoever is slow, or sends too much, holds up nobody else."""
        most = 0 if scope["path"] in OPEN else self.most_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            await _refuse(scope, receive, send, 413, f"a body of {length[:20]} bytes; expected at most {most}")
            return
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self.seconds):
                    refusal = await self._read(receive, body, most)
            except TimeoutError:
                refusal = 408, f"the body took more than {self.seconds:g} s; send it faster"
            if refusal is not None:
                await _refuse(scope, receive, send, *refusal)
                return
            handed_on = False

            async def replay():
                nonlocal handed_on
                if handed_on:
                    return await receive()
                handed_on = True
                message = {"type": "http.request", "body": bytes(body), "more_body": False}
                self._forget(body)
                return message

            await self.app(scope, replay, send)
        finally:
            self._forget(body)

    async def _read(self, receive, body: bytearray, most: int) -> tuple[int, str] | None:
        """The whole body into `body`; why not, where that may not be."""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return 400, "the client has left"
            part = message.get("body", b"")
            length = len(body) + len(part)
            if length > most:
                return 413, f"a body of more than {most} bytes; expected fewer"
            counted = _counted(length) - _counted(len(body))
            if self.held + counted > self.budget:
                return 429, "too many large requests at a time; try again later"
            self.held += counted
            body += part
            if not message.get("more_body", False):
                return None

    def _forget(self, body: bytearray) -> None:
        """A body that is no longer the guard's: the memory that it takes while its job waits is the queue's to bound."""
        self.held -= _counted(len(body))
        body.clear()


def _counted(length: int) -> int:
    """The bytes of a body that the budget counts."""
    return max(0, length - SMALL)


def _name(host: str) -> str:
    """A Host header's name, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _netloc(origin: str) -> str | None:
    """An Origin header's host and port, as a Host header has them; None where it is malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _follows_a_link(scope, headers: dict[str, str]) -> bool:
    """Whether a browser opens this as a page of its own: not as a picture, a script, a frame or data of another page."""
    mode, kind = headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")
    return scope["type"] == "http" and scope["method"] == "GET" and mode == "navigate" and kind == "document"


def _authorised(header: str) -> str | None:
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _asked_token(scope) -> str | None:
    values = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
    return values[0] if values else None


async def _set_cookie(send, token: str) -> None:
    """On to the page, with the token where no address shows it. Lax: it goes with a link that was followed from elsewhere, as
    from a terminal in a browser; what another site's page asks for is refused by its origin."""
    cookie = f"{COOKIE}={token}; HttpOnly; SameSite=Lax; Path=/"
    headers = [(b"location", b"/"), (b"set-cookie", cookie.encode()), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 303, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _refuse(scope, receive, send, status: int, detail: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": detail[:120]})
        return
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="ldm"'))
    if status == 429:
        headers.append((b"retry-after", RETRY_AFTER.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await _linger(receive)
    await send({"type": "http.response.body", "body": b""})


async def _linger(receive) -> None:
    """Let what the client is still sending arrive, and forget it.

    Closing a connection with bytes unread resets it, and a reset can overtake the answer (RFC 9112, section 9.6).
    """
    left = LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):  # the whole request, or the client has left
                    return
