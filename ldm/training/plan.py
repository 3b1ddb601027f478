"""A training run on paper: what fits into a GPU, how long all steps take, and what that emits.

Three kinds of numbers, kept apart. Counted: the operations and bytes of a step (`COSTS`, by `benchmarks/step_costs.py`, which
goes through every operation of a forward and a backward pass). The makers' data: a GPU's peak rate and memory (`GPUS`).
Assumed, for the reader to set: which share of the peak a whole step reaches, what a GPU draws, what a kilowatt-hour emits.

Waiting for pictures and for the network between GPUs is not counted: it lowers the share of the peak.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.training.card import Phase, fit, shrunk
from ldm.training.emissions import PowerRecipe, emissions
from ldm.training.unet import UNetRecipe

PARAMETERS = 859_520_964
STATE = 20  # bytes a parameter: float32 weight, gradient, average, and AdamW's two moments
GATHERED = 0.47  # GB: sharded, two layers at a time are whole, weights and gradients; the largest has 29 million weights
RESERVE = 0.1  # share of the memory for CUDA itself, cuDNN's workspaces and what lies between tensors
TEXT = 0.0133  # TFLOP of a caption's states
LATENTS = {256: 0.2727, 512: 1.1167}  # TFLOP of a picture's latents


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of pictures in a forward and a backward pass: TFLOP for each; and GB that are in use at most during either, beside
    weights, gradients and the optimiser's state: a part that is always there, and one for each picture."""

    tflop: float
    forward: tuple[float, float]
    backward: tuple[float, float]

    def memory(self, batch: int) -> float:
        """GB (10^9 bytes) for so many pictures at once."""
        return max(fixed + each * batch for fixed, each in (self.forward, self.backward))

    def largest(self, room: float) -> int:
        """How many pictures so many GB have room for."""
        return max(0, min(math.floor((room - fixed) / each) for fixed, each in (self.forward, self.backward)))


COSTS = {  # pixels, type, gradient checkpointing
    (256, "bfloat16", False): Cost(tflop=0.5416, forward=(1.72, 0.3198), backward=(1.68, 0.3198)),
    (256, "bfloat16", True): Cost(tflop=0.6831, forward=(1.67, 0.0413), backward=(0.17, 0.0569)),
    (256, "float32", False): Cost(tflop=0.5416, forward=(0.00, 0.4899), backward=(0.00, 0.4977)),
    (256, "float32", True): Cost(tflop=0.6831, forward=(0.00, 0.0724), backward=(0.00, 0.0974)),
    (512, "bfloat16", False): Cost(tflop=2.4698, forward=(1.72, 1.2561), backward=(1.68, 1.2560)),
    (512, "bfloat16", True): Cost(tflop=3.1277, forward=(1.67, 0.1420), backward=(0.16, 0.2052)),
    (512, "float32", False): Cost(tflop=2.4698, forward=(0.00, 1.9359), backward=(0.00, 1.9672)),
    (512, "float32", True): Cost(tflop=3.1277, forward=(0.00, 0.2659), backward=(0.00, 0.3658)),
}


@dataclass(frozen=True, kw_only=True)
class GPU:
    """The maker's data: peak TFLOP/s of dense products in bfloat16, and in float32 without tensor cores; memory in GB."""

    bfloat16: float
    float32: float
    memory: float


GPUS = {
    "a100-40gb": GPU(bfloat16=312, float32=19.5, memory=40),
    "a100": GPU(bfloat16=312, float32=19.5, memory=80),
    "h100": GPU(bfloat16=989, float32=67, memory=80),
    "h200": GPU(bfloat16=989, float32=67, memory=141),
    "l40s": GPU(bfloat16=362, float32=91.6, memory=48),
    "rtx4090": GPU(bfloat16=165, float32=82.6, memory=24),
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Of one GPU: `tflops` at its peak, `utilisation` of which a step reaches, GB of `memory` (2^30 bytes). `cached`: latents
    and captions' states are there already; otherwise every picture is encoded once, when it is used."""

    tflops: float = 312.0
    memory: float = 80.0
    utilisation: float = 0.4
    dtype: str = "bfloat16"
    cached: bool = False
    power: PowerRecipe = PowerRecipe()

    def check(self) -> None:
        """Raises ValueError for a number that no GPU has."""
        for name, value in (("tflops", self.tflops), ("memory", self.memory)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} {value:g}; expected more than 0, and finite")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation {self.utilisation:g}; expected more than 0 and at most 1, as in 0.4")
        emissions(0.0, self.power)


WAYS = {  # name: sharded, gradient checkpointing; the first that fits is taken
    "ddp": (False, False),
    "fsdp": (True, False),
    "ddp, checkpointing": (False, True),
    "fsdp, checkpointing": (True, True),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A phase on a number of GPUs. largest: pictures that fit into one at once, for every way. Where nothing fits, or the
    pictures cannot be shared, `problem` says so, and the rest is 0."""

    checkpoint: str
    size: int
    steps: int
    gpus: int
    largest: dict[str, int]
    problem: str = ""
    way: str = ""
    batch: int = 0
    accumulation: int = 0  # of each GPU
    pictures_per_second: float = 0.0
    seconds_per_step: float = 0.0
    hours: float = 0.0
    gpu_hours: float = 0.0
    kwh: float = 0.0
    kg: float = 0.0


def plan(
    recipe: UNetRecipe,
    phases: Sequence[tuple[str, Phase]],
    gpus: Sequence[int],
    assumed: Assumptions,
    *,
    shrink: float = 1.0,
) -> list[Row]:
    """Every phase of a history on every number of GPUs, with the recipe's pictures a step, both shrunk.

    Raises ValueError, one line, where no row comes to anything.
    """
    assumed.check()
    if not gpus or min(gpus) < 1:
        raise ValueError(f"GPUs {', '.join(map(str, gpus))}; expected 1 or more, as in 1,8,64,256")
    rows = []
    for name, phase in phases:
        course = shrunk(dataclasses.replace(recipe, steps=phase.steps), shrink)
        total = course.batch * course.accumulation
        rows += [_row(name, phase.size, course.steps, total, count, assumed) for count in gpus]
    if all(row.problem for row in rows):
        raise ValueError(rows[0].problem)
    return rows


def _row(name: str, size: int, steps: int, total: int, gpus: int, assumed: Assumptions) -> Row:
    largest = {way: largest_batch(size, gpus, way, assumed) for way in WAYS if gpus > 1 or not WAYS[way][0]}
    about: dict[str, Any] = {"checkpoint": name, "size": size, "steps": steps, "gpus": gpus, "largest": largest}
    way = next((way for way, most in largest.items() if most), None)
    if way is None:
        needed = min(_needed(size, gpus, way, assumed) for way in largest)
        return Row(
            **about, problem=f"a picture of {size} px needs {needed:.1f} GB on each of {gpus} GPUs, with {assumed.memory:g}"
        )
    try:
        shared = fit(total, gpus, largest[way])
    except ValueError as error:
        return Row(**about, problem=str(error))
    work = COSTS[size, assumed.dtype, WAYS[way][1]].tflop + (0 if assumed.cached else LATENTS[size] + TEXT)
    speed = gpus * assumed.tflops * assumed.utilisation / work
    hours = steps * total / speed / 3600
    emitted = emissions(hours * gpus, assumed.power)
    about |= {"way": way, "batch": shared.batch, "accumulation": shared.accumulation, "pictures_per_second": speed}
    about |= {"seconds_per_step": total / speed, "hours": hours, "gpu_hours": hours * gpus}
    return Row(**about, kwh=emitted.kwh, kg=emitted.kg)


def state(gpus: int, sharded: bool) -> float:
    """GB (10^9 bytes) of weights, gradients, moments and average on each GPU."""
    whole = PARAMETERS * STATE / 1e9
    return whole / gpus + GATHERED if sharded else whole


def largest_batch(size: int, gpus: int, way: str, assumed: Assumptions) -> int:
    """Pictures of `size` pixels that go through a GPU at once; 0 where not even one does."""
    cost = COSTS[size, assumed.dtype, WAYS[way][1]]
    return cost.largest(_available(assumed) - state(gpus, WAYS[way][0]))


def _available(assumed: Assumptions) -> float:
    return assumed.memory * 2**30 / 1e9 * (1 - RESERVE)


def _needed(size: int, gpus: int, way: str, assumed: Assumptions) -> float:
    """GB (2^30 bytes), the reserve included, for one picture."""
    cost = COSTS[size, assumed.dtype, WAYS[way][1]]
    return (state(gpus, WAYS[way][0]) + cost.memory(1)) / (1 - RESERVE) * 1e9 / 2**30


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    heads = f"{'ddp':>6}{'fsdp':>6}{'ddp c':>7}{'fsdp c':>8}"
    lines = [
        f"{'':<19}{'fits at once':^27}  {'taken':<31}",
        f"{'':<6}{'px':>5}{'GPUs':>8}{heads}  {'way':<8}{'batch x times':>14}{'pictures/s':>12}{'s/step':>9}{'hours':>10}"
        f"{'GPU hours':>11}{'kWh':>8}{'kg CO2':>8}",
    ]
    for row in rows:
        fits = "".join(f"{row.largest.get(way, '-'):>{w}}" for way, w in zip(WAYS, (6, 6, 7, 8), strict=True))
        start = f"{row.checkpoint:<6}{row.size:>5}{row.gpus:>8}{fits}  "
        if row.problem:
            lines.append(start + row.problem)
            continue
        way = row.way.replace(", checkpointing", " c")
        figures = zip((12, 9, 10, 11, 8, 8), dataclasses.astuple(row)[-6:], strict=True)
        numbers = "".join(f"{_rounded(value):>{width}}" for width, value in figures)
        lines.append(f"{start}{way:<8}{f'{row.batch} x {row.accumulation}':>14}{numbers}")
    return "\n".join(lines)


def _rounded(value: float) -> str:
    """To three digits, or to a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
