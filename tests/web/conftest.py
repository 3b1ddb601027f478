"""A server on a free port of the loopback address, with the bundled model or a tiny random one, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

import ldm

if find_spec("fastapi") and find_spec("uvicorn") and find_spec("httpx"):
    import httpx

    from ldm.web import server as serving
else:  # the extra web is not installed
    collect_ignore_glob = ["test_*.py"]

PROMPT = "a red cube on top of a blue sphere"


class Running:
    """A server that answers: its address, its queue, and a client for it."""

    def __init__(self, server, port: int):
        self.server, self.port = server, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.jobs = server.config.app.app.state.jobs


@contextmanager
def running(components, **options) -> Iterator[Running]:
    options = {"port": 0, "page": False, **options}
    asked = serving.with_token(serving.Options(**options))
    server = serving.server(components, asked)
    listener = socket.create_server((asked.host, 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 90
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    found = Running(server, listener.getsockname()[1])
    try:
        yield found
    finally:
        found.client.close()
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="session")
def bundled():
    return ldm.load()


@pytest.fixture(scope="module")
def server(bundled) -> Iterator[Running]:
    with running(bundled) as found:
        yield found
