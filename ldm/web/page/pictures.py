"""The pictures of the page's jobs: by address, so that they do not pass through gradio, which keeps what it sends.

`gallery.js` and `preview.js` fetch them as soon as they are told of them; the strips are plain images.
"""

import html
import json
from typing import Literal

from fastapi import APIRouter, HTTPException, Response

from ldm.output import files
from ldm.web.jobs import DONE, Job, Jobs
from ldm.web.views import png

Kind = Literal["images", "attention", "denoising", "preview"]


def router(jobs: Jobs) -> APIRouter:
    """The route under /page."""
    routes = APIRouter(prefix="/page", include_in_schema=False)

    @routes.get("/{job_id}/{kind}/{index}", response_class=Response)
    def look(job_id: str, kind: Kind, index: int) -> Response:
        job = jobs.get(job_id)
        data = None if job is None else _png(job, kind, index)
        if data is None:
            raise HTTPException(404, "no such picture; those of finished jobs are forgotten after a while")
        return Response(data, media_type="image/png", headers={"Cache-Control": "no-store"})

    return routes


def address(job: Job, kind: Kind, index: int) -> str:
    """Where a picture is, from the page. Of a preview the index is of no importance, but a new one is looked at anew."""
    return f"page/{job.id}/{kind}/{index}"


def gallery(job: Job) -> str:
    """What `gallery.js` adds: JSON of what was made. Seeds are text, since numbers there are exact only up to 2^53."""
    made = [
        {
            "png": address(job, "images", index),
            "seed": str(receipt["seed"]),
            "receipt": json.dumps(receipt, indent=2),
            "flagged": bool(verdict and verdict.flagged),
        }
        for index, (receipt, verdict) in enumerate(zip(job.result.receipts, job.result.safety, strict=True))
    ]
    return json.dumps(made)


def strip(job: Job, kind: Literal["attention", "denoising"]) -> str:
    """A view's pictures, each with its word or its timestep; nothing where there are none."""
    names = [name for name, _ in getattr(job, kind)]
    figures = (
        f'<figure><img alt="" src="{address(job, kind, index)}"><figcaption>{html.escape(name)}</figcaption></figure>'
        for index, name in enumerate(names)
    )
    return f'<div class="ldm-strip">{"".join(figures)}</div>' if names else ""


def _png(job: Job, kind: Kind, index: int) -> bytes | None:
    if kind == "preview":
        return job.preview
    result = job.result
    if job.state != DONE or result is None:
        return None
    if kind == "images":
        pairs = list(zip(result.images, result.receipts, strict=True))
        return files.png(*pairs[index]) if 0 <= index < len(pairs) else None
    views = getattr(job, kind)
    return png(views[index][1]) if 0 <= index < len(views) else None
