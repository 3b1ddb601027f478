"""What a run leaves behind, so that it can be watched, stopped at any moment and resumed as if it never had been.

    recipe.json        every setting
    metrics.jsonl      one line a log: step, seconds, figures
    checkpoint.pt      the last whole state: model, average, optimiser, step; a folder where it is sharded (see `sharded.py`)
    sheets/            sample sheets, one a log of its own
    NAME.safetensors   the result

A checkpoint is written beside its name and renamed, so there is always a whole one. Random numbers need no state of their
own: they are functions of seed and step (`ldm.processes.generator`).
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.output.claim import Claim
from ldm.processes import Processes
from ldm.training import sharded

CHECKPOINT, METRICS, RECIPE = "checkpoint.pt", "metrics.jsonl", "recipe.json"
MAY_CHANGE = (
    *("steps", "log_every", "save_every", "sheet_every", "test_every", "unseen"),
    *("compile", "checkpointing", "batch", "accumulation"),
)


class Ledger:
    """The folder of one run. Only the first process writes.

    given: what else than the recipe a resumed run must have in common with what was begun.
    """

    def __init__(
        self, folder: Path, recipe: Any, processes: Processes, *, given: Mapping[str, str] | None = None, quiet: bool = False
    ):
        self.folder, self.recipe, self.processes = folder, recipe, processes
        self.settings = json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
        self.settings |= given or {}
        self.settings["batch x accumulation"] = recipe.batch * recipe.accumulation
        self.sharded = recipe.parallel == "fsdp"
        self.quiet = quiet or not processes.leads
        self.step, self.spent = 0, 0.0
        self.claim: Claim | None = None

    def resume(self, **parts: Any) -> None:
        """Give the parts the state that `save` wrote last, if it ever did. Raises ValueError where the recipe is another, or
        where another run is at work in the folder."""
        if self.processes.leads:
            self.claim = Claim(self.folder)
        path = self.folder / CHECKPOINT
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.exists() else None
        state = whole or sharded.latest(self.folder)
        if state:
            before, now = _flat(state["settings"]), _flat(self.settings)
            # Of batch and accumulation the product may not change.
            changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k) and k not in MAY_CHANGE]
            if changed:
                was = ", ".join(f"{k} {before.get(k)} and not {now.get(k)}" for k in changed[:3])
                raise ValueError(f"{self.folder}: holds a run with {was}; resume it with those, or name another folder")
            self.step, self.spent = state["step"], state["seconds"]
            if whole:
                for name, part in parts.items():
                    part.load_state_dict(whole[name])
            else:
                sharded.load(self.folder, parts)
        self.processes.wait()  # until all have read what the first is about to change
        if self.processes.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / RECIPE, json.dumps(self.settings, indent=2) + "\n")
            self._forget_after(self.step)
        self.processes.wait()
        self.begun = time.monotonic() - self.spent
        self.bar = tqdm(initial=self.step, total=self.recipe.steps, unit="step", disable=self.quiet, mininterval=1)
        self.bar.set_description(self.folder.name)

    @property
    def seconds(self) -> float:
        """Spent on this run so far, before the last stop included."""
        return time.monotonic() - self.begun

    def log(self, step: int, **figures: float) -> None:
        """One line of figures, at the end of a step; shown beside the bar too."""
        if not self.processes.leads:
            return
        line = {"step": step, "seconds": round(self.seconds, 1), **{k: float(f"{v:.6g}") for k, v in figures.items()}}
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in list(figures.items())[:5]}, refresh=False)

    def advance(self) -> None:
        self.bar.update()

    def save(self, step: int, **parts: Any) -> None:
        """A whole state, `step` steps done. All processes may call it; it returns when the file is there."""
        told = {"step": step, "seconds": self.seconds, "settings": self.settings}
        if self.sharded:
            sharded.save(self.folder, told, parts, self.processes)
            return
        if self.processes.leads:
            state = told | {name: part.state_dict() for name, part in parts.items()}
            partial = self.folder / (CHECKPOINT + ".partial")
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / CHECKPOINT)
        self.processes.wait()

    def sheet(self, name: str, rows: list[Tensor]) -> None:
        """Pictures (b, 3, h, w) in [-1, 1], a row of the sheet for each tensor, as one PNG; empty ones leave no row."""
        if not self.processes.leads:
            return
        rows = [torch.cat(list(row.float().cpu().clamp(-1, 1)), dim=2) for row in rows if len(row)]
        widest = max(row.shape[2] for row in rows)
        rows = [F.pad(row, (0, widest - row.shape[2])) for row in rows]
        pixels = ((torch.cat(rows, dim=1) + 1) * 127.5).round().to(torch.uint8)
        (self.folder / "sheets").mkdir(exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(self.folder / "sheets" / f"{name}.png")

    def close(self) -> None:
        self.bar.close()
        self.claim = None

    def _forget_after(self, step: int) -> None:
        """Drop what was logged after the checkpoint that is resumed; it will be logged again."""
        path = self.folder / METRICS
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write(path, "".join(line + "\n" for line in lines))


def write(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line that a kill cut short
        return float("inf")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
