"""One process or many: what `torchrun` says about this one, and what each does of a batch.

A training script is the same alone and under `torchrun`. Random draws are made for the whole batch, by a generator that
depends on seed and step alone, and each process takes its own rows: so the numbers that a run sees depend neither on how
many processes share it nor on where it was stopped and resumed.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PATIENCE = timedelta(hours=6)  # with the first process, while it prepares data; torchrun itself sees when one dies


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

    def rows(self, total: int, part: int = 0, parts: int = 1) -> slice:
        """Which rows of a batch of `total` are this process's, in the `part`-th of `parts` micro-batches."""
        size = total // (self.count * parts)
        start = (part * self.count + self.rank) * size
        return slice(start, start + size)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model itself, or one that averages its gradients over all processes."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all processes."""
        value = value.detach().float()
        if self.count > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.count
        return value.item()

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


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
    finally:
        if count > 1:
            dist.destroy_process_group()


def generator(seed: int, step: int, purpose: int = 0) -> torch.Generator:
    """Where the random numbers of one step come from, on the CPU: a function of its arguments."""
    mixed = ((seed * 0x9E3779B97F4A7C15 + step) * 0xBF58476D1CE4E5B9 + purpose * 0x94D049BB133111EB) & (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
