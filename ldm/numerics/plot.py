"""The picture of a diagnosis: differences in the order of execution, whole and added (extra `plot`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.numerics.diagnosis import Diagnosis

FLOOR = 1e-9  # what equal tensors are drawn at


def check(path: str | Path) -> None:
    """Raises ImportError where matplotlib is missing, and ValueError where `path` is no PNG's name, or in no folder."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot {path}; expected the name of a PNG")
    if not path.parent.is_dir():
        raise ValueError(f"plot {path}: there is no folder {path.parent}; create it first")
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib; install it with: pip install 'ldm[plot]'")


def plot(found: Diagnosis, path: str | Path) -> None:
    """Write a PNG, to a path that `check` has passed."""
    from matplotlib.figure import Figure

    rows = found.comparison.rows
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot()
    places: dict[Any, int] = {row.key: place for place, row in enumerate(rows)}
    axes.plot([max(row.relative, FLOOR) for row in rows], color="tab:blue", linewidth=0.8, label="difference")
    added = [(places[key], max(row.relative, FLOOR)) for key, row in found.added.items() if key in places]
    if added:
        axes.scatter(*zip(*added, strict=True), s=4, color="tab:orange", label="added by the part itself")
    if found.guilty is not None and found.guilty.key in places:
        at = places[found.guilty.key]
        axes.axvline(at, color="tab:red", linewidth=0.8)
        axes.annotate(str(found.guilty.key), (at, 1), xycoords=("data", "axes fraction"), va="top", color="tab:red", fontsize=8)
    for call in sorted({row.key.call for row in rows if row.key.call is not None}):
        axes.axvline(next(p for p, row in enumerate(rows) if row.key.call == call), color="0.85", linewidth=0.5, zorder=0)
    axes.set(yscale="log", xlabel="tensors in the order of execution; a grey line where a call of the network begins")
    axes.set(ylabel="relative difference", xlim=(0, max(len(rows) - 1, 1)))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
