"""Commands by several processes each, as torchrun would start them, but forked from one that has imported everything already.

`python -m tests.ranks` reads [[COUNT, [WORD, ...]], ...] and prints [[STATUS, OUT, ERR], ...], as JSON. Where a process ends in
failure the others are told to stop, as torchrun does; the status is then 1.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.command_line import Done

ROOT = Path(__file__).resolve().parents[1]


def run(*commands: tuple[int, list[str]]) -> list[Done]:
    """What each command, by so many processes, came to, one after the other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    starts = [sys.executable, "-m", "tests.ranks"]
    said = subprocess.run(starts, env=environment, cwd=ROOT, input=json.dumps(commands), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return [Done(*done) for done in json.loads(said.stdout)]


def _command(count: int, words: list[str]) -> tuple[int, str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = _ended([_forked(rank, count, port, words, (out, err)) for rank in range(count)])
        out.seek(0), err.seek(0)
        return status, out.read(), err.read()


def _forked(rank: int, count: int, port: int, words: list[str], pipes: tuple) -> int:
    """A process that runs the command; its id."""
    child = os.fork()
    if child:
        return child
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in about.items()}
    for pipe, number in zip(pipes, (1, 2), strict=True):
        os.dup2(pipe.fileno(), number)
    import ldm.cli

    ldm.cli.main(words)
    raise AssertionError("the command line has returned")


def _ended(ranks: list[int]) -> int:
    """Wait for all of them; whether one has failed."""
    failed = False
    while ranks:
        child, status = os.wait()
        ranks.remove(child)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return int(failed)


def main() -> None:
    import ldm.pipelines.bulk  # what takes its time, before the forks

    assert ldm.pipelines.bulk
    done = [_command(*command) for command in json.load(sys.stdin)]
    print(json.dumps(done))


if __name__ == "__main__":
    main()
