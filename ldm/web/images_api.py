"""POST /v1/images: the form's own fields, and jobs that can be watched, fetched and cancelled.

A request is answered when its pictures are made, or, with `?wait=false`, at once with a job. Whoever leaves while waiting gives
up the place in the queue. Errors are 422 with a list `detail` of {loc, msg}, as FastAPI's own, naming field and range.
"""

import asyncio
import base64
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field

from ldm.output import files
from ldm.samplers import all_samplers
from ldm.web import form
from ldm.web.jobs import CANCELLED, DONE, FAILED, FullError, Job, Jobs

POLL = 0.05  # seconds between two looks at a job
RETRY_AFTER = "5"  # seconds, for whom the queue was full
NAMES = {"steps": "num_inference_steps"}  # of the pipelines' fields, where the form has others


class MadeImage(BaseModel):
    """A picture, base64 of a PNG that carries its receipt."""

    png: str
    seed: int
    flagged: bool | None = Field(description="by the safety checker; null where nobody asked")
    receipt: dict[str, Any]


class JobState(BaseModel):
    id: str
    state: str = Field(description="waiting, running, done, failed or cancelled")
    position: int = Field(description="jobs that are made before it")
    progress: float
    step: int
    steps: int
    error: str | None = None
    images: list[MadeImage] = Field(default_factory=list)


def invalid(field: str, message: str) -> RequestValidationError:
    """A field's refusal, as FastAPI's own are."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", field), "msg": message, "input": None}])


def refused(job: Job, names: dict[str, str]) -> Exception:
    """What a job that failed is answered: a fault of the server's, or the refusal of a field, which `names` may rename."""
    if job.fault:
        return HTTPException(500, job.error)
    field = form.field_in(job.error)
    return invalid(names.get(field, field), job.error)


def submit(jobs: Jobs, task: str, fields: dict[str, Any], origin: str = "v1") -> Job:
    try:
        return jobs.submit(task, fields, origin)
    except FullError as error:
        raise HTTPException(429, str(error), {"Retry-After": RETRY_AFTER}) from None


async def finished(jobs: Jobs, job: Job, request: Request) -> Job:
    """The job when it is over; cancelled where the client has left."""
    while not job.over.is_set():
        if await request.is_disconnected():
            jobs.cancel(job)
            break
        await asyncio.sleep(POLL)
    return job


def encoded(job: Job) -> list[bytes]:
    """The PNGs of a job that is done."""
    return [files.png(picture, receipt) for picture, receipt in zip(job.result.images, job.result.receipts, strict=True)]


def router(jobs: Jobs, limits: form.Limits) -> APIRouter:
    """The routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["images"])

    def found(job_id: str) -> Job:
        job = jobs.get(job_id)
        if job is None:
            raise HTTPException(404, "no such job; finished ones are forgotten after a while")
        return job

    def state(job: Job) -> JobState:
        with jobs.changed:  # so that what is told is of one moment
            told = JobState(
                id=job.id,
                state=job.state,
                position=jobs.position(job),
                progress=job.progress,
                step=job.step,
                steps=job.steps,
                error=job.error,
            )
        if told.state == DONE:
            for data, receipt, verdict in zip(encoded(job), job.result.receipts, job.result.safety, strict=True):
                png, flagged = base64.b64encode(data).decode(), None if verdict is None else verdict.flagged
                told.images.append(MadeImage(png=png, seed=receipt["seed"], flagged=flagged, receipt=receipt))
        return told

    @routes.post("/images", responses={202: {"model": JobState}, 429: {"description": "the queue is full"}})
    async def make(asked: form.ImagesRequest, request: Request, response: Response, wait: bool = True) -> JobState:
        """Make pictures."""
        try:
            fields = await asyncio.to_thread(form.fields_of, asked, jobs.components, limits)
        except form.FieldError as error:
            raise invalid(NAMES.get(error.field, error.field), str(error)) from None
        job = submit(jobs, form.task_of(asked), fields)
        if not wait:
            response.status_code = 202
            return state(job)
        await finished(jobs, job, request)
        if job.state == FAILED:
            raise refused(job, NAMES)
        if job.state == CANCELLED:
            raise HTTPException(409, "the job was cancelled")
        return await asyncio.to_thread(state, job)

    @routes.get("/jobs/{job_id}")
    def look(job_id: str) -> JobState:
        """How a job stands; with its pictures when it is done."""
        return state(found(job_id))

    previews = {200: {"content": {"image/png": {}}}, 204: {}, 403: {"description": "the safety checker allows none"}}

    @routes.get("/jobs/{job_id}/preview", response_class=Response, responses=previews)
    def preview(job_id: str) -> Response:
        """What the picture looks like so far, small; nothing where there is none yet."""
        job = found(job_id)
        if job.withheld is not None:
            raise HTTPException(403, job.withheld)
        job.watch()
        shown = job.preview  # which the end of the job takes away
        return Response(status_code=204) if shown is None else Response(shown, media_type="image/png")

    @routes.get("/jobs/{job_id}/images/{index}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def file(job_id: str, index: int) -> Response:
        """One picture as a file."""
        job = found(job_id)
        if job.state != DONE or not 0 <= index < len(job.result.images):
            raise HTTPException(404, "no such picture")
        data, seed = encoded(job)[index], job.result.receipts[index]["seed"]
        name = f'attachment; filename="{seed}.png"'
        return Response(data, media_type="image/png", headers={"Content-Disposition": name})

    @routes.delete("/jobs/{job_id}")
    def cancel(job_id: str) -> JobState:
        """Give a job up; one that is over stays as it is."""
        job = found(job_id)
        jobs.cancel(job)
        return state(job)

    @routes.get("/form")
    def about() -> dict[str, Any]:
        """The fields of a request, the samplers, and the LoRAs that this server has."""
        return {
            "fields": form.ImagesRequest.model_json_schema()["properties"],
            "samplers": list(all_samplers()),
            "loras": form.adapters(limits),
            "model": jobs.components.name,
        }

    return routes
