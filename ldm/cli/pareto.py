"""`ldm evaluate --captions FILE --reference DIR --out DIR`: FID against CLIP score, a point for each guidance scale."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options, sharing
from ldm.cli.progress import StageBar

if TYPE_CHECKING:
    from ldm.evaluation.pareto import Plan

OWN = ("reference", "out", "cache", "clip", "inception", "resize", "batch_size")  # options that composition has no use for

NO_PLOT = "no plot without matplotlib; install it with: pip install 'ldm[plot]', and give the same command again"


def add(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("with --captions")
    group.add_argument("--reference", type=Path, metavar="DIR", help="pictures to compare with, also in folders of that folder")
    group.add_argument("--out", type=Path, metavar="DIR", help="pictures and figures; the same command goes on with them")
    group.add_argument("--cache", type=Path, metavar="DIR", help="where the reference's statistics are kept (default: --out)")
    group.add_argument(
        "--clip", metavar="SOURCE", help="the CLIP: bundled, or a folder that has both its towers (default: the model's own)"
    )
    group.add_argument(
        "--inception", type=Path, metavar="FILE", help="Inception's weights, for the FID (default: it is of CLIP's features)"
    )
    group.add_argument(
        "--resize", action="append", metavar="NAME", help="none or bicubic, for CLIP; legacy or clean, for Inception"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="pictures that are made together (default 4)")


def run(args: argparse.Namespace, scales: list[float] | None) -> None:
    from ldm.evaluation import pareto

    said = "interrupted; the same command goes on where it was"
    with sharing.shared(args, said) as (args, agreement):
        plan = agreement.each(lambda: _plan(args, scales))
        components, clip, instrument = agreement.each(lambda: _loaded(args))
        with StageBar(args) as bar:
            report = pareto.measure(components, plan, agreement, clip=clip, instrument=instrument, tell=bar.tell)
        if agreement.processes.leads:
            _show(report, plan, args)


def _plan(args: argparse.Namespace, scales: list[float] | None) -> "Plan":
    """What is asked for, checked before anything is loaded."""
    from ldm.evaluation import caption_file, embeddings
    from ldm.evaluation.pareto import SCALES, STEPS, Plan
    from ldm.pipelines.settings import checked

    for name in ("reference", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--captions needs --{name} DIR too")
    if args.count is not None and args.count < 1:
        raise ValueError(f"count {args.count}; expected 1 or more")
    options.check_folder(args.json)
    if args.cache and not args.cache.is_dir():
        raise ValueError(f"{args.cache}: is no folder; create it first, or leave out --cache")
    names = ("steps", "sampler", "spacing", "convention", "batch_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = {"steps": STEPS, **given, "seed": args.seed, "safety": "off"}  # black pictures would count as pictures
    for scale in scales or SCALES:
        checked({**settings, "guidance_scale": scale})
    captions = caption_file.read(args.captions, args.count)
    embeddings.pictures_below(args.reference)
    return Plan(
        captions=captions,
        reference=args.reference,
        out=args.out,
        scales=tuple(scales or SCALES),
        settings=settings,
        cache=args.cache,
    )


def _loaded(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, the CLIP, and what the FID is seen through."""
    from ldm.evaluation import features, inception

    resizes = dict.fromkeys(("clip", "inception"))
    for name in args.resize or ():
        kind = "clip" if name in features.CLIP_RESIZES else "inception" if name in inception.RESIZES else None
        if kind is None or (kind == "inception" and args.inception is None):
            allowed = [*features.CLIP_RESIZES, *(inception.RESIZES if args.inception else ())]
            raise ValueError(f"resize {name!r}; expected one of {', '.join(allowed)}")
        resizes[kind] = name
    components = options.load(argparse.Namespace(**{**vars(args), "safety": "off"}))
    device = components.unet.conv_in.weight.device
    measures = clip(args, device, resizes["clip"])
    if args.inception is None:
        return components, measures, measures
    chosen = {"resize": resizes["inception"]} if resizes["inception"] else {}
    return components, measures, features.inception(args.inception, device=device, **chosen)


def clip(args: argparse.Namespace, device: Any, resize: str | None = None) -> Any:
    """The CLIP to measure with: the one named, or the model's own."""
    from ldm.checkpoint import BUNDLED
    from ldm.evaluation import features
    from weights_convert import CheckpointError

    own = args.model or os.environ.get(options.MODEL_VARIABLE) or BUNDLED
    try:
        return features.clip(args.clip or own, device=device, resize=resize)
    except CheckpointError as error:
        raise ValueError(f"{error}{'' if args.clip else '; name a CLIP to measure with: --clip SOURCE'}") from None


def _show(report: dict[str, Any], plan: "Plan", args: argparse.Namespace) -> None:
    from ldm.evaluation import plot
    from ldm.evaluation.whole_file import write_whole

    for warning in report["warnings"]:
        options.warn(warning)
    print(table(report))
    if plot.available():
        plot.plot(report, plan.out / "pareto.png")
        print(plan.out / "pareto.png")
    else:
        options.warn(NO_PLOT)
    if args.json:
        write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())


def table(report: dict[str, Any]) -> str:
    """What was measured with, and a line for each scale."""
    settings, fid, score = report["settings"], report["fid"], report["clip_score"]
    steps = f"{settings['steps']} steps of {settings['sampler']}"
    lines = [
        f"model: {report['model']['name']}, {steps}, seeds from {report['seed']}; {report['count']:,} captions of "
        f"{report['captions']['file']}; {report['reference']['count']:,} pictures of {report['reference']['folder']}",
        f"{fid['label']}{f' ({note})' if (note := fid['note']) else ''}: {fid['instrument']}, {fid['features']} features, "
        f"resized: {fid['resize']}",
        f"CLIP score ({score['label']}): {score['instrument']}, resized: {score['resize']}",
        f"{'guidance':>8}{fid['label']:>22}{'CLIP score':>12}{'+-':>8}{'seconds':>10}",
    ]
    for point in report["points"]:
        lines.append(
            f"{point['guidance_scale']:>8g}{point['fid']:>22.4f}{point['clip_score']:>12.4f}{point['clip_score_error']:>8.4f}"
            f"{sum(point['seconds'].values()):>10.1f}"
        )
    return "\n".join(lines)
