"""/sdapi/v1: the HTTP API of AUTOMATIC1111's web interface, as its clients call it (PyPI's `webuiapi`, unchanged).

Prompts are read in its syntax and in windows of 75 tokens. What it can do and this cannot is refused by name where a request
asks for it, and taken without a word where the field has its neutral value, which clients send with everything. Masks are hard
and pictures inpainted as a whole: mask_blur and inpaint_full_res, which clients send too, change nothing. Whoever interrupts
gets the pictures of the batches (n_iter) that are finished.
"""

import asyncio
import base64
import json
import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from PIL import ImageOps
from pydantic import BaseModel, ConfigDict, Field

from ldm.diffusion.conventions import SPACINGS
from ldm.output import receipt as receipts
from ldm.samplers import find, plain
from ldm.web import a1111_facts, form
from ldm.web import a1111_pictures as pictures
from ldm.web.images_api import encoded, finished, invalid, refused, submit
from ldm.web.jobs import DONE, FAILED, RUNNING, Job, Jobs

ORIGIN = "sdapi"
AUTOMATIC = ("", "automatic")  # its schedule that is none
# Fields of theirs for which there is nothing here: the values that ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "enable_hr": (False,),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "subseed_strength": (0,),
    "styles": ([], None),
    "script_name": (None, "", "None"),
    "s_churn": (0, None),
    "inpainting_fill": (1, 0),
    "firstpass_image": (None, ""),
    "refiner_checkpoint": (None, ""),
}
# Of the pipelines' fields, where theirs have other names.
NAMES = {
    "guidance_scale": "cfg_scale",
    "sampler": "sampler_name",
    "spacing": "scheduler",
    "num_images": "n_iter",
    "image": "init_images",
    "strength": "denoising_strength",
}
FILES_AT_ONCE = 2  # that are unpacked for their texts


class Request1111(BaseModel):
    """The fields that both tasks have. What is not listed is looked at by `_check_neutral`."""

    model_config = ConfigDict(extra="allow")

    prompt: form.Text = ""
    negative_prompt: form.Text | None = ""
    seed: Annotated[int, Field(ge=-1, lt=form.SEEDS_BELOW)] = -1
    batch_size: Annotated[int, Field(ge=1, le=form.MOST_IMAGES)] = 1
    n_iter: Annotated[int, Field(ge=1, le=form.MOST_IMAGES)] = 1
    steps: Annotated[int, Field(ge=1, le=form.MOST_STEPS)] = 20
    cfg_scale: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 7.0
    width: form.Side = 512
    height: form.Side = 512
    sampler_name: Annotated[str, Field(max_length=100)] | None = None
    sampler_index: Annotated[str, Field(max_length=100)] | None = None
    scheduler: Annotated[str, Field(max_length=100)] | None = None
    eta: Annotated[float, Field(allow_inf_nan=False)] | None = None
    send_images: bool = True
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None


class Txt2Img(Request1111):
    pass


class Img2Img(Request1111):
    init_images: Annotated[list[form.Picture], Field(min_length=1, max_length=1)]
    mask: form.Picture | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.75
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] | bool = 0
    include_init_images: bool = False


class PngInfo(BaseModel):
    image: form.Picture


def router(jobs: Jobs, limits: form.Limits) -> APIRouter:
    routes = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    _add_making(routes, jobs, limits)
    _add_progress(routes, jobs)
    a1111_facts.add(routes, jobs, limits)
    return routes


# -- Pictures --------------------------------------------------------------------------------------------------------------


def _add_making(routes: APIRouter, jobs: Jobs, limits: form.Limits) -> None:
    reading = asyncio.Semaphore(FILES_AT_ONCE)

    async def made(task: str, asked: Request1111, fields: dict[str, Any], request: Request) -> dict[str, Any]:
        job = submit(jobs, task, fields, ORIGIN)
        await finished(jobs, job, request)
        if job.state == FAILED:
            raise refused(job, NAMES)
        return await asyncio.to_thread(_response, asked, job)

    @routes.post("/txt2img")
    async def txt2img(asked: Txt2Img, request: Request) -> dict[str, Any]:
        """Text to image."""
        fields = await _checked(lambda: form.check(fields_of(asked, jobs, limits), jobs.components, limits))
        return await made("txt2img", asked, fields, request)

    @routes.post("/img2img")
    async def img2img(asked: Img2Img, request: Request) -> dict[str, Any]:
        """Image to image; with a mask, inpainting."""

        def checked() -> dict[str, Any]:
            fields = fields_of(asked, jobs, limits)
            return form.check(fields | _sources(asked, limits), jobs.components, limits)

        fields = await _checked(checked)
        return await made("img2img" if asked.mask is None else "inpaint", asked, fields, request)

    @routes.post("/png-info")
    async def png_info(asked: PngInfo) -> dict[str, Any]:
        """What a picture says of how it was made."""
        async with reading:
            texts = await _checked(lambda: pictures.texts(asked.image, limits))
        return {"info": texts.get("parameters", ""), "items": texts, "parameters": {}}


async def _checked(make: Any) -> Any:
    """make(), with what it refuses as a 422."""
    try:
        return await asyncio.to_thread(make)
    except form.FieldError as error:
        raise invalid(NAMES.get(error.field, error.field), str(error)) from None


def _sources(asked: Img2Img, limits: form.Limits) -> dict[str, Any]:
    """The picture to start from, and its mask, in the size that is asked for where resize_mode tells how to get there."""
    if asked.resize_mode == pictures.LATENT:
        raise form.FieldError("resize_mode", "resize_mode 3 (latent upscale) is not offered here; expected 0, 1 or 2")
    size = (asked.width, asked.height)
    image = form.picture(asked.init_images[0], "init_images", limits.most_image_pixels)
    found = {"image": pictures.resized(image, size, asked.resize_mode), "strength": asked.denoising_strength}
    if asked.mask is not None:
        mask = pictures.mask(asked.mask, limits)
        mask = ImageOps.invert(mask) if asked.inpainting_mask_invert else mask
        found["mask"] = pictures.resized(mask, size, asked.resize_mode)
    return found


def fields_of(asked: Request1111, jobs: Jobs, limits: form.Limits) -> dict[str, Any]:
    """The pipeline's keyword arguments but for pictures, for `form.check`. Raises FieldError."""
    _check_neutral(asked)
    try:
        a1111_facts.check_options(asked.override_settings or {}, jobs.components)
    except form.FieldError as error:
        raise form.FieldError("override_settings", str(error)) from None
    count = asked.batch_size * asked.n_iter
    if count > form.MOST_IMAGES:
        raise form.FieldError("n_iter", f"batch_size x n_iter is {count}; expected at most {form.MOST_IMAGES}")
    spelling = asked.sampler_name or asked.sampler_index or "Euler"
    fields: dict[str, Any] = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt or "",
        "num_images": count,
        "batch_size": asked.batch_size,
        "steps": asked.steps,
        "guidance_scale": asked.cfg_scale,
        "seed": None if asked.seed == -1 else asked.seed,
        "sampler": spelling,
        "prompt_syntax": "a1111",
        "long_prompt": "windows",
    }
    scheduler = plain(asked.scheduler or "")
    if scheduler not in AUTOMATIC:
        if scheduler not in SPACINGS:
            known = ", ".join(["automatic", *SPACINGS])
            raise form.FieldError("scheduler", f"scheduler {asked.scheduler!r}; expected one of {known}")
        fields["spacing"] = scheduler
    if asked.eta and _is_ddim(spelling):
        fields["eta"] = asked.eta
    if limits.adapter_folder is not None:
        fields["adapter_folder"] = str(limits.adapter_folder)
    return fields | form.sizes(asked.width, asked.height, None, jobs.components, limits)


def _is_ddim(spelling: str) -> bool:
    try:
        return find(spelling).NAME == "ddim"
    except ValueError:
        return False


def _check_neutral(asked: Request1111) -> None:
    for name, values in NEUTRAL.items():
        value = (asked.model_extra or {}).get(name, values[0])
        if value not in values:
            raise form.FieldError(name, f"{name} is not offered here; expected {json.dumps(values[0])}")
    for name, script in (asked.alwayson_scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if arguments not in (None, [], {}, [False]):
            raise form.FieldError("alwayson_scripts", f"script {name[:60]!r} is not offered here; leave it out")


def _response(asked: Request1111, job: Job) -> dict[str, Any]:
    made = job.result.receipts if job.result else []
    seeds = [receipt["seed"] for receipt in made]
    info = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(made),
        "negative_prompt": asked.negative_prompt or "",
        "seed": seeds[0] if seeds else job.fields["seed"],
        "all_seeds": seeds,
        "width": job.fields["width"],
        "height": job.fields["height"],
        "sampler_name": job.fields["sampler"],
        "cfg_scale": asked.cfg_scale,
        "steps": asked.steps,
        "batch_size": asked.batch_size,
        "denoising_strength": job.fields.get("strength"),
        "infotexts": [receipts.parameters(receipt) for receipt in made],
        "interrupted": job.state != DONE,
    }
    shown = [base64.b64encode(data).decode() for data in encoded(job)] if made and asked.send_images else []
    return {"images": shown, "parameters": _told(asked), "info": json.dumps(info)}


def _told(asked: Request1111) -> dict[str, Any]:
    """The fields that there are, as asked for: the others, and scripts, which ask for nothing, may hold what JSON cannot carry
    back. Of settings, only those that there are have been let through."""
    left_out = {"init_images", "mask", "alwayson_scripts"}
    return asked.model_dump(include=set(type(asked).model_fields) - left_out) | {"alwayson_scripts": {}}


# -- Progress --------------------------------------------------------------------------------------------------------------


def _add_progress(routes: APIRouter, jobs: Jobs) -> None:
    @routes.get("/progress")
    def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """Of what is being made now."""
        running = next((job for job in jobs.running if job.state == RUNNING), None)
        waiting = len(jobs.waiting)
        in_batch = running.steps // running.batches if running else 0
        state = {
            "skipped": False,
            "interrupted": False,
            "job": running.id if running else "",
            "job_count": waiting + (1 if running else 0),
            "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
            "job_no": running.batch if running else 0,
            "sampling_step": running.step - running.batch * in_batch if running else 0,
            "sampling_steps": in_batch,
        }
        found: dict[str, Any] = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
        if running is not None:
            spent = time.monotonic() - (running.begun or time.monotonic())
            share = running.progress
            found["progress"], found["eta_relative"] = share, spent / share - spent if share else 0.0
            found["textinfo"] = running.withheld
            if not skip_current_image:
                running.watch()
                preview = running.preview  # which the end of the job takes away
                found["current_image"] = None if preview is None else base64.b64encode(preview).decode()
        return found

    @routes.post("/interrupt")
    @routes.post("/skip")
    def interrupt() -> dict[str, Any]:
        """Leave what is being made for clients of this API; what is finished of it is theirs."""
        for job in list(jobs.running):
            if job.origin == ORIGIN and job.state == RUNNING:
                jobs.cancel(job, keep=True)
        return {}
