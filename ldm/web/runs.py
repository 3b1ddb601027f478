"""Jobs on the device: those that go together in one batch, and a single one batch after batch.

A job of several batches is several runs of the pipeline, whose pictures are those of one run: each image has a seed of its own.
So what is finished is there when the rest is given up. Receipts name no folder of the server.
"""

import dataclasses
import logging
import time
from typing import Any

from ldm.checkpoint import Components
from ldm.pipelines.attention_maps import AttentionMaps
from ldm.pipelines.image_to_image import img2img
from ldm.pipelines.inpaint import inpaint
from ldm.pipelines.result import Result
from ldm.pipelines.settings import Settings
from ldm.pipelines.text_to_image import txt2img
from ldm.pipelines.together import txt2img_together
from ldm.web.job import CANCELLED, PREVIEW_EVERY, WATCHED, Job
from ldm.web.views import MOST_STEPS_SHOWN, overlays, png, small_picture

PIPELINES = {"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint}

log = logging.getLogger("ldm.web")


class CancelledError(Exception):
    """Raised inside a run to leave it."""


def run(components: Components, jobs: list[Job]) -> list[Result | Exception | None]:
    """For each job its result, what went wrong, or nothing where it was cancelled."""
    if len(jobs) > 1:
        try:
            results = txt2img_together(components, [job.fields for job in jobs], after_step=_Hook(components, jobs))
            return [_shown(result) for result in results]
        except CancelledError:
            return [None] * len(jobs)
        except Exception as error:  # one of them is to blame: alone, the others are not
            log.info("made one by one, since together: %s", error)
    return [_alone(components, job) for job in jobs]


def _alone(components: Components, job: Job) -> Result | Exception | None:
    try:
        if "attention" not in job.views:
            return _in_batches(components, job)
        with AttentionMaps(components) as maps:
            result = _in_batches(components, job)
        job.attention = overlays(maps.words(job.fields["prompt"]), result.images[0]) if maps.calls else []
        return result
    except CancelledError:
        return None
    except Exception as error:
        return error


def _in_batches(components: Components, job: Job) -> Result:
    fields, count = job.fields, job.count  # taken before the look at the state: the end of a job takes pictures out of them
    splits = fields.get("convention", "ldm") == "ldm"  # the others draw for all images of a run at once
    width = min(fields.get("batch_size", Settings.batch_size), count) if splits else count
    made = Result([], None, [], [])
    job.batches = -(-count // width)
    for batch, start in enumerate(range(0, count, width)):
        if job.state == CANCELLED:
            raise CancelledError
        job.batch = batch
        own = {"seed": fields["seed"] + start, "num_images": min(width, count - start)} if job.batches > 1 else {}
        result = PIPELINES[job.task](components, **{**fields, **own}, after_step=_Hook(components, [job]))
        part = _shown(result, start)
        made = Result(made.images + part.images, None, made.receipts + part.receipts, made.safety + part.safety)
        job.finished = made
    return made


def _shown(result: Result, start: int = 0) -> Result:
    """The result as clients are told of it, its images counted from `start`; of its latents nobody has a use here."""
    told = [{**receipt, "adapter_folder": None, "index": receipt["index"] + start} for receipt in result.receipts]
    return dataclasses.replace(result, latents=None, receipts=told)


class _Hook:
    """After each step: progress, a preview for those who watch, and the way out."""

    def __init__(self, components: Components, jobs: list[Job]):
        self.components, self.jobs, self.shown = components, jobs, 0.0

    def __call__(self, x: Any, info: Any) -> Any:
        if all(job.state == CANCELLED for job in self.jobs):
            raise CancelledError
        now = time.monotonic()
        for job in self.jobs:
            job.step, job.steps = job.batch * info.count + info.index + 1, job.batches * info.count
        seen = [job for job in self.jobs if job.withheld is None]
        for job in seen:
            shown = max(1, -(-info.count // MOST_STEPS_SHOWN))
            if "denoising" in job.views and job.batch == 0 and (info.index % shown == 0 or info.index + 1 == info.count):
                job.denoising.append((f"t = {info.step.t:g}", small_picture(self.components, info.x0[:1])))
        watched = [job for job in seen if now - job.watched < WATCHED]
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
            job.preview = png(small_picture(self.components, x0[firsts[job.id]][None]))
