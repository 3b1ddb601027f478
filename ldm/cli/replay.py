"""`ldm replay PICTURE`: make a picture again from the receipt it carries, and say whether it is the same."""

import argparse
from pathlib import Path
from typing import Any

from ldm.cli import options
from ldm.cli.progress import Steps


def add(commands: Any) -> None:
    text = "a picture again, from its receipt"
    about = f"{text.capitalize()}. Exit status 3 where it differs by more than rounding."
    command = commands.add_parser("replay", help=text, allow_abbrev=False, description=about)
    command.add_argument("picture", help="a PNG written by ldm")
    command.add_argument("--image", "--init-img", metavar="FILE", help="the picture it was made from, by img2img or inpaint")
    command.add_argument("--mask", metavar="FILE", help="the mask it was made with, by inpaint")
    command.add_argument("--invert-mask", action="store_true", help="where it was made with --invert-mask")
    command.add_argument(
        "--adapter-folder", "--lora-folder", metavar="FOLDER", help="where its LoRAs and embeddings are (default: as it says)"
    )
    command.add_argument("-o", "--out", metavar="FOLDER", help="also write the new picture there")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    options.add_model(command, fast=True)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit status: 3 where the picture is another, by more than what rounding leaves."""
    from PIL import ImageOps

    from ldm import images
    from ldm.output import files
    from ldm.pipelines.replay import replay

    receipt = files.read_receipt(args.picture)
    sources = {name: images.read(path) for name in ("image", "mask") if (path := getattr(args, name)) is not None}
    if args.invert_mask and "mask" in sources:
        sources["mask"] = ImageOps.invert(sources["mask"])
    _as_recorded(args, receipt)
    components = options.load(args)
    with Steps(quiet=args.quiet) as bar:
        found = replay(components, receipt, **sources, adapter_folder=args.adapter_folder, after_step=bar.after_step)
    if args.out is not None:
        print(files.save(found.image, found.receipt, Path(args.out)))
    farthest, share = images.difference(found.image, images.read(args.picture))
    if farthest == 0:
        print("the same, pixel for pixel")
        return 0
    for change in found.changes:
        options.warn(change)
    rounding = farthest == 1
    verdict = "the same but for rounding" if rounding else "not the same"
    print(f"{verdict}: {share:.2g} of the values differ, by at most {farthest} of 255")
    return 0 if rounding else 3


def _as_recorded(args: argparse.Namespace, receipt: dict[str, Any]) -> None:
    """Precision, device and tokenizer as they were, where the options do not say otherwise."""
    if args.dtype is None and args.precision is None:
        args.dtype = receipt.get("dtype")
    if args.device is None:
        args.device = receipt.get("device")
    if args.tokenizer is None:
        args.tokenizer = receipt.get("tokenizer")
    acceleration = receipt.get("acceleration") or {}
    args.fast = args.fast or bool(acceleration)
    for name in options.APPROXIMATIONS:
        if getattr(args, name) is None:
            setattr(args, name, acceleration.get(name))
