"""`ldm trace PROMPT --out FOLDER`: make one picture, and write down everything that is computed on the way."""

import argparse
from typing import Any

from ldm.cli import options
from ldm.cli.progress import Steps


def add(commands: Any) -> None:
    text = "everything that is computed for a picture, written down"
    about = f"{text.capitalize()}: activations, latents and the sampler's terms, for ldm diff to compare. See docs/traces.md."
    command = commands.add_parser("trace", help=text, allow_abbrev=False, description=about)
    options.add_prompt(command)
    group = command.add_argument_group("trace")
    group.add_argument("-o", "--out", required=True, metavar="FOLDER", help="the trace; must not exist yet")
    group.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help="names to write down, with * and ?; several with several (default: all)",
    )
    group.add_argument("--blocks", action="store_true", help="only the UNet's blocks, the sampler's terms and the picture")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    options.add_form(command, "the model's own")
    options.add_sampling(command)
    options.add_adapters(command)
    options.add_model(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """One line for what was written."""
    from ldm.numerics import runs
    from ldm.numerics.traces import Trace, check_new
    from ldm.numerics.tracing import BLOCKS
    from ldm.pipelines.settings import checked

    prompts = options.prompts(args)
    if len(prompts) != 1:
        raise ValueError(f"{len(prompts)} prompts; a trace is of one")
    settings = options.settings(args)
    if settings.get("num_images", 1) != 1 or args.n_iter != 1:
        raise ValueError("several pictures; a trace is of one")
    settings["seed"] = checked(settings).seed
    check_new(args.out)
    only = (*(args.only or ()), *((*BLOCKS, "sampler.*", "picture") if args.blocks else ()))
    components = options.load(args)
    with Steps(quiet=args.quiet) as bar:
        runs.trace_txt2img(
            components, prompts[0], args.out, only=only, after_step=bar.after_step, **settings, **options.sides(args)
        )
    trace = Trace(args.out)
    print(f"{args.out}: {len(trace.keys)} tensors of {trace.calls} calls of the network, seed {settings['seed']}")
