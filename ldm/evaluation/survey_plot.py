"""The figure of a survey (`survey.py`): what guidance trades, and what guidance, steps and samplers do to composition."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEEN, HELD_OUT, DISTANCE, INK = "#1d4ed8", "#c2410c", "#64748b", "#1f2937"


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG of a report as `survey.survey` makes it; needs matplotlib (extra `plot`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    (trade, guidance), (steps, samplers) = figure.subplots(2, 2)
    points = {point["name"]: point for point in report["points"]}
    rows = {axis: [points[name] for name in names] for axis, names in report["axes"].items()}
    if "guidance" in rows:
        _trade(trade, rows["guidance"], report["ceiling"]["renders"])
        _lines(guidance, rows["guidance"], "guidance_scale", "guidance scale")
    if "steps" in rows:
        _lines(steps, rows["steps"], "steps", "steps of PNDM")
        steps.set_xscale("log")
        steps.set_xticks(known := [point["steps"] for point in rows["steps"]], map(str, known), minor=False)
        steps.minorticks_off()
    if "sampler" in rows:
        _bars(samplers, rows["sampler"])
    count = report["count"]["prompts of each split"]
    figure.suptitle(
        f"{report['model']}: {count} prompts of seen and {count} of held-out combinations a point; "
        f"distances from {report['count']['renders']:,} renders, on the features of its own CLIP",
        fontsize=10,
        color=INK,
    )
    figure.savefig(path, dpi=110)


def _trade(axes: Any, points: Sequence[Mapping[str, Any]], renders: Mapping[str, Any]) -> None:
    """Downwards and to the right is better; the star is what renders of the prompts' own scenes come to."""
    scores, distances = [point["clip_score"] for point in points], [point["fid"] for point in points]
    axes.plot(scores, distances, color=SEEN, marker="o", markersize=4, linewidth=0.8)
    for point, at in zip(points, zip(scores, distances, strict=True), strict=True):
        axes.annotate(f"{point['guidance_scale']:g}", at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.plot(renders["clip_score"], renders["fid"], color=HELD_OUT, marker="*", markersize=9)
    axes.annotate("renders", (renders["clip_score"], renders["fid"]), xytext=(8, -3), textcoords="offset points", fontsize=8)
    _named(axes, "distance against CLIP score, at guidance scales", "CLIP score, mean cosine", "Frechet distance")


def _lines(axes: Any, points: Sequence[Mapping[str, Any]], field: str, label: str) -> None:
    """Accuracy with its interval, of both splits, and the distance beside it."""
    places = [point[field] for point in points]
    for split, colour in (("seen", SEEN), ("held_out", HELD_OUT)):
        right = [point[split]["all"] for point in points]
        low, high = zip(*(point[split]["interval"] for point in points), strict=True)
        axes.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(places, right, color=colour, marker="o", markersize=3, linewidth=1, label=split.replace("_", " "))
    axes.set_ylim(0, 1.03)
    other = axes.twinx()
    other.plot(places, [point["fid"] for point in points], color=DISTANCE, linestyle="--", linewidth=1)
    other.set_ylabel("Frechet distance (dashed)", fontsize=8, color=DISTANCE)
    other.set_ylim(bottom=0)
    other.tick_params(labelsize=7, colors=DISTANCE)
    axes.legend(fontsize=8, loc="lower right")
    _named(axes, f"composition by {label}", label, "all right, by the judge")


def _bars(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    for shift, (split, colour) in ((-0.2, ("seen", SEEN)), (0.2, ("held_out", HELD_OUT))):
        right = [point[split]["all"] for point in points]
        places = [place + shift for place in range(len(points))]
        errors = [[abs(point[split]["interval"][side] - point[split]["all"]) for point in points] for side in (0, 1)]
        axes.barh(places, right, height=0.38, color=colour, xerr=errors, error_kw={"linewidth": 0.8, "ecolor": INK})
    axes.set_yticks(range(len(points)), [f"{point['sampler']} ({point['fid']:.3f})" for point in points])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.03)
    _named(axes, f"samplers at {points[0]['steps']} steps (and their distances)", "all right, by the judge", "")


def _named(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top"]].set_visible(False)
