"""`ldm serve` as a process: what it prints, answers and refuses."""

import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec

import httpx
import pytest

from ldm.cli import serve

LDM = (sys.executable, "-W", "ignore", "-m", "ldm", "serve")
PAGE = () if find_spec("gradio") else ("--no-page",)


@contextmanager
def served(*arguments: str):
    """The lines that it prints until it has said where it is, and the process."""
    process = subprocess.Popen([*LDM, "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    late = threading.Timer(60, process.kill)
    late.start()
    try:
        yield process, process.stdout.readline()
    finally:
        late.cancel()
        process.kill()
        process.communicate()


def refused(*arguments: str) -> str:
    done = subprocess.run([*LDM, *arguments], capture_output=True, text=True, timeout=60)
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    return lines[0]


def test_it_says_where_it_is_answers_there_and_stops_when_told():
    with served(*PAGE) as (process, line):
        url = re.search(r"http://127\.0\.0\.1:\d+", line).group()
        health = httpx.get(f"{url}/health", timeout=60).json()
        assert health == {"status": "ok", "model": "bundled"} and line.startswith("bundled: ")
        assert httpx.get(url, timeout=60).status_code == (404 if PAGE else 200)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_beyond_the_loopback_address_it_wants_the_token_that_it_prints():
    with served("--host", "0.0.0.0", "--no-page") as (process, line):
        port = re.search(r":(\d+)/v1", line).group(1)
        url = f"http://127.0.0.1:{port}"
        token = process.stdout.readline().removeprefix("token: ").strip()
        assert len(token) >= 24 and httpx.get(f"{url}/v1/form", timeout=60).status_code == 401
        good = {"Authorization": f"Bearer {token}"}
        assert httpx.get(f"{url}/v1/form", headers=good, timeout=60).status_code == 200
        shown = re.search(r"http://\S+/v1", line).group()  # an address that others can call
        assert "0.0.0.0" not in line
        assert httpx.get(f"{shown}/form", headers=good, timeout=60, trust_env=False).status_code == 200


@pytest.mark.parametrize(
    ("bound", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("::1", "[::1]"), ("0.0.0.0", None), ("::", None)],
)
def test_the_address_that_it_says_is_one_to_call_it_by(bound, shown):
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    try:
        listener = socket.create_server((bound, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {bound}")
    with listener:
        named = serve._reachable(bound, listener)
        assert shown is None or named == shown
        with socket.create_connection((named.strip("[]"), listener.getsockname()[1]), timeout=10):
            pass


def test_what_it_cannot_do_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen there" in refused("--port", str(taken.getsockname()[1]), *PAGE)
    assert "expected 0 to 65535" in refused("--port", "70000", *PAGE)
    assert "expected 1 to" in refused("--queue", "0", *PAGE)
    assert "no such folder" in refused("--adapter-folder", "/nowhere", *PAGE)
    assert "must have 8 of them" in refused("--token", "short", *PAGE)
