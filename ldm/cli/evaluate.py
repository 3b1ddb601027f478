"""`ldm evaluate`: how good a model is.

By composition: whether pictures show what their prompts say, here. By FID against CLIP score over guidance scales: `pareto.py`.
By all of these as guidance, steps and sampler vary: `survey.py`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from ldm.cli import options, pareto, sharing, survey


def add(commands: Any) -> None:
    text = "how good a model is, in numbers"
    command = commands.add_parser("evaluate", help=text, allow_abbrev=False, description=text.capitalize() + ".")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--composition",
        action="store_true",
        help="number, colours, shapes and relation of two solids, right or not by an independent judge",
    )
    what.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="FID and CLIP score of pictures of these captions, a line each, or COCO's JSON, at several guidance scales",
    )
    what.add_argument(
        "--survey", action="store_true", help="both, of pictures of solids, as guidance, steps and sampler vary; with --out DIR"
    )
    command.add_argument(
        "--count",
        type=int,
        metavar="N",
        help="prompts of each split (default 500, with --survey 200); the first N captions (default: all)",
    )
    command.add_argument("--split", action="append", choices=("seen", "held_out"), help="one only (default: both)")
    command.add_argument(
        "--guidance-scale",
        "--scale",
        metavar="G",
        help="or several, as in 1,2,4 (default: the model's, or 7.5; with --captions 1.5 to 8)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    command.add_argument("--judge", metavar="FILE", help="the judge's weights (default: the bundled one)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    pareto.add(command)
    options.add_sampling(command)
    options.add_model(command, fast=True)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.captions is not None:
        _refuse(args, "--composition", ("split", "judge"))
        pareto.run(args, scales(args.guidance_scale) if args.guidance_scale is not None else None)
    elif args.survey:
        _refuse(args, "--captions", tuple(name for name in pareto.OWN if name not in ("out", "clip")))
        _refuse(args, "--composition and --captions", ("split", "guidance_scale", "steps", "sampler", "spacing", "convention"))
        survey.run(args)
    else:
        _refuse(args, "--captions", pareto.OWN)
        _composition(args)


def _refuse(args: argparse.Namespace, of: str, names: tuple[str, ...]) -> None:
    """Options of the other kind are refused rather than passed over."""
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for {of}; leave it out")


def _composition(args: argparse.Namespace) -> None:
    sharing.alone("ldm evaluate --composition")
    asked = scales(args.guidance_scale) if args.guidance_scale is not None else []
    count = 500 if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count {count}; expected 1 or more")
    options.check_folder(args.json)
    chosen = {
        name: value for name in ("steps", "sampler", "spacing", "convention") if (value := getattr(args, name)) is not None
    }

    from tqdm import tqdm

    from ldm.checkpoint import bundled_folder
    from ldm.evaluation import composition
    from ldm.evaluation.whole_file import write_whole
    from ldm.pipelines.settings import checked
    from ldm.scenes import judge

    for scale in asked:
        checked({**chosen, "guidance_scale": scale, "seed": args.seed})
    components = options.load(args)
    asked = asked or [components.guidance_scale]
    referee = judge.load(args.judge or bundled_folder() / "judge.safetensors")
    splits = args.split or list(composition.SPLITS)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(splits) * len(asked) * count, unit="picture", disable=args.quiet) as bar:
        for split in splits:
            for name, score in composition.ceiling(components, referee, split, count).items():
                rows.append(_row(split, name, score))
            for scale in asked:
                done = bar.n
                score = composition.evaluate(
                    components,
                    referee,
                    split,
                    count,
                    seed=args.seed,
                    progress=lambda k, done=done: bar.update(done + k - bar.n),
                    guidance_scale=scale,
                    **chosen,
                )
                rows.append(_row(split, f"guidance {scale:g}", score))
    print(_table(rows))
    if args.json:
        found = {"model": components.name, "count": count, "seed": args.seed, **chosen, "rows": rows}
        write_whole(args.json, (json.dumps(found, indent=1) + "\n").encode())


def scales(text: str) -> list[float]:
    """Guidance scales with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"guidance scale {text!r}; expected a number, or several with commas, as in 1,2,4") from None


def _row(split: str, pictures: str, score: Any) -> dict[str, Any]:
    parts = {part: score.accuracy(part) for part in score.right}
    return {"split": split, "pictures": pictures, "count": score.count, **parts, "interval": score.interval()}


def _table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of picture; the interval is of the last column."""
    lines = [f"{'split':<10}{'pictures':<18}{'number':>8}{'colours':>9}{'shapes':>8}{'relation':>10}{'all':>8}   95 % interval"]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"{row['split']:<10}{row['pictures']:<18}{row['number']:>8.1%}{row['colours']:>9.1%}{row['shapes']:>8.1%}"
            f"{row['relation']:>10.1%}{row['all']:>8.1%}   {low:.1%} to {high:.1%}"
        )
    return "\n".join(lines)
