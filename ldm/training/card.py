"""What Stable Diffusion v1's model card says of its training, as data, and the same course on a smaller scale.

The recipe is a file, `stable_diffusion_v1.toml`. Here are the checkpoints' histories, how a batch of 2048 pictures is shared by
any number of GPUs, and `shrunk`, with which a run is rehearsed before it is paid for.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ldm.training.unet import UNetRecipe

RECIPE = Path(__file__).with_name("stable_diffusion_v1.toml")
NODE = 8  # GPUs, at most
CARD_HOURS = 150_000  # of one A100 PCIe with 40 GB: what the card says all of v1 took


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a step's pictures are shared: `batch` go through a GPU at once, `accumulation` times on each."""

    nodes: int = 32
    gpus: int = 8
    accumulation: int = 2
    batch: int = 4

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus

    @property
    def micro_batches(self) -> int:
        """Of all GPUs together: what a recipe calls `accumulation`."""
        return self.processes * self.accumulation

    @property
    def total(self) -> int:
        """Pictures of a step."""
        return self.micro_batches * self.batch


def fit(total: int, processes: int, largest_batch: int) -> BatchPlan:
    """A step of `total` pictures on so many GPUs, of which each can take `largest_batch` at once; in as few parts as can be.

    Raises ValueError where the GPUs cannot share the pictures evenly, or can take none.
    """
    if min(total, processes) < 1:
        raise ValueError(f"{total} pictures on {processes} GPUs; expected 1 or more of both")
    if largest_batch < 1:
        raise ValueError(f"a micro-batch of {largest_batch} pictures; expected room for 1 or more")
    if total % processes:
        near = [n for n in range(1, min(total, 2 * processes) + 1) if total % n == 0]
        below, above = max((n for n in near if n < processes), default=0), min((n for n in near if n > processes), default=0)
        others = " or ".join(str(n) for n in (below, above) if n)
        raise ValueError(f"{total} pictures do not divide among {processes} GPUs; take {others}")
    share = total // processes
    batch = next(size for size in range(min(share, largest_batch), 0, -1) if share % size == 0)
    gpus = processes if processes <= NODE else math.gcd(processes, NODE)
    return BatchPlan(nodes=processes // gpus, gpus=gpus, accumulation=share // batch, batch=batch)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some steps at one size, on one of LAION's sets. dropout: the share of empty captions."""

    steps: int
    size: int = 512
    data: str
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """start: of which checkpoint it was trained on; "" for none."""

    start: str
    phases: tuple[Phase, ...]


CHECKPOINTS = {
    "v1-1": Checkpoint(
        start="",
        phases=(Phase(steps=237_000, size=256, data="laion2B-en"), Phase(steps=194_000, data="laion-high-resolution")),
    ),
    "v1-2": Checkpoint(start="v1-1", phases=(Phase(steps=515_000, data="laion-improved-aesthetics"),)),
    "v1-3": Checkpoint(start="v1-2", phases=(Phase(steps=195_000, data="laion-improved-aesthetics", dropout=0.1),)),
    "v1-4": Checkpoint(start="v1-2", phases=(Phase(steps=225_000, data="laion-aesthetics v2 5+", dropout=0.1),)),
}


def history(name: str) -> list[tuple[str, Phase]]:
    """Every phase that led to a checkpoint, the first one first, with the checkpoint that it belongs to."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint {name!r}; expected one of {', '.join(CHECKPOINTS)}")
    checkpoint = CHECKPOINTS[name]
    before = history(checkpoint.start) if checkpoint.start else []
    return [*before, *((name, phase) for phase in checkpoint.phases)]


def shrunk(recipe: UNetRecipe, factor: float) -> UNetRecipe:
    """The same course on a smaller scale: everything that is counted in steps or pictures, divided by `factor`, 1 or more.

    - `steps`, `warm_up`, `log_every`, `save_every`, `sheet_every`: the learning rate's curve, the logs and the sheets look the
      same, drawn over fewer steps.
    - The moving average's horizon, 1 / (1 - ema) steps, so that the average forgets the same share of the run.
    - The pictures of a step, first in fewer micro-batches, then in smaller ones.

    So factor^2 times fewer pictures are seen. What is no count stays: the learning rate, though a smaller batch may want a
    smaller one, and the rest of the optimiser; `cool_down` and `dropout`, which are shares; data, model and seed.
    Whole numbers are rounded, and are never 0 but where they were. Raises ValueError for a factor below 1.
    """
    if not 1 <= factor < math.inf:
        raise ValueError(f"shrinking by {factor:g}; expected a number from 1")

    def part(value: int) -> int:
        return min(value, max(1, round(value / factor)))

    average = max(0.0, recipe.optimiser.ema - (factor - 1) * (1 - recipe.optimiser.ema))  # 1 - ema, times the factor
    optimiser = dataclasses.replace(recipe.optimiser, warm_up=part(recipe.optimiser.warm_up), ema=average)
    pictures = recipe.batch * recipe.accumulation / factor
    whole = pictures >= recipe.batch  # micro-batches remain
    return dataclasses.replace(
        recipe,
        optimiser=optimiser,
        steps=part(recipe.steps),
        batch=recipe.batch if whole else max(1, round(pictures)),
        accumulation=part(recipe.accumulation) if whole else 1,
        log_every=part(recipe.log_every),
        save_every=part(recipe.save_every),
        sheet_every=part(recipe.sheet_every),
    )
