"""Checkpoints of runs whose state is spread over processes: each writes its own part, and any number of them reads it again.

A checkpoint is a folder, `checkpoint-0001000`, in the format of torch.distributed.checkpoint, with `run.json` beside the
tensors. It is written under another name and renamed when all parts are there; the one before it is removed after that.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm.processes import Processes

PREFIX, TOLD = "checkpoint-", "run.json"


def save(folder: Path, told: Mapping[str, Any], parts: Mapping[str, Any], processes: Processes) -> None:
    """parts: model (nn.Module), optimiser and average of it. told: what JSON can hold; with the number of the step."""
    import torch.distributed.checkpoint as dcp

    whole = folder / f"{PREFIX}{told['step']:07}"
    partial = whole.with_name(whole.name + ".partial")
    if processes.leads:
        shutil.rmtree(partial, ignore_errors=True)
    processes.wait()
    dcp.save(_state(parts), checkpoint_id=partial)
    if processes.leads:
        (partial / TOLD).write_text(json.dumps(told), encoding="utf-8")
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
        for other in folder.glob(f"{PREFIX}*"):
            if other != whole:
                shutil.rmtree(other)
    processes.wait()


def latest(folder: Path) -> dict[str, Any] | None:
    """What the last whole checkpoint tells of its run, None where there is none."""
    found = _last(folder)
    return json.loads((found / TOLD).read_text(encoding="utf-8")) if found else None


def load(folder: Path, parts: Mapping[str, Any]) -> None:
    """Give the parts the state of the last whole checkpoint, each process its own share."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _state(parts)
    dcp.load(state, checkpoint_id=_last(folder))
    parts["model"].load_state_dict(state["model"])
    set_optimizer_state_dict(parts["model"], parts["optimiser"].parts[0], state["optimiser"])
    parts["average"].load_state_dict(state["average"])


def _state(parts: Mapping[str, Any]) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model: nn.Module = parts["model"]
    optimiser = get_optimizer_state_dict(model, parts["optimiser"].parts[0])
    return {"model": model.state_dict(), "optimiser": optimiser, "average": parts["average"].state_dict()}


def _last(folder: Path) -> Path | None:
    whole = [path for path in folder.glob(f"{PREFIX}*") if (path / TOLD).exists() and path.suffix != ".partial"]
    return max(whole, default=None)
