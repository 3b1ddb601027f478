"""The page (gradio): the form of Stable Diffusion's model card, and views for those who study the model.

It asks the same queue with the same checks as POST /v1/images: what is drawn and uploaded comes as data: URLs from `canvas.js`,
what was made is fetched by `gallery.js` from `pictures.py`. Neither passes through gradio's files or its sessions, and what of
gradio the page does not use is closed (`allowed.py`): no path or address of a client is ever looked up, nothing is left on a
disk.
"""

import asyncio
import html
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from pydantic import ValidationError

from ldm.diffusion.conventions import SPACINGS
from ldm.samplers import all_samplers
from ldm.web import form
from ldm.web.jobs import DONE, FAILED, RUNNING, WAITING, FullError, Job, Jobs
from ldm.web.page import pictures
from ldm.web.page.allowed import JOIN, PREDICT, Allowed, Sessions

HERE = Path(__file__).parent
MOST_IMAGES, GUIDANCE = 4, (1, 20)  # of the card's form; the API takes more
LOOK = 0.2  # seconds between two looks at how a job stands
POLL = 0.02  # and at whether it is over
SILENCE = 1.0  # seconds within which gradio is told something: only then does it look whether the client has left
UNHEARD = 10.0  # seconds after which a job is given up that nobody listens to
OWN = "the sampler's own"
ATTENTION, DENOISING = "Attention: which words drew which pixels", "Denoising: the estimate at each step"
VIEWS = {"attention": ATTENTION, "denoising": DENOISING}  # as jobs name them, and as the page does


def mount(app: FastAPI, jobs: Jobs, limits: form.Limits) -> FastAPI:
    """The same application with the page at /."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    told = {"theme": theme, "css_paths": [HERE / "page.css"], "footer_links": [], "run_history": False, "ssr_mode": False}
    refused = {"allowed_paths": [], "max_file_size": 1, "enable_monitoring": False, "pwa": False, "mcp_server": False}
    page = Page(jobs, limits)
    made = blocks(page)
    app.include_router(pictures.router(jobs))
    gr.mount_gradio_app(app, made, path="/", server_name="127.0.0.1", **told, **refused)
    mounted = app.routes[-1]
    mounted.app = Allowed(mounted.app, _calls(made), page.sessions)
    return app


def _calls(made: gr.Blocks) -> dict[str, dict[int, list[str]]]:
    """What `Allowed` wants to know: which functions there are, and the kinds of values that they take."""
    found: dict[str, dict[int, list[str]]] = {JOIN: {}, PREDICT: {}}
    for number, function in made.fns.items():
        found[JOIN if function.queue else PREDICT][number] = [block.api_info()["type"] for block in function.inputs]
    return found


def blocks(page: "Page") -> gr.Blocks:
    """What is on the page, and what its buttons do."""
    components = page.jobs.components
    with gr.Blocks(title=f"ldm: {components.name}", analytics_enabled=False, fill_width=True) as made:
        gr.Markdown(f"# ldm\n{html.escape(components.name)}")
        with gr.Row():
            with gr.Column():
                fields = page.form()
            with gr.Column():
                with gr.Row():
                    start = gr.Button("Make pictures", variant="primary", elem_id="start")
                    stop = gr.Button("Cancel", elem_id="stop")
                told = gr.HTML("", elem_id="told")
                preview = _component("preview", value="")
                with gr.Tabs():
                    with gr.Tab("Pictures"):
                        gallery = _component("gallery", value="")
                    with gr.Tab("Attention", render_children=True):  # so that the pictures are loaded while they are kept
                        attention = gr.HTML(_hint(ATTENTION), elem_id="attention")
                    with gr.Tab("Denoising", render_children=True):
                        denoising = gr.HTML(_hint(DENOISING), elem_id="denoising")
        current = gr.Textbox("", visible="hidden", elem_id="current")  # the job; gradio would forget a State
        quiet = {"api_visibility": "private", "show_progress": "hidden", "preprocess": False}  # the form checks
        outputs = [current, told, preview, gallery, attention, denoising]
        start.click(page.make, list(fields.values()), outputs, trigger_mode="once", concurrency_limit=None, **quiet)
        stop.click(page.cancel, current, None, queue=False, **quiet)
    made.state_session_capacity = 8  # of no use to this page
    made.max_threads = 40 + page.jobs.bound  # calls that gradio runs at a time: all that wait
    return made.queue(max_size=64, api_open=False)


def _component(name: str, **given: Any) -> gr.HTML:
    """An empty box that `name`.js fills."""
    script = (HERE / f"{name}.js").read_text(encoding="utf-8")
    return gr.HTML(html_template=f'<div class="ldm-{name}"></div>', js_on_load=script, elem_id=name, **given)


class Page:
    """The form's components, and what happens to what is in them."""

    def __init__(self, jobs: Jobs, limits: form.Limits):
        self.jobs, self.limits, self.names, self.sessions = jobs, limits, [], Sessions()

    def form(self) -> dict[str, Any]:
        """The fields, by the names that `ImagesRequest` has for them, in the order in which `make` is given them."""
        config = self.jobs.components
        side = config.unet.config.sample_size * config.autoencoder.config.downsampling
        found = {
            "prompt": gr.Textbox(label="Prompt", lines=2, max_length=form.LONGEST_TEXT, elem_id="prompt"),
            "negative_prompt": gr.Textbox(label="Negative prompt", max_length=form.LONGEST_TEXT, elem_id="negative_prompt"),
        }
        with gr.Row():
            found["num_images"] = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images", elem_id="num_images")
            steps = gr.Slider(1, form.MOST_STEPS, 25, step=1, label="Steps", elem_id="num_inference_steps")
            guidance = gr.Slider(*GUIDANCE, config.guidance_scale, step=0.1, label="Guidance", elem_id="guidance_scale")
            found |= {"num_inference_steps": steps, "guidance_scale": guidance}
        with gr.Row():
            for name, hint in (("width", f"{side}, or the image's"), ("height", f"{side}, or the image's"), ("seed", "drawn")):
                found[name] = gr.Textbox(label=name.capitalize(), placeholder=hint, max_length=40, elem_id=name)
        with gr.Row():
            found["sampler"] = gr.Dropdown(list(all_samplers()), value="pndm", label="Sampler", elem_id="sampler")
            found["spacing"] = gr.Dropdown([OWN, *SPACINGS], value=OWN, label="Schedule", elem_id="spacing")
        found["use_compel"] = gr.Checkbox(False, label="Weighted prompts: (word)1.3, word++", elem_id="use_compel")
        names = form.adapters(self.limits)
        with gr.Row(visible=bool(names)):
            found["loras"] = gr.Dropdown(names, value=[], multiselect=True, label="LoRAs", elem_id="loras")
            found["coefficients"] = gr.Textbox(label="Coefficients", placeholder="1, 1, ...", elem_id="coefficients")
        with gr.Accordion("Start from an image, or paint over what is to be made anew"):
            found["canvas"] = _component("canvas", value="")
            found["strength"] = gr.Slider(0, 1, 0.8, step=0.01, label="Strength", elem_id="strength")
        found["views"] = gr.CheckboxGroup([ATTENTION, DENOISING], label="Views", elem_id="views")
        self.names = list(found)
        return found

    async def make(self, request: gr.Request, *values: Any) -> AsyncIterator[tuple]:
        """Put a job in the queue and tell how it stands until it is over: job, told, preview, gallery, attention, denoising."""
        given = dict(zip(self.names, map(self.sessions.taken, values), strict=True))
        keep = gr.skip()
        try:
            views = tuple(kind for kind, about in VIEWS.items() if about in given["views"])
            asking = asked(given)
            fields = await asyncio.to_thread(form.fields_of, asking, self.jobs.components, self.limits)
            job = self.jobs.submit(form.task_of(asking), fields, "page", views)
        except (form.FieldError, FullError) as error:
            where = f"{error.field}: " if isinstance(error, form.FieldError) else ""
            yield "", _line(f"{where}{error}", "refused"), "", keep, keep, keep
            return
        del given, asking, fields  # pictures are in them
        try:
            async for told, preview in self._watched(job, request.session_hash):
                yield job.id, told, preview, keep, keep, keep
        finally:
            self.jobs.cancel(job)  # of whoever has left; of one that is over nothing comes
        if job.state == DONE:
            yield "", _line("done", "done"), "", pictures.gallery(job), *(_view(job, kind) for kind in VIEWS)
        else:
            yield "", _line(job.error if job.state == FAILED else "cancelled", "refused"), "", keep, keep, keep

    async def _watched(self, job: Job, session: str) -> AsyncIterator[tuple[str, str]]:
        """How the job stands and where its preview is, whenever that changes and at least each `SILENCE`, until it is over."""
        shown, count, preview = None, 0, None
        told = heard = time.monotonic()
        while not await _over(job, LOOK):
            job.watch()
            if job.preview is not preview:
                preview, count = job.preview, count + 1
            now = (self._stands(job), pictures.address(job, "preview", count) if preview else "")
            if now != shown or time.monotonic() - told >= SILENCE:
                shown, told = now, time.monotonic()
                yield now
            if self.sessions.listeners.get(session):
                heard = time.monotonic()
            elif time.monotonic() - heard >= UNHEARD:
                self.jobs.cancel(job)

    def cancel(self, job_id: str | None) -> None:
        job = self.jobs.get(job_id or "")
        if job is not None:
            self.jobs.cancel(job)

    def _stands(self, job: Job) -> str:
        if job.state == WAITING:
            return _line(f"waiting for {self.jobs.position(job)} before it", "busy")
        if job.state != RUNNING or not job.steps:
            return _line("begins", "busy")
        return _line(f"step {job.step} of {job.steps}", "busy") + f'<progress max="1" value="{job.progress:.3f}"></progress>'


async def _over(job: Job, seconds: float) -> bool:
    """Whether the job is over within so many seconds. No thread waits, of which there are few."""
    until = time.monotonic() + seconds
    while not job.over.is_set() and time.monotonic() < until:
        await asyncio.sleep(POLL)
    return job.over.is_set()


def asked(given: dict[str, Any]) -> form.ImagesRequest:
    """The request that the form's values are. Raises FieldError."""
    named = {name: value for name, value in given.items() if name in form.ImagesRequest.model_fields and value is not None}
    if named.get("spacing") == OWN:
        del named["spacing"]
    for name in ("width", "height", "seed"):
        if not named.get(name, "").strip():
            named.pop(name, None)
    low, high = GUIDANCE
    if not low <= named.get("guidance_scale", low) <= high:
        raise form.FieldError("guidance_scale", f"guidance {named['guidance_scale']}; expected {low} to {high}")
    if named.get("num_images", 1) > MOST_IMAGES:
        raise form.FieldError("num_images", f"{named['num_images']} images; expected at most {MOST_IMAGES}")
    named["loras"] = _loras(given["loras"] or [], given["coefficients"] or "")
    try:
        drawn = json.loads(given["canvas"] or "{}")
        named |= {name: drawn[name] for name in ("image", "mask") if drawn.get(name)}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise form.FieldError("image", "the image is none that this page made; load it again") from None
    try:
        return form.ImagesRequest(**named)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        received = f"{first['input']!r}"[:60]
        raise form.FieldError(field, f"{received}; {first['msg'].lower()}") from None


def _loras(names: list[str], coefficients: str) -> list[dict[str, Any]]:
    words = coefficients.replace(",", " ").split()
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise form.FieldError("coefficients", f"{coefficients[:60]!r}; expected numbers, as 0.8, 1.2") from None
    if numbers and len(numbers) != len(names):
        raise form.FieldError("coefficients", f"{len(numbers)} of them for {len(names)} LoRAs; expected one each, or none")
    return [{"name": name, "coefficient": number} for name, number in zip(names, numbers or [1.0] * len(names), strict=True)]


def _line(text: str, kind: str) -> str:
    return f'<p class="ldm-{kind}">{html.escape(text)}</p>'


def _view(job: Job, kind: str) -> str:
    """A view's pictures, or why there are none."""
    if kind == "denoising" and kind in job.views and job.withheld is not None:
        return _line(job.withheld, "hint")
    return pictures.strip(job, kind) or _hint(VIEWS[kind])


def _hint(about: str) -> str:
    return _line(f"{about}. Tick it under Views.", "hint")
