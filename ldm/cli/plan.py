"""`ldm plan`: Stable Diffusion v1's training on paper, as the model card states it: what fits, how long, what it emits."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ldm.cli import options
from ldm.cli.emissions import add_power


def add(commands: Any) -> None:
    text = "what training Stable Diffusion v1 would take"
    about = f"{text.capitalize()}, by its model card: batch, time, energy, CO2. Nothing is trained."
    command = commands.add_parser("plan", help=text, allow_abbrev=False, description=about)
    command.add_argument("--checkpoint", default="v1-4", metavar="NAME", help="v1-1, v1-2, v1-3 or v1-4 (default)")
    command.add_argument("--history", action="store_true", help="with all that the checkpoint was trained from")
    command.add_argument("--gpus", default="1,8,64,256", metavar="N,N", help="numbers of them (default 1,8,64,256)")
    command.add_argument("--gpu", default="a100", metavar="NAME", help="its maker's peak rate and memory (default a100, 80 GB)")
    command.add_argument("--tflops", type=float, metavar="T", help="peak rate of one, instead of the maker's")
    command.add_argument("--memory", type=float, metavar="GB", help="of one, instead of the maker's")
    command.add_argument(
        "--utilisation", type=float, default=0.4, metavar="U", help="share of the peak that a step reaches (default 0.4)"
    )
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the arithmetic")
    command.add_argument("--cached", action="store_true", help="latents and captions' states have been made beforehand")
    command.add_argument("--shrink", type=float, default=1.0, metavar="F", help="a rehearsal: steps, batch and so on over F")
    add_power(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.training import card
    from ldm.training.ledger import write
    from ldm.training.plan import plan, table
    from ldm.training.recipe import make, read
    from ldm.training.unet import UNetRecipe

    options.check_folder(args.json)
    recipe = make(UNetRecipe, read(card.RECIPE)["unet"], card.RECIPE.name)
    assumed, phases = _assumptions(args), card.history(args.checkpoint)
    if not args.history:
        phases = [(name, phase) for name, phase in phases if name == args.checkpoint]
    rows = plan(recipe, phases, _counts(args.gpus), assumed, shrink=args.shrink)
    course = card.shrunk(dataclasses.replace(recipe, steps=phases[-1][1].steps), args.shrink)
    print(_course(course, args.shrink))
    print(f"\n{table(rows)}\n")
    sums = _sums(rows) if len(phases) > 1 else []
    for total in sums:
        print(f"{total['gpus']} GPUs, all phases: " + ", ".join(f"{total[name]:,.0f} {unit}" for name, unit in SUMMED.items()))
    print(_about(args, assumed))
    if args.json:
        found = {"assumed": dataclasses.asdict(assumed), "shrink": args.shrink, "recipe": dataclasses.asdict(course)}
        found |= {"rows": [dataclasses.asdict(row) for row in rows], "all phases": sums}
        write(args.json, json.dumps(found, indent=1) + "\n")


SUMMED = {"hours": "h", "gpu_hours": "GPU hours", "kwh": "kWh", "kg": "kg CO2"}


def _sums(rows: list[Any]) -> list[dict[str, float]]:
    """Over the phases, for each number of GPUs on which all of them are possible."""
    counts = [n for n in dict.fromkeys(row.gpus for row in rows) if not any(row.problem for row in rows if row.gpus == n)]
    return [{"gpus": n} | {name: sum(getattr(row, name) for row in rows if row.gpus == n) for name in SUMMED} for n in counts]


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"gpus {text!r}; expected a whole number, or several with commas, as in 1,8,64,256") from None


def _assumptions(args: argparse.Namespace) -> Any:
    from ldm.training.emissions import PowerRecipe
    from ldm.training.plan import GPUS, Assumptions

    if args.gpu not in GPUS:
        raise ValueError(f"gpu {args.gpu!r}; expected one of {', '.join(GPUS)}, or --tflops and --memory")
    chosen = GPUS[args.gpu]
    return Assumptions(
        tflops=getattr(chosen, args.dtype) if args.tflops is None else args.tflops,
        memory=chosen.memory if args.memory is None else args.memory,
        utilisation=args.utilisation,
        dtype=args.dtype,
        cached=args.cached,
        power=PowerRecipe(kilowatts=args.kilowatts, kg_per_kwh=args.kg_per_kwh),
    )


def _course(recipe: Any, shrink: float) -> str:
    optimiser = recipe.optimiser
    return (
        f"{'as the card states it' if shrink == 1 else f'shrunk by {shrink:g}'}: {recipe.steps:,} steps of "
        f"{recipe.batch * recipe.accumulation:,} pictures ({recipe.accumulation} x {recipe.batch}), warm-up "
        f"{optimiser.warm_up:,} steps to {optimiser.learning_rate:g}, EMA {optimiser.ema:.6g},\n"
        f"a log every {recipe.log_every}, a checkpoint every {recipe.save_every}, a sheet every {recipe.sheet_every}"
    )


def _about(args: argparse.Namespace, assumed: Any) -> str:
    """What the figures rest on."""
    peak = f"{assumed.tflops:g} TFLOP/s" + (f", the maker's figure for {args.gpu}" if args.tflops is None else "")
    return (
        "counted: operations and memory of UNet, "
        + (
            "AdamW and moving average"
            if assumed.cached
            else "AdamW, moving average, and of encoding each picture and caption once"
        )
        + f", {assumed.dtype}; c: gradient checkpointing\n"
        f"assumed: {assumed.utilisation:.0%} of {peak} for a whole step; {assumed.memory:g} GB, a tenth of it in reserve; "
        f"{assumed.power.kilowatts:g} kW a GPU, {assumed.power.kg_per_kwh:g} kg/kWh\n"
        "not counted: waiting for data and for the network between GPUs, saving, evaluation, failed runs"
    )
