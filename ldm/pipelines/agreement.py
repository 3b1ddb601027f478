"""What the processes of one run decide together, and how they part where one of them cannot go on.

Work that is split by number needs few words: whether everybody is ready, what the first process found, that all are done.
These go over a gloo group of their own, also where tensors would go over NCCL: it sees at once when a process dies, a process
that waits can be interrupted, and patience is long, since shares of work take their time.

A refusal is said once, by the first process. The others leave with exit status 1 and no word.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from ldm.processes import SHARE, LostError, Processes

REFUSALS = (ValueError, OSError, ImportError, MemoryError)  # what the command line says in one line

T = TypeVar("T")


class Agreement:
    """All processes must come to the same calls, in the same order."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self._group = dist.new_group(backend="gloo", timeout=SHARE) if processes.count > 1 else None

    def each(self, act: Callable[[], T]) -> T:
        """What `act` returns in this process, once it has returned in all. Where it is refused in one, all of them end."""
        if self.processes.count == 1:
            return act()
        made, refusal = None, None
        try:
            made = act()
        except REFUSALS as error:
            refusal = error
        said: list[str | None] = [None] * self.processes.count
        text = None if refusal is None else str(refusal) or type(refusal).__name__
        self._sent(lambda: dist.all_gather_object(said, text, group=self._group))
        if any(text is not None for text in said):
            self._end(refusal, next(f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None))
        return made

    def first(self, act: Callable[[], T]) -> T:
        """What `act` returns in the first process, which calls it when all have come this far; known to all."""
        if self.processes.count == 1:
            return act()
        self.each(lambda: None)
        refusal: Exception | None = None
        found: list[Any] = [None, None]  # and why not
        if self.processes.leads:
            try:
                found[0] = act()
            except REFUSALS as error:
                refusal, found[1] = error, str(error)
        self._sent(lambda: dist.broadcast_object_list(found, src=0, group=self._group))
        if found[1] is not None:
            self._end(refusal, found[1])
        return found[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that are this process's: every `count`-th."""
        return items[self.processes.rank :: self.processes.count]

    def _end(self, own: Exception | None, text: str) -> None:
        if not self.processes.leads:
            raise SystemExit(1)
        raise own or ValueError(text)

    def _sent(self, send: Callable[[], None]) -> None:
        try:
            send()
        except RuntimeError as error:
            if not self.processes.leads:
                raise SystemExit(1) from None
            reason = " ".join(str(error).split())[:120]
            raise LostError(
                f"another process has ended before its work was done ({reason}); the same command goes on"
            ) from None
