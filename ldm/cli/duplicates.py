"""`ldm duplicates`: whether pictures repeat those of a training set."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import options, sharing

if TYPE_CHECKING:
    from ldm.evaluation.near_duplicates import Pair, Report

LISTED = 20  # pairs in the table
ON_SHEET = 40  # pairs on the sheet


def add(commands: Any) -> None:
    text = "whether pictures repeat those of a training set"
    about = (
        "For every picture the nearest of the training set, by the cosine of CLIP embeddings; and, as a baseline, how near "
        "pictures of the training set are to one another. Embeddings are kept, so that a second run is quick."
    )
    command = commands.add_parser("duplicates", help=text, allow_abbrev=False, description=about)
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="the pictures that are looked at")
    command.add_argument("--training", type=Path, required=True, metavar="DIR", help="the pictures that they may repeat")
    command.add_argument(
        "--clip",
        "--model",
        default="bundled",
        metavar="SOURCE",
        help="whose embeddings: bundled, a native folder with an image encoder, or a CLIPModel folder (default bundled)",
    )
    command.add_argument(
        "--resize", default="bicubic", help="bicubic, or none where all have the CLIP's size (default bicubic)"
    )
    command.add_argument("--threshold", type=float, default=0.95, metavar="C", help="the cosine that is told of (default 0.95)")
    command.add_argument("--top", type=int, default=1, metavar="K", help="nearest ones of each picture (default 1)")
    command.add_argument(
        "--baseline", type=int, default=1000, metavar="N", help="training pictures held against all others (default 1000)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all pairs and figures there")
    command.add_argument("--sheet", type=Path, metavar="FILE", help=f"a PNG with the {ON_SHEET} nearest pairs, to be looked at")
    command.add_argument(
        "--cache", type=Path, metavar="DIR", help="where embeddings are kept (default ~/.cache/ldm/embeddings)"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.evaluation.near_duplicates import check

    sharing.alone("ldm duplicates")
    check(args.threshold, args.top, args.baseline)
    options.check_folder(args.json, args.sheet)

    from tqdm import tqdm

    from ldm.evaluation import features, folder_features, near_duplicates

    folders = {"pictures": args.images, "training": args.training}
    for folder in folders.values():
        folder_features.pictures_in(folder)
    instrument = features.clip(args.clip, device=args.device or options.best_device(), resize=args.resize)
    found = {}
    for name in ("pictures", "training"):
        with tqdm(desc=f"looking at {name}", unit="picture", disable=args.quiet) as bar:
            found[name] = folder_features.look(folders[name], instrument, cache=args.cache, progress=_shown_by(bar))
    total = len(found["pictures"]) + min(args.baseline, len(found["training"]))
    with tqdm(desc="comparing", unit="picture", total=total, disable=args.quiet) as bar:
        told = near_duplicates.report(
            **found,
            threshold=args.threshold,
            top=args.top,
            baseline=args.baseline,
            progress=lambda done: bar.update(done - bar.n),
        )

    print(_table(told, instrument))
    if args.json:
        from ldm.evaluation.whole_file import write_whole

        write_whole(args.json, (json.dumps(_json(told, instrument, args), indent=1) + "\n").encode())
    if args.sheet:
        from ldm.evaluation.pair_sheet import sheet
        from ldm.output.files import save_as

        save_as(sheet([pairs[0] for pairs in told.pairs[:ON_SHEET] if pairs]), None, args.sheet)


def _shown_by(bar: Any) -> Any:
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress


def _table(told: "Report", instrument: Any) -> str:
    """The nearest pairs, then how similarities are spread, here and within the training set."""
    near = [pair for pairs in told.pairs for pair in pairs if pair.similarity >= told.threshold]
    lines = [f"{'similarity':>10}{'pixels':>9}   picture, and its nearest of the training set"] if near else []
    lines += [_line(pair) for pair in near[:LISTED]]
    if len(near) > LISTED:
        lines.append(f"and {len(near) - LISTED:,} pairs more")
    count = len(told.pairs)
    lines += [f"{told.found:,} of {count:,} pictures ({told.found / count:.1%}) have one at {told.threshold:g} or above"]
    if told.baseline_found is not None:
        lines[-1] += f"; of {told.baseline_count:,} training pictures {told.baseline_found:.1%} have, among the others"
    rows = {f"pictures to {told.training_count:,} training pictures": told.percentiles}
    if told.baseline:
        rows[f"{told.baseline_count:,} training pictures to the others"] = told.baseline
    lines += ["", f"{'similarity to the nearest, by percentile':<45}" + "".join(f"{p:>8}" for p in told.percentiles)]
    lines += [f"{name:<45}" + "".join(f"{value:>8.4f}" for value in row.values()) for name, row in rows.items()]
    return "\n".join([*lines, "", f"{instrument.name}, resized: {instrument.resize}"])


def _line(pair: "Pair") -> str:
    apart = "" if pair.pixels is None else f"{pair.pixels:.4f}"
    return f"{pair.similarity:>10.4f}{apart:>9}   {pair.image}  {pair.training}"


def _json(told: "Report", instrument: Any, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "instrument": {name: getattr(instrument, name) for name in ("name", "resize", "fingerprint")},
        **{"images": str(args.images), "training": str(args.training), "training_count": told.training_count},
        **{"threshold": told.threshold, "top": args.top, "found": told.found, "percentiles": told.percentiles},
        "baseline": {"count": told.baseline_count, "found": told.baseline_found, "percentiles": told.baseline},
        "pictures": [
            {
                "image": str(pairs[0].image),
                "nearest": [{"training": str(p.training), "similarity": p.similarity, "pixels": p.pixels} for p in pairs],
            }
            for pairs in told.pairs
            if pairs
        ],
    }
