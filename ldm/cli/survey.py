"""`ldm evaluate --survey --out DIR`: the bundled model, or another of the same scenes, as guidance, steps and sampler vary."""

import argparse
import json
from typing import Any

from ldm.cli import options, pareto, sharing
from ldm.cli.progress import StageBar


def run(args: argparse.Namespace) -> None:
    from ldm.checkpoint import bundled_folder

    count = 200 if args.count is None else args.count
    said = "interrupted; the same command goes on where it was"
    with sharing.shared(args, said) as (args, agreement):
        agreement.each(lambda: _check(args, count))
        from ldm.evaluation import plot, survey, survey_plot
        from ldm.evaluation.whole_file import write_whole
        from ldm.scenes import judge

        components = agreement.each(lambda: options.load(args))
        device = components.unet.conv_in.weight.device
        clip = agreement.each(lambda: pareto.clip(args, device))
        referee = agreement.each(lambda: judge.load(args.judge or bundled_folder() / "judge.safetensors"))
        with StageBar(args) as bar:
            how = {"count": count, "seed": args.seed, "tell": bar.tell}
            report = survey.survey(components, referee, clip, args.out, agreement, **how)
        if agreement.processes.leads:
            for warning in report["warnings"]:
                options.warn(warning)
            print(table(report))
            if plot.available():
                survey_plot.plot(report, args.out / "survey.png")
                print(args.out / "survey.png")
            else:
                options.warn(pareto.NO_PLOT)
            if args.json:
                write_whole(args.json, (json.dumps(report, indent=1) + "\n").encode())


def _check(args: argparse.Namespace, count: int) -> None:
    from ldm.pipelines.settings import checked

    if args.out is None:
        raise ValueError("--survey needs --out DIR too, for the pictures")
    if count < 2:
        raise ValueError(f"count {count}; expected 2 or more")
    checked({"seed": args.seed})
    options.check_folder(args.json)


def table(report: dict[str, Any]) -> str:
    """A line for each point; accuracies are of all parts together."""
    coded, renders = report["autoencoder"], report["ceiling"]["renders"]
    lines = [
        f"autoencoder: PSNR {coded['psnr']:.1f} dB, SSIM {coded['ssim']:.4f}, on {coded['count']:,} renders",
        f"{'sampler':<16}{'steps':>6}{'guidance':>10}{'seen':>9}{'held out':>10}{'distance':>10}{'CLIP score':>12}{'+-':>8}",
    ]
    lines.append(
        f"{'renders':<32}{renders['seen']['all']:>9.1%}{renders['held_out']['all']:>10.1%}{renders['fid']:>10.4f}"
        f"{renders['clip_score']:>12.4f}"
    )
    for point in report["points"]:
        lines.append(
            f"{point['sampler']:<16}{point['steps']:>6}{point['guidance_scale']:>10g}{point['seen']['all']:>9.1%}"
            f"{point['held_out']['all']:>10.1%}{point['fid']:>10.4f}{point['clip_score']:>12.4f}"
            f"{point['clip_score_error']:>8.4f}"
        )
    return "\n".join(lines)
