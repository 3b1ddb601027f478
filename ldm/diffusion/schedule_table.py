"""What a sampler would do, step by step, without a model: timesteps, noise levels, calls of the network."""

from dataclasses import dataclass, replace
from types import ModuleType

from ldm.diffusion.grid import Grid, signal
from ldm.diffusion.schedule import ScheduleConfig, sigmas


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step: what the network is told, the noise at its start and at its end, and how often the network is asked.

    snr: signal-to-noise ratio at its start, 1 / sigma^2, infinite without noise.
    """

    step: int
    t: float
    sigma: float
    snr: float
    next_sigma: float
    calls: int


def lines(grid: Grid, sampler: ModuleType) -> list[Line]:
    """The steps of `grid` as `sampler` takes them."""
    found, before = [], 0
    for i, step in enumerate(grid):
        calls = sampler.calls(replace(grid, steps=grid.steps[: i + 1]))
        snr = step.sigma**-2
        found.append(Line(step=i, t=step.t, sigma=step.sigma, snr=snr, next_sigma=step.next_sigma, calls=calls - before))
        before = calls
    return found


def uncovered(grid: Grid, schedule: ScheduleConfig) -> str | None:
    """What is lost by beginning with noise at a level below the noisiest that was trained, in words; None for nothing."""
    first, noisiest = grid.steps[0], sigmas(schedule)[-1]
    if first.sigma >= noisiest * (1 - 1e-6):
        return None
    assumed, trained = signal(first.sigma) ** 2, signal(noisiest) ** 2
    return (
        f"begins at t = {first.t:g}, sigma {first.sigma:.4g} of {noisiest:.4g}: the network will take {assumed:.2%} of the "
        f"variance of the noise for an image's, where training went down to {trained:.2%}"
    )


def table(grid: Grid, sampler: ModuleType) -> str:
    """The lines as text."""
    rows = lines(grid, sampler)
    text = [f"{'step':>4} {'t':>9} {'sigma':>10} {'SNR':>10} {'next sigma':>10} {'calls':>5}"]
    for row in rows:
        text.append(f"{row.step:>4} {row.t:>9.3f} {row.sigma:>10.5f} {row.snr:>10.4g} {row.next_sigma:>10.5f} {row.calls:>5}")
    calls = sum(row.calls for row in rows)
    return "\n".join([*text, f"{len(rows)} steps, {calls} calls of the network, from sigma {grid.start_sigma:.5f}"])
