"""The picture of the guidance Pareto: CLIP score and FID of each scale, joined in order (extra `plot`)."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG of a report as `ldm.evaluation.pareto` makes it. Downwards and to the right is better."""
    from matplotlib.figure import Figure

    points = report["points"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    scores, distances = [point["clip_score"] for point in points], [point["fid"] for point in points]
    axes.plot(scores, distances, color="tab:blue", marker="o", markersize=4, linewidth=0.8)
    for point, at in zip(points, zip(scores, distances, strict=True), strict=True):
        axes.annotate(f"{point['guidance_scale']:g}", at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    settings = report["settings"]
    axes.set_title(
        f"{report['model']['name']}: {report['count']:,} captions, {settings['steps']} steps of {settings['sampler']}; "
        "labels are guidance scales",
        fontsize=9,
    )
    axes.set_xlabel(f"CLIP score, mean cosine ({report['clip_score']['instrument']})")
    axes.set_ylabel(f"{report['fid']['label']} ({report['fid']['instrument']})\nresized: {report['fid']['resize']}", fontsize=8)
    figure.savefig(path, dpi=120)
