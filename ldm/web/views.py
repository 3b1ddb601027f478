"""Pictures of what a run does: previews, the estimate at each step, and words over the pixels that they drew."""

import io
from typing import Any

import torch.nn.functional as F
from PIL import Image

from ldm.checkpoint import Components
from ldm.pipelines.autoencoding import pictures

MOST_STEPS_SHOWN = 24  # of a job's denoising
PREVIEW_SIDE = 24  # latents; larger ones are averaged, since decoding them would take longer than the step


def small_picture(components: Components, x0: Any) -> Image.Image:
    """Latents (1, c, h, w) as a picture of at most PREVIEW_SIDE latents a side."""
    side = max(x0.shape[-2:])
    if side > PREVIEW_SIDE:
        size = [max(1, round(length * PREVIEW_SIDE / side)) for length in x0.shape[-2:]]
        x0 = F.interpolate(x0, size=size, mode="area")
    return pictures(components, x0)[0]


def overlays(words: list[tuple[str, Any]], picture: Image.Image) -> list[tuple[str, Image.Image]]:
    """Each word's map over the picture in grey: red where it was looked at most, as is where it was not."""
    grey = picture.convert("L")
    found = []
    for word, looked in words:
        levels = (255 * (looked - looked.min()) / (looked.max() - looked.min()).clamp(min=1e-8)).byte().numpy()
        mask = Image.fromarray(levels, "L").resize(picture.size, Image.Resampling.BICUBIC)
        red = Image.merge(
            "RGB", (grey.point(lambda value: 128 + value // 2), grey.point(lambda value: value // 4), Image.new("L", grey.size))
        )
        found.append((word, Image.composite(red, grey.convert("RGB"), mask)))
    return found


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
