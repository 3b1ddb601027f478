"""How the processes of a run share a step: each takes some of its micro-batches, and their gradients come together.

A step's batch is `batch` pictures in each of `accumulation` micro-batches, however many processes there are. They divide the
micro-batches among them, or, where there are too few, the pictures of each. Three ways to add up the gradients:

    exact   in the order of a binary tree over the numbers of the micro-batches, so that the sum is the same, to the last bit,
            on any number of processes that leaves each of them 1, 2, 4, 8 ... micro-batches
    ddp     torch's DistributedDataParallel: adds up while the backward pass is still going on; the order is its own
    fsdp    torch's fully_shard (Zhao et al. 2023, arXiv:2304.11277): of weights, gradients and the optimiser's state each
            process keeps a part only, for models that do not fit; their checkpoints are sharded too
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.processes import Processes

WAYS = ("exact", "ddp", "fsdp")
BUCKET = 1 << 24  # numbers that are sent at once


def shares(batch: int, accumulation: int, processes: Processes) -> list[slice]:
    """The rows of a step's whole batch that this process takes, a slice for each of its micro-batches.

    Raises ValueError where the processes cannot divide them evenly.
    """
    count, parts, size = processes.count, accumulation // processes.count, batch
    if accumulation % count:
        parts, size = 1, batch * accumulation // count
        if count % accumulation or batch % (count // accumulation):
            raise ValueError(
                f"{accumulation} micro-batches of {batch} pictures for {count} processes; expected an accumulation that is a "
                f"multiple of {count}, or pictures that divide among them: set accumulation={count}, say, and a smaller batch"
            )
    first = processes.rank * parts
    return [slice((first + part) * size, (first + part + 1) * size) for part in range(parts)]


class Together:
    """A loss, and the gradients that its parameters get from all processes.

    A step is: for the rows of each of `parts()`, call `loss_of` and `backward`; then `finish`, and every parameter has the
    gradient of the mean over the whole batch. The loss is moved to the processes' device here; with "fsdp" its parameters are
    replaced, so optimisers are made afterwards.
    """

    def __init__(self, loss: nn.Module, way: str, processes: Processes, rows: list[slice], *, compiled: bool = False):
        if way not in WAYS:
            raise ValueError(f"parallel {way!r}; expected {', '.join(WAYS)}")
        self.loss, self.way, self.processes, self.rows = loss, way, processes, rows
        if way == "fsdp":
            _shard(loss, processes)
        else:
            loss.to(processes.device, memory_format=processes.layout)
        if way == "ddp" and processes.count > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self.loss = nn.parallel.DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True)
        self.loss_of: Any = torch.compile(self.loss) if compiled else self.loss
        averaged = 1 if way == "exact" else processes.count  # what torch's ways divide by themselves
        self.share = averaged / (len(rows) * processes.count)  # of one micro-batch in the mean
        self.sum = TreeSum()
        self.views: list[tuple[nn.Parameter, Tensor]] = []  # into DDP's buckets: elsewhere there would be two of each gradient

    def parts(self) -> Iterator[slice]:
        """The rows of this process's micro-batches, one after the other. DDP adds up over the processes after the last, FSDP
        after each, for what is not added up yet would be whole on every one of them."""
        for parameter, view in self.views:
            parameter.grad = view.zero_()
        for number, rows in enumerate(self.rows, 1):
            last = number == len(self.rows)
            if self.way == "ddp" and self.processes.count > 1:
                self.loss.require_backward_grad_sync = last
            yield rows

    def backward(self, loss: Tensor, /, **figures: Tensor) -> None:
        """The backward pass of one micro-batch. figures: numbers of which `finish` gives the means."""
        self.names = list(figures)
        (loss * self.share).backward()
        told = torch.stack([value.detach().float() for value in figures.values()])
        self.sum.add([told] if self.way != "exact" else [told, *self._take()])

    def finish(self) -> dict[str, float]:
        """Gradients of the whole batch in every parameter's `grad`; the means of the figures over all micro-batches."""
        told, *gradients = self.sum.total()
        across([told, *gradients], self.processes)
        for parameter, gradient in zip(self.given, gradients, strict=True) if self.way == "exact" else ():
            parameter.grad = gradient
        if self.way == "ddp" and self.processes.count > 1:
            self.views = [(p, p.grad) for p in self.loss.parameters() if p.grad is not None]
        means = told / (len(self.rows) * self.processes.count)
        return dict(zip(self.names, means.tolist(), strict=True))

    def _take(self) -> list[Tensor]:
        """The gradients of a micro-batch, away from the parameters."""
        self.given = [p for p in self.loss.parameters() if p.grad is not None]
        gradients = [p.grad for p in self.given]
        for p in self.given:
            p.grad = None
        return gradients


class TreeSum:
    """The sum of lists of tensors, in the order of a binary tree over their numbers.

    The tree's shape depends on how many lists there are and on nothing else: blocks of 1, 2, 4 ... are added to their equals,
    and what is left over from the smallest up. So a run of 2^k lists that begins at a multiple of 2^k may be added up
    elsewhere. At most one sum of each size is kept.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[int, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """One more list; its tensors are changed."""
        size = 1
        while self.kept and self.kept[-1][0] == size:
            torch._foreach_add_(tensors, self.kept.pop()[1])
            size *= 2
        self.kept.append((size, tensors))

    def total(self) -> list[Tensor]:
        """The sum of all, and an end of them."""
        tensors = self.kept.pop()[1]
        while self.kept:
            torch._foreach_add_(tensors, self.kept.pop()[1])
        return tensors


@torch.no_grad()
def across(tensors: list[Tensor], processes: Processes) -> None:
    """Give every process the sum of all processes' tensors, in place; added up as `TreeSum` does, in the order of ranks."""
    rank, count = processes.rank, processes.count
    for part in _buckets(tensors) if count > 1 else ():
        values = torch.cat([tensor.reshape(-1) for tensor in part])
        stride = 1
        while stride < count:
            if rank % (2 * stride) == stride:
                dist.send(values, rank - stride)
                break
            if rank + stride < count:
                other = torch.empty_like(values)
                dist.recv(other, rank + stride)
                values += other
            stride *= 2
        dist.broadcast(values, 0)
        for tensor, value in zip(part, values.split([tensor.numel() for tensor in part]), strict=True):
            tensor.copy_(value.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(t.numel() for t in part) + tensor.numel() > BUCKET:
            yield part
            part = []
        part.append(tensor)
    yield part


def _shard(loss: nn.Module, processes: Processes) -> None:
    """Leave each process its part of every weight. A layer is gathered when it is needed, and what belongs to none (norms,
    embeddings) at the beginning: layers and not blocks, as keys, values and time projections are asked for outside of these."""
    if processes.count == 1:
        raise ValueError("parallel fsdp with one process; expected several, started by torchrun: alone, use exact")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for module in loss.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fully_shard(module, mesh=mesh)
    fully_shard(loss, mesh=mesh)
