"""The application: page, APIs, health and metrics over one queue, behind the guard; and the process that serves it.

It listens on the loopback address unless told otherwise, and then wants a token. Nothing that a request names is looked for
outside the model's and the adapters' folders; no address that a request names is ever visited.
"""

import asyncio
import ipaddress
import re
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

import ldm
from ldm.checkpoint import Components
from ldm.web import a1111, images_api, refusals
from ldm.web.form import Limits
from ldm.web.guard import Guard
from ldm.web.jobs import Jobs

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TOKEN = re.compile(r"[A-Za-z0-9_-]{8,}")
HEADER_SECONDS = 15.0  # for a client to say what it wants
TAKE_SECONDS = 60.0  # for a client to take more of its answer
CONNECTIONS = 128


@dataclass(frozen=True, kw_only=True)
class Options:
    """host, port: where to listen. names: by which others call this server, beside the address itself. token: what clients must
    show; drawn where it is None and the address is not loopback. bound: jobs that may wait. page: whether there is
    one, at /."""

    host: str = "127.0.0.1"
    port: int = 7860
    names: tuple[str, ...] = ()
    token: str | None = None
    bound: int = 16
    page: bool = True
    limits: Limits = field(default_factory=Limits)


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_token(options: Options) -> Options:
    """The options with a token where one is needed. Raises ValueError for one that cannot be used."""
    token = options.token
    if token is None and not is_loopback(options.host):
        token = secrets.token_urlsafe(24)
    if token is not None and not TOKEN.fullmatch(token):
        raise ValueError("the token may have letters, digits, - and _, and must have 8 of them or more")
    return Options(**{**options.__dict__, "token": token})


def application(components: Components, options: Options) -> Guard:
    """The whole as an ASGI application."""
    jobs = Jobs(components, bound=options.bound)

    @asynccontextmanager
    async def life(_: FastAPI):
        yield
        await asyncio.to_thread(jobs.close)

    about = "Pictures from prompts, over one Stable Diffusion v1 checkpoint."
    app = FastAPI(title="ldm", version=ldm.__version__, description=about, lifespan=life, docs_url=None, redoc_url=None)
    app.state.jobs = jobs
    app.include_router(images_api.router(jobs, options.limits))
    app.include_router(a1111.router(jobs, options.limits))
    _add_health(app, jobs)
    if options.page:
        from ldm.web import page

        page.mount(app, jobs, options.limits)
    refusals.add(app)
    hosts = frozenset(name.lower() for name in (*LOOPBACK, options.host, *options.names))
    return Guard(app, hosts=hosts, token=options.token)


def _add_health(app: FastAPI, jobs: Jobs) -> None:
    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether pictures are made here."""
        return {"status": "ok" if jobs.thread.is_alive() else "stopped", "model": jobs.components.name}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        """Counts, for Prometheus."""
        lines = [f"ldm_jobs_waiting {len(jobs.waiting)}", f"ldm_jobs_running {len(jobs.running)}"]
        lines += [f'ldm_jobs_total{{state="{state}"}} {count}' for state, count in jobs.totals.items() if state != "pictures"]
        return "\n".join([*lines, f"ldm_pictures_total {jobs.totals['pictures']}", ""])


class Impatient(H11Protocol):
    """A connection that is given up where no request comes, and where an answer is not taken.

    Both would otherwise be kept for ever: uvicorn waits without end for the rest of a request that has begun, and for whoever
    does not read what was sent.
    """

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing whenever something is left to send, however little
        self.asking: asyncio.TimerHandle | None = None
        self.taking: asyncio.TimerHandle | None = None
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_request()

    def _await_request(self) -> None:
        """A request's time begins with its first byte (the first one's with the connection) and ends when its head is there."""
        if not self._is_busy():
            self.asking = self.asking or self.loop.call_later(HEADER_SECONDS, self._give_up)
        elif self.asking is not None:
            self.asking.cancel()
            self.asking = None

    def _is_busy(self) -> bool:
        """Whether a request is being answered, or the connection has become a websocket."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return answering or self.transport.get_protocol() is not self

    def _give_up(self) -> None:
        if not self._is_busy() and not self.transport.is_closing():
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.taking.cancel()

    def _await_taking(self) -> None:
        left = self.transport.get_write_buffer_size()
        self.taking = self.loop.call_later(TAKE_SECONDS, self._look_at_taking, left)

    def _look_at_taking(self, left: int) -> None:
        """Slow is not stuck: only where nothing was taken is the connection cut off, with what is left to send."""
        if self.transport.get_write_buffer_size() < left:
            self._await_taking()
        else:
            self.transport.abort()

    def connection_lost(self, exc) -> None:
        for timer in (self.asking, self.taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


def server(components: Components, options: Options) -> uvicorn.Server:
    """What `run()` serves until it is stopped."""
    config = uvicorn.Config(
        application(components, options),
        host=options.host,
        port=options.port,
        http=Impatient,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    return uvicorn.Server(config)
