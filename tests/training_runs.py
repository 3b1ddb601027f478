"""What the tests of training share: a recipe, runs that are killed, their metrics, and how far two results are apart."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from ldm.cli import run

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
[autoencoder]
steps = 10
batch = 4
log_every = 2
save_every = 2
sheet_every = 5
unseen = 16
model = { level_widths = [8, 8, 16, 16], residual_blocks = 1, norm_groups = 4 }
data = { count = 48, seed = 1 }
optimiser = { name = "muon", learning_rate = 2e-3, warm_up = 3 }

[clip]
steps = 10
batch = 8
log_every = 2
save_every = 2
test_every = 5
unseen = 16
vocabulary = "scenes"
text = { vocabulary_size = 645, width = 32, layers = 2, heads = 2, mlp_width = 64 }
image = { image_size = 64, patch_size = 16, width = 32, layers = 2, heads = 2, mlp_width = 64, projection_width = 32 }
data = { count = 48, seed = 1 }

[unet]
steps = 10
batch = 4
log_every = 2
save_every = 2
sheet_every = 5
min_snr = 5.0
data = { count = 48, seed = 1 }
optimiser = { learning_rate = 1e-3, warm_up = 3 }

[unet.model]
level_widths = [16, 32]
attention_levels = [true, true]
heads = 4
context_width = 32
norm_groups = 8
sample_size = 8
"""
RESULT = {
    "autoencoder": "model/autoencoder.safetensors",
    "clip": "model/text_encoder.safetensors",
    "unet": "model/unet.safetensors",
}


def opened(folder: Path) -> "Workshop":
    """A workshop with the recipe, and an autoencoder and a text encoder to train UNets on."""
    (folder / "recipe.toml").write_text(RECIPE)
    shop = Workshop(folder)
    for stage in ("autoencoder", "clip"):
        shop.train(stage, folder / stage)
    return shop


class Workshop:
    """How to call `ldm train` with them."""

    def __init__(self, folder):
        self.folder = folder

    def command(self, stage, out, *settings, processes=1):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
        command = [sys.executable, *launch, "-m", "ldm", "train", stage, "--out", out, "--recipe", self.folder / "recipe.toml"]
        command += [part for setting in settings for part in ("--set", setting)]
        if stage == "unet":
            models = {"--autoencoder": "autoencoder", "--text-encoder": "clip"}
            command += [part for option, name in models.items() for part in (option, self.folder / name / "model")]
        return [*map(str, command), "--device", "cpu", "--quiet", "--debug"]

    def train(self, stage, out, *settings, processes=1):
        """Train in this process, or in several."""
        command = self.command(stage, out, *settings, processes=processes)
        if processes == 1:
            assert run(command[command.index("train") :]) == 0
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(command, env=environment(), cwd=out.parent, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        return out / RESULT[stage]


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


def one_killed(command: list[str], metrics: Path, after: int, rank: int = 1) -> subprocess.CompletedProcess:
    """Run under torchrun until `after` steps are logged, and kill one of its processes."""
    agent = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while agent.poll() is None and time.monotonic() < until:
        if metrics.exists() and any(step >= after for step in steps_of(metrics)):
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            is_it = f"\0RANK={rank}\0"
            os.kill(next(int(pid) for pid in children if is_it in Path(f"/proc/{pid}/environ").read_text()), signal.SIGKILL)
            break
        time.sleep(0.005)
    out, errors = agent.communicate(timeout=60)
    return subprocess.CompletedProcess(command, agent.returncode, out, errors)


def steps_of(metrics: Path) -> list[int]:
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines() if line.endswith("}")]


def largest_difference(one: Path, other: Path) -> float:
    """Of all weights but the keys' biases: adding the same to every key changes no softmax, so their gradient is rounding
    alone, which AdamW divides by its own size."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a if not name.endswith("attention.key.bias"))
