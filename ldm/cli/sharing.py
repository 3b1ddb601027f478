"""Commands that many processes may share: `torchrun --nproc_per_node N -m ldm COMMAND ...`. One of them speaks."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipelines.agreement import Agreement


def launched() -> bool:
    """Whether torchrun, or another launcher of its kind, has started this process as one of its own."""
    return "WORLD_SIZE" in os.environ


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
