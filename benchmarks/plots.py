"""The picture of `benchmarks.speed`'s figures: a panel for each thing timed, a bar for each implementation.

    python -m benchmarks.plots benchmarks/results/speed.json [--out FILE.png]

Needs matplotlib (extra `plot`). The dashed line is the arithmetic at the machine's best rate, measured in the same run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

PANELS = {
    "unet": "UNet, one guided step, s",
    "decode": "decode, s",
    "encode": "encode, s",
    "picture": "picture of {steps} steps, s",
    "peak GB, with a picture": "peak memory, GB",
}
OURS, READ, THEIRS, INK = "#c2410c", "#e7a17c", "#8a94a3", "#1f2937"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what benchmarks.speed --json wrote")
    parser.add_argument("--out", type=Path, help="a PNG (default: the same name)")
    options = parser.parse_args()
    plot(json.loads(options.json.read_text(encoding="utf-8")), options.out or options.json.with_suffix(".png"))


def plot(found: dict[str, Any], path: Path) -> None:
    """found: as `benchmarks.speed` reports it."""
    from matplotlib.figure import Figure

    names = list(found["medians"])
    figure = Figure(figsize=(14, 0.9 + 0.42 * len(names)), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        values = [found["medians"][name].get(column) for name in names]
        known = [value for value in values if value is not None]
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            if value is None:
                axes.text(0, place, " not offered", va="center", color=THEIRS, fontsize=8)
                continue
            colour = OURS if name == "ldm, accelerated" else READ if name.startswith("ldm") else THEIRS
            axes.barh(place, value, color=colour, height=0.65)
            axes.text(value, place, f" {value:.1f}", va="center", color=INK, fontsize=8)
        if column in found.get("floors", {}):
            axes.axvline(found["floors"][column], color=INK, linestyle="--", linewidth=0.8)
        axes.set_title(title.format(**found), fontsize=9, color=INK, loc="left")
        axes.set_xlim(0, 1.2 * max(known, default=1))
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(axis="x", labelsize=7, colors=THEIRS)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
