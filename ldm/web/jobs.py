"""The queue: jobs wait their turn for the device, within a bound, and can be watched and cancelled.

One thread works. What waits and is alike in everything but prompts and seeds goes through the network together, up to
`together` pictures. Finished jobs are kept for a while, so that whoever asks late still gets them, and then forgotten.
"""

import dataclasses
import logging
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm.checkpoint import Components
from ldm.pipelines.attention_maps import AttentionMaps
from ldm.pipelines.image_to_image import img2img
from ldm.pipelines.inpaint import inpaint
from ldm.pipelines.result import Result
from ldm.pipelines.text_to_image import txt2img
from ldm.pipelines.together import alike, txt2img_together
from ldm.web.views import MOST_STEPS_SHOWN, overlays, png, small_picture

PIPELINES = {"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint}
WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
PREVIEW_EVERY = 1.0  # seconds between two previews of a job that is watched
WATCHED = 5.0  # seconds since somebody asked for a preview, within which a job counts as watched

log = logging.getLogger("ldm.web")


class FullError(Exception):
    """The queue has as many jobs as it takes."""


class CancelledError(Exception):
    """Raised inside a run to leave it."""


@dataclass(eq=False)
class Job:
    """One request. `fields` are the pipeline's keyword arguments, the prompt among them, checked beforehand."""

    task: str
    fields: Mapping[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = WAITING
    step: int = 0
    steps: int = 0
    preview: bytes | None = None  # a PNG
    result: Result | None = None
    error: str | None = None
    fault: bool = False  # whether the error is the server's own
    origin: str = ""  # which interface it came through
    views: tuple[str, ...] = ()  # "attention", "denoising": what else to make, for those who study the model
    attention: list[tuple[str, Image.Image]] = field(default_factory=list)  # words and how pixels looked at them
    denoising: list[tuple[str, Image.Image]] = field(default_factory=list)  # the estimate of the picture, step by step
    made: float = field(default_factory=time.monotonic)
    begun: float | None = None
    ended: float | None = None
    watched: float = float("-inf")
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def count(self) -> int:
        """Pictures."""
        return self.fields.get("num_images", 1)

    @property
    def progress(self) -> float:
        """0 to 1."""
        return 1.0 if self.state == DONE else self.step / self.steps if self.steps else 0.0

    def watch(self) -> None:
        """Somebody would like a preview."""
        self.watched = time.monotonic()


class Jobs:
    """The queue of one model on one device."""

    def __init__(self, components: Components, *, bound: int = 16, together: int = 4, kept: int = 64, seconds: float = 600.0):
        """bound: jobs that may wait. together: pictures in one batch. kept, seconds: finished jobs, and how long."""
        self.components, self.bound, self.together, self.kept, self.seconds = components, bound, together, kept, seconds
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.known: OrderedDict[str, Job] = OrderedDict()
        self.totals = {DONE: 0, FAILED: 0, CANCELLED: 0, "refused": 0, "pictures": 0}
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="ldm-jobs", daemon=True)
        self.thread.start()

    def submit(self, task: str, fields: Mapping[str, Any], origin: str = "", views: tuple[str, ...] = ()) -> Job:
        """Put a job in the queue. Raises FullError."""
        job = Job(task, dict(fields), origin=origin, views=views)
        with self.changed:
            if self.closed:
                raise FullError("the server is being shut down")
            if len(self.waiting) >= self.bound:
                self.totals["refused"] += 1
                raise FullError(f"{len(self.waiting)} jobs are waiting, as many as may; try again later")
            self._forget()
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

    def cancel(self, job: Job) -> None:
        """Take a job out of the queue, or out of the run that it is in; nothing where it is over."""
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)
                self._end(job, CANCELLED)
            elif job.state == RUNNING:
                self._end(job, CANCELLED)  # the run looks after every step

    def close(self, seconds: float = 30.0) -> None:
        """Cancel everything and wait for the thread."""
        with self.changed:
            self.closed = True
            for job in [*self.waiting, *self.running]:
                self.cancel(job)
            self.changed.notify_all()
        self.thread.join(seconds)

    # -- The thread --------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if self.closed:
                    return
                self.running = self._next()
                for job in self.running:
                    job.state, job.begun = RUNNING, time.monotonic()
            self._finish(self.running, self._run(self.running))

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

    def _run(self, jobs: list[Job]) -> list[Result | Exception | None]:
        """For each job its result, what went wrong, or nothing where it was cancelled."""
        if len(jobs) > 1:
            try:
                fields = [job.fields for job in jobs]
                return [*txt2img_together(self.components, fields, after_step=_Hook(self.components, jobs))]
            except CancelledError:
                return [None] * len(jobs)
            except Exception as error:  # one of them is to blame: alone, the others are not
                log.info("made one by one, since together: %s", error)
        return [self._alone(job) for job in jobs]

    def _alone(self, job: Job) -> Result | Exception | None:
        pipeline, hook = PIPELINES[job.task], _Hook(self.components, [job])
        try:
            if job.state == CANCELLED:
                return None
            if "attention" not in job.views:
                return pipeline(self.components, **job.fields, after_step=hook)
            with AttentionMaps(self.components) as maps:
                result = pipeline(self.components, **job.fields, after_step=hook)
            job.attention = overlays(maps.words(job.fields["prompt"]), result.images[0]) if maps.calls else []
            return result
        except CancelledError:
            return None
        except Exception as error:
            return error

    def _finish(self, jobs: list[Job], outcomes: list[Result | Exception | None]) -> None:
        with self.changed:
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.over.is_set():  # cancelled
                    continue
                if outcome is None:
                    self._end(job, CANCELLED)
                elif isinstance(outcome, Exception):
                    job.fault = not isinstance(outcome, ValueError)  # which the pipelines refuse fields with
                    job.error = _told(outcome)
                    self._end(job, FAILED)
                else:
                    job.result = dataclasses.replace(outcome, latents=None)  # of which nobody has a use here
                    self.totals["pictures"] += len(outcome.images)
                    self._end(job, DONE)
            self.running = []
            self._forget()

    def _end(self, job: Job, state: str) -> None:
        job.state, job.ended, job.preview = state, time.monotonic(), None
        job.fields = {name: value for name, value in job.fields.items() if name not in ("image", "mask")}  # they take room
        self.totals[state] += 1
        job.over.set()

    def _forget(self) -> None:
        """Let go of what has been over for long, and of the oldest where there are many."""
        over = [job for job in self.known.values() if job.over.is_set()]
        late = time.monotonic() - self.seconds
        for place, job in enumerate(over):
            if job.ended < late or len(over) - place > self.kept:
                del self.known[job.id]


class _Hook:
    """After each step: progress, a preview for those who watch, and the way out."""

    def __init__(self, components: Components, jobs: list[Job]):
        self.components, self.jobs, self.shown = components, jobs, 0.0

    def __call__(self, x: Any, info: Any) -> Any:
        if all(job.state == CANCELLED for job in self.jobs):
            raise CancelledError
        now = time.monotonic()
        for job in self.jobs:
            job.step, job.steps = info.index + 1, info.count
        for job in self.jobs:
            shown = max(1, -(-info.count // MOST_STEPS_SHOWN))
            if "denoising" in job.views and (info.index % shown == 0 or info.index + 1 == info.count):
                job.denoising.append((f"t = {info.step.t:g}", small_picture(self.components, info.x0[:1])))
        watched = [job for job in self.jobs if now - job.watched < WATCHED]
        if watched and now - self.shown >= PREVIEW_EVERY and info.index + 1 < info.count:
            self._preview(info.x0, watched)
            self.shown = time.monotonic()
        return x

    def _preview(self, x0: Any, watched: list[Job]) -> None:
        firsts, at = {}, 0
        for job in self.jobs:
            firsts[job.id] = at
            at += job.count
        for job in watched:
            if firsts[job.id] < len(x0):
                job.preview = png(small_picture(self.components, x0[firsts[job.id]][None]))


def _told(error: Exception) -> str:
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    log.error("a run failed", exc_info=error)
    return f"{type(error).__name__} while the picture was made; the server's log has it all"


def _sociable(job: Job) -> bool:
    """Whether it can go with others at all: a batch has one model, which LoRAs change, and views are of one job."""
    with_loras = job.fields.get("loras") or "<lora:" in job.fields["prompt"]
    return job.task == "txt2img" and not with_loras and not job.views and job.fields.get("convention", "ldm") == "ldm"
