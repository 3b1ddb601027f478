"""`ldm precision --model SOURCE`: how far every part is from float64, in each type and with each kernel of attention."""

import argparse
import json
from typing import Any

from ldm.cli import options


def add(commands: Any) -> None:
    text = "how far a model is from float64, in every type"
    about = (
        f"{text.capitalize()}, and with every kernel of attention: the error of each component's output, and what parts add by "
        "themselves; beside diffusers' modules of the same weights, where it is installed. Relative, max |a - b| / max |b|."
    )
    command = commands.add_parser("precision", help=text, allow_abbrev=False, description=about)
    command.add_argument("--prompt", default="a red cube on top of a blue sphere", help="the text (default: the model card's)")
    command.add_argument("--t", type=float, default=500.0, metavar="T", help="the timestep (default 500)")
    command.add_argument("--size", type=int, metavar="PIXELS", help="side of the picture (default: the model's own)")
    command.add_argument("--seed", type=int, default=0, help="of the latents (default 0)")
    command.add_argument("--no-peers", action="store_true", help="without diffusers")
    command.add_argument("--table", action="store_true", help="every part, not only the summary")
    command.add_argument("--json", action="store_true", help="all of it, one JSON object a line")
    options.add_model(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.numerics import peers
    from ldm.numerics.precision import Inputs, report

    if args.dtype is not None or args.precision is not None:
        raise ValueError("the report is of every type; leave --dtype out")
    if not 0 <= args.t < 1000:
        raise ValueError(f"t {args.t:g}; expected a timestep from 0 to below 1000")
    if args.size is not None and (args.size < 8 or args.size % 8):
        raise ValueError(f"size {args.size}; expected a multiple of 8")

    def load(dtype: Any) -> Any:
        args.dtype = str(dtype).removeprefix("torch.")
        return options.load(args)

    def inputs(components: Any) -> Any:
        return Inputs.of(components, args.prompt, args.t, args.size, args.seed)

    if not args.json:
        print(f"{'variant':<30}{'component':<14}{'output':>10}{'added, median':>15}{'largest':>10}  by")
    for found in report(load, inputs, peers=None if args.no_peers else peers.builder(load)):
        if args.json:
            print(json.dumps(_plain(found)), flush=True)
            continue
        worst = found.worst
        sizes = f"{found.last:>10.1e}{found.median:>15.1e}{worst.relative:>10.1e}"
        print(f"{found.variant:<30}{found.kind:<14}{sizes}  {worst.key.name.partition('.')[2]}", flush=True)
        if args.table:
            whole = {row.key: row.relative for row in found.whole}
            for row in found.added:
                print(f"    {row.key.name:<70}{whole[row.key]:>10.1e}{row.relative:>10.1e}")


def _plain(found: Any) -> dict[str, Any]:
    whole = {row.key: row.relative for row in found.whole}
    parts = {row.key.name: {"whole": whole[row.key], "added": row.relative} for row in found.added}
    return {"variant": found.variant, "component": found.kind, "output": found.last, "parts": parts}
