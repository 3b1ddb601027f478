"""One implementation, timed in a process of its own: `benchmarks/speed.py` runs these, and reads their last line, JSON."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.contenders import CONTENDERS


def measure(name: str, folder: Path, dtype: str, steps: int, cases: list[str]) -> dict[str, float]:
    """Seconds of everything in one process: the median of the calls after the first, which is `... first`."""
    start = time.perf_counter()
    contender = CONTENDERS[name](folder, dtype)
    found = {"import": time.perf_counter() - start}
    start = time.perf_counter()
    contender.load()
    found["load"] = time.perf_counter() - start
    import torch

    with torch.no_grad():
        contender.prepare()
        for case in ("text", "unet", "decode", "encode"):
            if case in cases and getattr(contender, case) is not None:
                found |= _timed(case, getattr(contender, case))
        found["peak GB"] = _peak()
        if "picture" in cases and contender.picture is not None:
            contender.picture(1)
            found |= _timed("picture", lambda: contender.picture(steps), first=False)
            found["peak GB, with a picture"] = _peak()
        if getattr(contender, "seconds", None):  # what it says of its own steps
            found["unet"] = statistics.median(contender.seconds)
    return found


def _timed(case: str, call: Callable[[], object], *, first: bool = True, budget: float = 6.0) -> dict[str, float]:
    found, seconds = {}, []
    if first:
        start = time.perf_counter()
        call()
        found[f"{case} first"] = time.perf_counter() - start
    while not seconds or (sum(seconds) < budget and len(seconds) < 20):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {case: statistics.median(seconds), **found}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    name, folder, dtype, steps, cases = sys.argv[1:]
    print(json.dumps(measure(name, Path(folder), dtype, int(steps), cases.split(","))))
