"""Inpainting: part of a picture made anew, the rest kept.

A model with 4 input channels knows nothing of masks: after each step the known part is put back, noised to the level of the
moment (Lugmayr et al. 2022, "RePaint", arXiv:2201.09865, eq. 8, without its resampling). A model with 9 was trained to see
the mask and the latents of the picture without its hidden part beside x (arXiv:2112.10752, section 4.5).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import images
from ldm.checkpoint import Components
from ldm.diffusion.grid import Grid
from ldm.diffusion.guidance import Widen, levels_of
from ldm.diffusion.sampling import AfterStep, Info, Model, keep, noised
from ldm.pipelines.result import Result, finish
from ldm.pipelines.run import Batch, Run, check_noise, prepare, sees_mask
from ldm.pipelines.settings import check_posterior, check_strength
from ldm.pipelines.sources import encoded, image_size, known_latents, source_hash


@torch.no_grad()
def inpaint(
    components: Components,
    prompt: str | list[str],
    image: Image.Image,
    mask: Image.Image,
    *,
    strength: float = 1.0,
    posterior: str = "sample",
    paste: bool = False,
    width: int | None = None,
    height: int | None = None,
    noise: Tensor | None = None,
    after_step: AfterStep = keep,
    **settings: Any,
) -> Result:
    """Make pictures of a prompt that keep `image` where `mask` is black, and are new where it is white.

    (CompVis's masks are the other way round: there 1 keeps.) strength: 1 begins the new part with noise alone, less with
    the image noised part of the way; 0 is refused, since nothing would be new. paste: lay the image's own pixels over the
    result where it is kept; otherwise they have been through the autoencoder. The rest is as in `img2img`.
    """
    # hidden is where the mask is white, and visible what is left of the image without it; known are the image's own latents.
    strength = check_strength(strength)
    check_posterior(posterior)
    if paste and settings.get("decode") is False:
        raise ValueError("paste lays pixels over pictures, and decode=False makes none; leave out one of them")
    if not isinstance(image, Image.Image) or not isinstance(mask, Image.Image):
        raise ValueError(f"image and mask are {type(image).__name__} and {type(mask).__name__}; expected PIL images")
    wants_mask = sees_mask(components)
    run = prepare(components, prompt, image_size(components, image, width, height), settings)
    check_noise(run, noise)
    grid = run.grid if strength == 1 else run.from_image(strength)
    if grid is None:
        raise ValueError(f"strength {strength} of {run.settings.steps} steps leaves none to run; raise strength or steps")
    pixels = images.to_tensor(image, run.size)
    hidden_pixels = images.mask_to_tensor(mask, run.size)
    hidden = run.place(F.interpolate(hidden_pixels, run.latent_shape[1:], mode="nearest"))  # (1, 1, h, w)
    known_posterior = visible_posterior = None
    if not wants_mask or strength < 1:
        known_posterior = encoded(run, pixels)
    if wants_mask:
        visible_posterior = encoded(run, pixels * (1 - hidden_pixels))
    parts = []
    for batch in run.batches():
        known = None if known_posterior is None else known_latents(run, batch, known_posterior, posterior)
        start = run.start(batch, noise)
        x = run.grid.noise_scale * start if strength == 1 else noised(known, start, grid.start_sigma)
        if wants_mask:
            visible = known_latents(run, batch, visible_posterior, posterior)
            parts.append(run.sample(batch, x, grid, after_step, widen=_beside(hidden, visible)))
        else:
            if run.habits.hidden_draw and posterior == "sample":
                batch.draws.posterior(run.latent_shape)
            blend = Blend(run, batch, grid, hidden, known, start)
            parts.append(run.sample(batch, blend.at_start(x), grid, blend.then(after_step), wrap=blend.before))
    fields = {
        "strength": strength,
        "posterior": posterior,
        "paste": paste,
        "begun_with": "noise alone" if strength == 1 else "the image, noised",
        "image_sha256": source_hash(image),
        "mask_sha256": source_hash(mask),
    }
    finished = _pasting(pixels, hidden_pixels) if paste else None
    return finish(run, parts, "inpaint", grid, noise, finished, **fields)


def _beside(hidden: Tensor, visible: Tensor) -> Widen:
    """x (b, 4, h, w) -> x, mask and visible latents (b, 9, h, w): what a model trained for inpainting is shown."""

    def widen(x: Tensor) -> Tensor:
        return torch.cat([x, hidden.expand(len(x), -1, -1, -1), visible], dim=1)

    return widen


class Blend:
    """Puts the known part back into x, noised to the level that x has."""

    def __init__(self, run: Run, batch: Batch, grid: Grid, hidden: Tensor, known: Tensor, noise: Tensor):
        self.run, self.batch, self.grid = run, batch, grid
        self.hidden, self.known, self.noise = hidden, known, noise
        self.levels = levels_of(grid)

    def put_back(self, x: Tensor, sigma: float) -> Tensor:
        fresh = self.run.habits.blend_fresh
        noise = self.run.place(self.batch.draws.noise(self.run.latent_shape)) if fresh else self.noise
        return self.hidden * x + (1 - self.hidden) * noised(self.known, noise, sigma)

    def at_start(self, x: Tensor) -> Tensor:
        return self.put_back(x, self.grid.steps[0].sigma) if self.run.habits.blend_start else x

    def before(self, model: Model) -> Model:
        """Around the model: also what a sampler only tries on its way, between two steps, holds the known part.

        What the first call sees is x itself, which `at_start` has blended, or not, as the convention has it.
        """
        if not self.run.habits.blend_provisional:
            return model
        calls = []

        def ask(x: Tensor, t: float) -> Tensor:
            calls.append(t)
            return model(x if len(calls) == 1 else self.put_back(x, self.levels[t]), t)

        return ask

    def then(self, after_step: AfterStep) -> AfterStep:
        """After each step, then the caller's own hook."""

        def hook(x: Tensor, info: Info) -> Tensor:
            if info.index < info.count - 1:
                x = self.put_back(x, self.grid.steps[info.index + 1].sigma)
            elif self.run.habits.blend_end:
                x = self.hidden * x + (1 - self.hidden) * self.known
            return after_step(x, info)

        return hook


def _pasting(pixels: Tensor, hidden: Tensor) -> Callable[[Image.Image], Image.Image]:
    """Of a picture that was made: the same, with the image's own pixels where they are kept."""
    (original,) = images.to_images(pixels)
    (cover,) = images.to_images((2 * hidden - 1).expand(-1, 3, -1, -1))
    return lambda made: Image.composite(made, original, cover.convert("L"))
