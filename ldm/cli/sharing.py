"""Commands that many processes may share: `torchrun --nproc_per_node N -m ldm COMMAND ...`. One of them speaks."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipelines.agreement import Agreement
    from ldm.processes import Processes

A_MOMENT = timedelta(seconds=10)


def launched() -> bool:
    """Whether torchrun, or another launcher of its kind, has started this process as one of its own."""
    return "WORLD_SIZE" in os.environ


def alone(command: str) -> None:
    """Raises ValueError, in the first process, where a command that does not share its work was started many times."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if int(os.environ.get("RANK", 0)):
            raise SystemExit(1)
        raise ValueError(f"{command} is the work of one process; start it without torchrun")


@contextmanager
def shared(args: argparse.Namespace, interrupted: str) -> Iterator[tuple[argparse.Namespace, "Agreement"]]:
    """The options as they are for this process, and its agreement with the others. interrupted: what to say of a stop."""
    from ldm.pipelines.agreement import Agreement
    from ldm.processes import joined

    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    leads = int(os.environ.get("RANK", 0)) == 0
    if many and args.device not in (None, "cpu", "cuda"):
        if not leads:
            raise SystemExit(1)
        raise ValueError(
            f"device {args.device!r} for many processes; expected cpu or cuda, a GPU for each process of a machine"
        )
    try:
        with joined(args.device if many else "cpu") as processes:  # alone, the device is the loader's affair
            own = {"device": str(processes.device)} if many else {}
            own |= {} if leads else {"quiet": True, "preview": None}
            yield argparse.Namespace(**{**vars(args), **own}), Agreement(processes)
    except KeyboardInterrupt:
        if not leads:
            raise SystemExit(128 + (args.stops or [15])[0]) from None
        raise KeyboardInterrupt(interrupted) from None


@contextmanager
def one_voice(processes: "Processes") -> Iterator[None]:
    """What is refused in all processes alike is said by the first alone; what is refused in some, by each of those.

    For work in which they do not agree on every step as in `shared`: whoever is refused waits a moment for the others.
    """
    from ldm.pipelines.agreement import REFUSALS

    if processes.count == 1:
        yield
        return
    import torch.distributed as dist

    processes.wait()  # a group has only its own moment to come together
    group = dist.new_group(backend="gloo", timeout=A_MOMENT)
    try:
        yield
    except REFUSALS as error:
        said: list[str | None] = [None] * processes.count
        with suppress(RuntimeError):  # the others are not refused: they wait elsewhere, or have died
            dist.all_gather_object(said, str(error), group=group)
        if not processes.leads and said.count(str(error)) == processes.count:
            raise SystemExit(1) from None
        raise
