"""What the tests of training share: runs that are killed, their metrics, and how far two results are apart."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def killed(command: list[str], metrics: Path, after: int) -> int:
    """Run until `after` steps are logged, and kill. Its exit status."""
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if metrics.exists() and any(step >= after for step in steps_of(metrics)):
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    return process.wait()


def steps_of(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]


def largest_difference(one: Path, other: Path) -> float:
    """Of all weights but the keys' biases: adding the same to every key changes no softmax, so their gradient is rounding
    alone, which AdamW divides by its own size."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a if not name.endswith("attention.key.bias"))
