"""The queue: jobs wait their turn for the device, within a bound, and can be watched and cancelled.

One thread works. What waits and is alike in everything but prompts and seeds goes through the network together, up to
`together` pictures. Finished jobs are kept for a while, so that whoever asks late still gets them, and then forgotten: after
some time, or the oldest first where they are many or their pictures take much room.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint import Components
from ldm.pipelines.result import Result
from ldm.pipelines.together import alike
from ldm.web.job import CANCELLED, DONE, FAILED, RUNNING, WAITING, Job
from ldm.web.runs import run

WITHHELD = "nothing is shown before it is finished, since the model's safety checker sees finished pictures alone"

log = logging.getLogger("ldm.web")


class FullError(Exception):
    """The queue has as many jobs as it takes."""


class Jobs:
    """The queue of one model on one device."""

    def __init__(
        self,
        components: Components,
        *,
        bound: int = 16,
        together: int = 4,
        kept: int = 64,
        room: int = 256 << 20,
        seconds: float = 600.0,
    ):
        """bound: jobs that may wait. together: pictures in one batch. kept, room, seconds: finished jobs, bytes of their
        pictures (the last one stays, whatever its size), and how long."""
        self.components, self.bound, self.together = components, bound, together
        self.kept, self.room, self.seconds = kept, room, seconds
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.known: dict[str, Job] = {}
        self.totals = {DONE: 0, FAILED: 0, CANCELLED: 0, "refused": 0, "pictures": 0}
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="ldm-jobs", daemon=True)
        self.thread.start()
        threading.Thread(target=self._tidy, name="ldm-tidy", daemon=True).start()

    def submit(self, task: str, fields: Mapping[str, Any], origin: str = "", views: tuple[str, ...] = ()) -> Job:
        """Put a job in the queue. Raises FullError."""
        job = Job(task, dict(fields), origin=origin, views=views)
        if self.components.safety is not None and fields.get("safety", "black") in ("black", "blur"):
            job.withheld = WITHHELD
        with self.changed:
            if self.closed:
                raise FullError("the server is being shut down")
            if len(self.waiting) >= self.bound:
                self.totals["refused"] += 1
                raise FullError(f"{len(self.waiting)} jobs are waiting, as many as may; try again later")
            self.waiting.append(job)
            self.known[job.id] = job
            self.changed.notify_all()
        return job

    def get(self, job_id: str) -> Job | None:
        with self.changed:
            self._forget()
            return self.known.get(job_id)

    def position(self, job: Job) -> int:
        """How many jobs will be done before it."""
        with self.changed:
            return self.waiting.index(job) + (1 if self.running else 0) if job in self.waiting else 0

    def cancel(self, job: Job, keep: bool = False) -> None:
        """Take a job out of the queue, or out of the run that it is in; nothing where it is over.

        keep: its result is what was finished of it, batch by batch, where anything was.
        """
        with self.changed:
            if job.state == WAITING:
                self.waiting.remove(job)
                self._end(job, CANCELLED)
            elif job.state == RUNNING:  # the run looks after every step
                self._end(job, CANCELLED, job.finished if keep else None)

    def close(self, seconds: float = 30.0) -> None:
        """Cancel everything and wait for the thread."""
        with self.changed:
            self.closed = True
            for job in [*self.waiting, *self.running]:
                self.cancel(job)
            self.changed.notify_all()
        self.thread.join(seconds)

    # -- The threads -------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                self.running = self._next()
                for job in self.running:
                    job.state, job.begun = RUNNING, time.monotonic()
            self._finish(self.running, run(self.components, self.running))

    def _next(self) -> list[Job]:
        """The first that waits, and what can go with it."""
        jobs = [self.waiting.popleft()]
        first = jobs[0]
        room = self.together - first.count
        if not _sociable(first):
            return jobs
        for job in list(self.waiting):
            if job.count <= room and _sociable(job) and alike(first.fields, job.fields):
                self.waiting.remove(job)
                jobs.append(job)
                room -= job.count
        return jobs

    def _finish(self, jobs: list[Job], outcomes: list[Result | Exception | None]) -> None:
        with self.changed:
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.over.is_set():  # cancelled
                    continue
                if outcome is None:
                    self._end(job, CANCELLED)
                elif isinstance(outcome, Exception):
                    job.fault = not isinstance(outcome, ValueError)  # which the pipelines refuse fields with
                    job.error = _told(outcome, job)
                    self._end(job, FAILED)
                else:
                    self._end(job, DONE, outcome)
            self.running = []

    def _end(self, job: Job, state: str, result: Result | None = None) -> None:
        self.totals[state] += 1
        self.totals["pictures"] += len(result.images) if result else 0
        job.result, job.finished, job.preview = result, None, None
        job.state, job.ended = state, time.monotonic()
        job.fields = {name: value for name, value in job.fields.items() if name not in ("image", "mask")}  # they take room
        job.over.set()
        self.changed.notify_all()

    def _tidy(self) -> None:
        """Forget what is due, also while nobody asks for anything."""
        with self.changed:
            while not self.closed:
                self.changed.wait(self._forget())

    def _forget(self) -> float | None:
        """Let go of what has been over for long, and of the oldest where there are many, or large ones; seconds until the next
        is due."""
        newest_first = sorted((job for job in self.known.values() if job.over.is_set()), key=lambda job: -job.ended)
        now, held, due = time.monotonic(), 0, None
        for place, job in enumerate(newest_first):
            held += job.size
            left = job.ended + self.seconds - now
            if left <= 0 or place >= self.kept or (place > 0 and held > self.room):
                del self.known[job.id]
            else:
                due = left
        return due


def _told(error: Exception, job: Job) -> str:
    """One line for the client, which names no folder of the server."""
    if isinstance(error, ValueError):
        text, folder = str(error), job.fields.get("adapter_folder") or ""
        if Path(folder).is_absolute():
            text = text.replace(f"{folder}/", "").replace(folder, "the adapters' folder")
        return " ".join(text.split())
    log.error("a run failed", exc_info=error)
    return f"{type(error).__name__} while the picture was made; the server's log has it all"


def _sociable(job: Job) -> bool:
    """Whether it can go with others at all: a batch has one model, which LoRAs change, and views are of one job."""
    with_loras = job.fields.get("loras") or "<lora:" in job.fields["prompt"]
    return job.task == "txt2img" and not with_loras and not job.views and job.fields.get("convention", "ldm") == "ldm"
