"""`ldm emissions`: what so many hours of computing emit, by the model card's arithmetic."""

import argparse
import dataclasses
import json
from typing import Any


def add(commands: Any) -> None:
    text = "what hours of computing are taken to emit, in kg of CO2"
    about = f"{text.capitalize()}: hours x kilowatts x kg a kilowatt-hour, as in Stable Diffusion's model card."
    command = commands.add_parser("emissions", help=text, allow_abbrev=False, description=about)
    command.add_argument("--hours", type=float, required=True, metavar="H", help="of one GPU; those of several add up")
    command.add_argument("--json", action="store_true", help="as JSON")
    add_power(command)
    command.set_defaults(run=run)


def add_power(command: argparse.ArgumentParser) -> None:
    """Options that say what is drawn and emitted; the defaults are the card's."""
    command.add_argument("--kilowatts", type=float, default=0.25, metavar="P", help="that one draws (default 0.25)")
    command.add_argument("--kg-per-kwh", type=float, default=0.30, metavar="C", help="CO2 of a kilowatt-hour (default 0.30)")


def run(args: argparse.Namespace) -> None:
    from ldm.training.emissions import PowerRecipe, emissions

    power = PowerRecipe(kilowatts=args.kilowatts, kg_per_kwh=args.kg_per_kwh)
    found = emissions(args.hours, power)
    if args.json:
        print(json.dumps({"hours": args.hours, **dataclasses.asdict(power), **dataclasses.asdict(found)}))
    else:
        factors = f"{args.hours:,.10g} h x {power.kilowatts:g} kW x {power.kg_per_kwh:.2f} kg/kWh"
        print(f"{factors} = {found.kwh:,.6g} kWh, {found.kg:,.6g} kg CO2 eq.")
