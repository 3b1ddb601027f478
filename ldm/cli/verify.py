"""`ldm verify --model SOURCE`: whether a model gives the answers that the published checkpoints are known to give."""

import argparse
import os
from typing import Any

from ldm.cli import options

FAILED, NOTHING = 3, 4


def add(commands: Any) -> None:
    text = "whether a model gives the published answers of Stable Diffusion v1"
    about = (
        f"{text.capitalize()}: tells v1-1 to v1-5 by the file's hash, or by what it calls itself, and runs the answers "
        f"published for it. Exit status {FAILED} where one fails, {NOTHING} where none applies."
    )
    command = commands.add_parser("verify", help=text, allow_abbrev=False, description=about)
    command.add_argument("--as", dest="version", metavar="VERSION", help="take it for this one: v1-1 to v1-5")
    options.add_model(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    from ldm.checkpoint import BUNDLED
    from ldm.numerics.known_answers import VERSIONS, Recognised, recognise, verify

    if args.version is not None and args.version not in VERSIONS:
        raise ValueError(f"version {args.version!r}; expected one of {', '.join(VERSIONS)}")
    source = args.model or os.environ.get(options.MODEL_VARIABLE) or BUNDLED
    found = Recognised(args.version, False, "it is taken for that") if args.version else recognise(source)
    components = options.load(args)
    what = "none of the known checkpoints" if found.version is None else f"Stable Diffusion {found.version}"
    print(f"{source}: {what}; {found.how}")
    verdicts = []
    for answer in verify(components, found):
        print(f"  {answer.verdict:<16}{answer.case.name}: {answer.why}", flush=True)
        verdicts.append(answer.verdict)
    if "fail" in verdicts:
        return FAILED
    return 0 if "pass" in verdicts else NOTHING
