"""What the tests of the command line share: what a command came to, what they make, and how a refusal looks."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm import images
from ldm.output import files
from tests import seeded
from tests.refusal import one_line

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red cube on top of a blue sphere"
SMALL = ("-W", "32", "-H", "24", "--steps", "2", "-q")
PICTURE = Image.fromarray((seeded.values("picture", (24, 32, 3)).view(np.uint32) % 256).astype(np.uint8))


@dataclass(frozen=True)
class Done:
    """What a command came to. paths: the lines on standard output."""

    status: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]

    @property
    def receipts(self) -> list[dict]:
        return [files.read_receipt(path) for path in self.paths]

    @property
    def pictures(self) -> list[np.ndarray]:
        return [np.array(images.read(path)) for path in self.paths]


def start(*words: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-m", "ldm", *map(os.fspath, words)], env=environment, **pipes)


def refused(done: Done, folder: Path, *expected: str, there: int = 0) -> None:
    """One line on standard error and nothing else; of pictures there are no more than before."""
    assert (done.status, done.out) == (1, ""), done
    assert done.err.count("\n") == 1 and "\r" not in done.err, done.err
    message = one_line(done.err[:-1])
    assert message.startswith("ldm: ") and all(text in message for text in expected), message
    out = folder / "out"
    found = os.listdir(out) if out.exists() else []
    assert len(found) == there and not [name for name in found if name.endswith(".partial")]
