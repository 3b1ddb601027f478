"""`ldm txt2img`, `ldm img2img`, `ldm inpaint`: pictures of a prompt, or of every line of a file, each in a file of its own."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm.cli import options, sharing
from ldm.cli.progress import Progress

EPILOG = """Prints the path of every picture as it is written. The seed, progress and warnings go to standard error.
Many processes share the work: torchrun --nproc_per_node N -m ldm ... Pictures are then numbered by their place in the run, as
with --resume; paths are printed at the end; and the same command goes on with a run that was stopped."""


def add(commands: Any) -> None:
    for task, help_text in (
        ("txt2img", "pictures of a prompt"),
        ("img2img", "pictures of a prompt that keep something of a picture"),
        ("inpaint", "part of a picture made anew"),
    ):
        command = commands.add_parser(
            task, help=help_text, allow_abbrev=False, description=help_text.capitalize() + ".", epilog=EPILOG
        )
        options.add_prompt(command)
        if task != "txt2img":
            _add_image(command, task)
        options.add_form(command, "the model's own" if task == "txt2img" else "the picture's own, rounded down")
        options.add_sampling(command)
        options.add_adapters(command)
        _add_output(command)
        options.add_model(command, fast=True)
        command.set_defaults(run=run, task=task)


def _add_image(command: argparse.ArgumentParser, task: str) -> None:
    group = command.add_argument_group("picture")
    group.add_argument("--image", "--init-img", required=True, metavar="FILE", help="PNG, JPEG or WebP to start from")
    lowest, default = ("0 (the picture itself)", "0.8") if task == "img2img" else ("above 0 (little is new)", "1")
    group.add_argument("--strength", type=float, help=f"{lowest} to 1 (begun with noise alone); default {default}")
    group.add_argument("--posterior", help="sample or mode of the encoded picture (default sample)")
    if task == "inpaint":
        group.add_argument("--mask", required=True, metavar="FILE", help="white where the picture is made anew")
        group.add_argument("--invert-mask", action="store_true", help="black is made anew, as in CompVis's scripts")
        group.add_argument("--paste", action="store_true", help="keep the picture's own pixels where it is kept")


def _add_output(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output")
    group.add_argument(
        "-o", "--out", "--outdir", default="outputs", metavar="FOLDER", help="where pictures go (default outputs)"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with what the same command has begun in that folder, or begin what can be"
    )
    group.add_argument("--preview", metavar="FILE", help="a PNG that shows the first picture on its way, and at the end")
    group.add_argument("--preview-every", type=int, default=5, metavar="N", help="steps between two previews (default 5)")
    group.add_argument(
        "--safety", metavar="ACTION", help="where the model's checker flags: black, blur, flag, off (default black)"
    )
    group.add_argument("--watermark", action="store_true", default=None, help="CompVis's invisible watermark (extra watermark)")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    # Of CompVis's scripts: there is no sheet of all pictures here, and the file says how many channels it has.
    group.add_argument("--skip_grid", action="store_true", help=argparse.SUPPRESS)
    for name in ("--n_rows", "--C", "--f", "--config"):
        group.add_argument(name, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    if args.resume or sharing.launched():
        _shared(args)
    else:
        _alone(args)


def _alone(args: argparse.Namespace) -> None:
    """Make the pictures in portions, under the next free numbers, and write each portion before the next is begun."""
    given, prompts, settings, sources = _asked(args)
    from ldm.output import files
    from ldm.pipelines.bulk import portions

    cut = portions(prompts, given)
    folder = _writable(Path(args.out))
    total, made = cut[-1].indices.stop, 0
    components = options.load(args)
    drawn = None if "seed" in settings else given.seed
    _warn(components, prompts, given)
    with Progress(args, components, len(cut), drawn) as progress:
        try:
            for portion in cut:
                if args.stops:
                    raise KeyboardInterrupt
                progress.describe(made, total)
                fields = {**settings, "num_images": portion.num_images, "seed": portion.seed}
                result = _pipeline(args.task)(components, portion.prompts, **sources, **fields, after_step=progress.after_step)
                for picture, receipt in zip(result.images, result.receipts, strict=True):
                    path = files.save(picture, receipt, folder)
                    made += 1
                    progress.write(path)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {made} of {total} pictures are in {folder}") from None


def _shared(args: argparse.Namespace) -> None:
    """Make those pictures of the run that are not there yet, with all processes; say their paths when all are there."""
    from ldm.pipelines import bulk

    folder = Path(args.out)
    with sharing.shared(args, f"interrupted; the same command goes on in {folder}") as (args, agreement):
        components, order, given = agreement.each(lambda: _order(args, agreement.processes))
        agreement.first(lambda: _writable(folder))
        if agreement.processes.leads:
            _warn(components, order.prompts, given)
        with Progress(args, components, 1, None) as progress:

            def before(portion: bulk.Portion, count: int) -> None:
                if args.stops:
                    raise KeyboardInterrupt
                progress.portions = count
                progress.drawn = None if "seed" in order.settings else portion.seed - portion.start
                progress.describe(portion.start, len(order.prompts) * given.num_images)

            paths = bulk.make(components, order, folder, agreement, before=before, after_step=progress.after_step)
        if agreement.processes.leads:
            print(*paths, sep="\n")


def _order(args: argparse.Namespace, processes: Any) -> tuple[Any, Any, Any]:
    """The model, what is to be made of it, and the settings spelled out, but for the seed."""
    if args.from_file == "-" and processes.count > 1:
        raise ValueError(f"--from-file - for {processes.count} processes; give a file that all of them can read")
    given, prompts, settings, sources = _asked(args)
    from ldm.pipelines.bulk import Order, portions

    portions(prompts, given)  # refuses too high a seed
    return options.load(args), Order(task=args.task, prompts=prompts, settings=settings, fields=sources), given


def _asked(args: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any], dict[str, Any]]:
    """The settings spelled out, the prompts, the settings given, and what the task takes beside. What is wrong in them is
    refused here, before a model is loaded."""
    prompts = options.prompts(args)
    settings = _settings(args)
    sources = _sources(args)
    from ldm.pipelines.settings import checked

    given = checked(settings)
    _check_preview(args)
    return given, prompts, settings, sources | options.sides(args)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = options.settings(args)
    if args.n_iter != 1:  # CompVis's count of repetitions
        if args.n_iter < 1:
            raise ValueError(f"n_iter {args.n_iter}; expected 1 or more")
        settings["num_images"] = settings.get("num_images", 1) * args.n_iter
    return settings


def _sources(args: argparse.Namespace) -> dict[str, Any]:
    """What the task takes beside the prompt."""
    if args.task == "txt2img":
        return {}
    from PIL import ImageOps

    from ldm import images
    from ldm.pipelines.settings import check_posterior, check_strength

    sources: dict[str, Any] = {"image": images.read(args.image)}
    if args.strength is not None:
        sources["strength"] = check_strength(args.strength)
    if args.posterior is not None:
        check_posterior(args.posterior)
        sources["posterior"] = args.posterior
    if args.task == "inpaint":
        mask = images.read(args.mask)
        sources |= {"mask": ImageOps.invert(mask) if args.invert_mask else mask, "paste": args.paste}
    return sources


def _writable(folder: Path, option: str = "--out") -> Path:
    """The folder, made where it is not there; refused now where nothing can be written into it."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{folder}: nothing can be written there ({error.strerror}); name another folder with {option}"
        ) from None
    return folder


def _check_preview(args: argparse.Namespace) -> None:
    if args.preview_every < 1:
        raise ValueError(f"preview-every {args.preview_every}; expected 1 or more")
    if args.preview is None:
        return
    if Path(args.preview).is_dir() or Path(args.preview).suffix.lower() != ".png":
        kind = "is a folder" if Path(args.preview).is_dir() else "does not end in .png"
        raise ValueError(f"preview {args.preview} {kind}; expected the name of a PNG")
    _writable(Path(args.preview).parent, "--preview")


def _pipeline(task: str) -> Callable[..., Any]:
    import ldm

    return getattr(ldm, task)


def _warn(components: Any, prompts: Sequence[str], settings: Any) -> None:
    """Of what does not fit, and of what in a LoRA's file is of no use."""
    from ldm.pipelines.bulk import lora_names
    from ldm.pipelines.conditioning import read

    room = components.tokenizer.length - 2  # between the two marks
    found: dict[str, None] = {}  # each once, in order
    for _, group in itertools.groupby(prompts, lora_names):
        conditioning = read(components, list(group), settings)
        cut_offs = [text for text in conditioning.cut_off() if text]
        found |= dict.fromkeys(f"the model reads {room} tokens; cut off: {text!r}; see --long-prompt" for text in cut_offs)
        for adapter in conditioning.components.adapters:
            if left := adapter.get("left"):
                named = f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
                found[f"LoRA {adapter['name']}: {len(left)} tensors are of no layer of this model: {named}"] = None
    for text in found:
        options.warn(text)
