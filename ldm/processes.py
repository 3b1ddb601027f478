"""One process or many: what `torchrun` says about this one, and where random numbers come from.

A command is the same alone and under `torchrun`. Work is split by number (of an image, of a row of a batch), and the random
numbers of each are a function of the seed and that number alone: so what comes out depends neither on how many processes
share the work nor on where it was stopped and resumed.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

PATIENCE = timedelta(minutes=30)  # with a process in the middle of a step; torchrun, and the others, see at once when one dies
SHARE = timedelta(days=7)  # with one that has not ended its share of some work: shares take their time, and not the same


class LostError(ConnectionError):
    """Another process is gone, or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process is number `rank` of `count`, and computes on `device`."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def layout(self) -> torch.memory_format:
        """How pictures lie in memory. On a CPU, GroupNorm's backward pass takes eight times as long in channels_last."""
        return torch.channels_last if self.device.type == "cuda" else torch.contiguous_format

    def precision(self, dtype: str) -> AbstractContextManager[None]:
        """Where layers compute in `dtype`, "float32" or "bfloat16", whatever their weights are."""
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {dtype!r}; expected float32 or bfloat16")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def attention(self) -> AbstractContextManager[None]:
        """Which attention to train with. On a CPU, the fused kernel's backward pass is slower than the formula written out."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def wait(self) -> None:
        """Until all processes have come this far, however long their shares of the work take."""
        if self.count > 1:
            dist.barrier(timeout=SHARE)


@contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone. device: "cpu", "cuda"; by default a GPU where there is one."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if count > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes(rank=rank, count=count, device=place)
    except RuntimeError as error:
        if count > 1 and _is_of_the_line(error):
            reason = " ".join(str(error).split())[:160]
            raise LostError(
                f"process {rank} of {count} lost touch with another ({reason}); the same command goes on where this one stopped"
            ) from error
        raise
    if count > 1:  # not after an error: who is lost cannot agree to part
        dist.destroy_process_group()


def _is_of_the_line(error: RuntimeError) -> bool:
    """Whether an error tells of the connection between processes."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "onnection", "ocket"))


def generator(seed: int, step: int, purpose: int = 0, row: int = 0) -> torch.Generator:
    """Where the random numbers of one step, or of one row of its batch, come from, on the CPU: a function of its arguments."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step) * 0xBF58476D1CE4E5B9 + purpose * 0x94D049BB133111EB + row * 0xD6E8FEB86659FD93
    return torch.Generator().manual_seed(mixed & (2**63 - 1))
