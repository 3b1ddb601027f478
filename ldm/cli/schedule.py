"""`ldm schedule`: what a sampler would do with a number of steps: timesteps, noise levels and calls of the network."""

import argparse
import dataclasses
import json
from typing import Any

from ldm.cli import options


def add(commands: Any) -> None:
    text = "timesteps, noise levels and network calls of a sampler"
    about = f"{text.capitalize()}, without making anything."
    command = commands.add_parser("schedule", help=text, allow_abbrev=False, description=about)
    options.add_sampling(command)
    command.add_argument("--strength", type=float, help="as image-to-image at this strength, 0 to 1")
    command.add_argument(
        "--model", "--ckpt", metavar="SOURCE", help="take the noise schedule of this checkpoint (default: SD v1)"
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.diffusion import schedule_table
    from ldm.diffusion.conventions import from_image, make_grid
    from ldm.pipelines.settings import check_strength, checked
    from ldm.samplers import all_samplers

    settings, schedule = checked(options.settings(args)), _schedule(args.model)
    sampler = all_samplers()[settings.sampler]
    named = {"convention": settings.convention}
    grid = make_grid(schedule, settings.steps, settings.sampler, spacing=settings.spacing, **named)
    if args.strength is not None:
        strength = check_strength(args.strength)
        grid = from_image(grid, strength, settings.sampler, steps=settings.steps, **named)
        if grid is None:
            print(f"no steps: {settings.steps} x strength {strength:g} is less than one; the image itself, encoded and decoded")
            return
    if args.json:
        print(json.dumps([dataclasses.asdict(line) for line in schedule_table.lines(grid, sampler)], indent=1))
    else:
        print(schedule_table.table(grid, sampler))
    lost = schedule_table.uncovered(grid, schedule) if args.strength in (None, 1.0) else None
    if lost is not None:
        options.warn(f"{lost}; --spacing trailing or tapered begins at the top")


def _schedule(source: str | None) -> Any:
    from ldm.diffusion.schedule import ScheduleConfig

    if source is None:
        return ScheduleConfig()
    import weights_convert

    return ScheduleConfig(**dataclasses.asdict(weights_convert.read(source).schedule))
