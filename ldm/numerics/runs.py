"""Whole runs, traced: our text to image, and a pipeline of diffusers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.numerics.traces import TraceWriter
from ldm.numerics.tracing import Tracer
from ldm.pipelines.result import Result
from ldm.pipelines.text_to_image import txt2img


def trace_txt2img(
    components: Components,
    prompt: str,
    path: str | Path,
    *,
    only: Sequence[str] = (),
    after_step: AfterStep = keep,
    **fields: Any,
) -> Result:
    """`ldm.txt2img`, and a trace of it at `path`, which tells of the run by its receipt. only: see `Tracer`.

    Raises TraceError where the trace cannot be written, and ValueError as txt2img does; no trace is left then.
    """
    modules = {"text_encoder": components.text_encoder, "unet": components.unet, "autoencoder": components.autoencoder}
    with TraceWriter(path) as writer, Tracer(writer, modules, only=only) as tracer:
        hook = lambda x, info: after_step(tracer.after_step(x, info), info)  # noqa: E731
        result = txt2img(components, prompt, after_step=hook, **fields)
        for picture in result.images:
            tracer.add("picture", torch.from_numpy(np.array(picture)))  # (h, w, 3), uint8
        writer.about |= {"program": "ldm", "run": result.receipts[0]}
    return result


def trace_diffusers(pipeline: Any, prompt: str, path: str | Path, *, only: Sequence[str] = (), **call: Any) -> Any:
    """The same of a StableDiffusionPipeline of diffusers', called with `call`; what it returned."""
    import diffusers

    modules = {"text_encoder": pipeline.text_encoder, "unet": pipeline.unet, "autoencoder": pipeline.vae}
    about = {"program": f"diffusers {diffusers.__version__}"}
    with TraceWriter(path, about) as writer, Tracer(writer, modules, only=only) as tracer, torch.no_grad():
        made = pipeline(prompt, callback_on_step_end=tracer.on_step_end, **call)
        for picture in made.images:
            tracer.add("picture", torch.from_numpy(np.array(picture)))
    return made
