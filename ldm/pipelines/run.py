"""A run made ready: prompts encoded, grid laid, and for each batch of images its guided model and its random numbers.

`prepare` checks every field before anything is computed. The three pipelines walk over `Run.batches()`, and `result.finish`
turns what they reached into pictures with receipts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import Components
from ldm.diffusion.conventions import from_image, make_grid
from ldm.diffusion.grid import Grid
from ldm.diffusion.guidance import Widen, guided, levels_of
from ldm.diffusion.sampling import AfterStep, Info, Model
from ldm.output import watermark
from ldm.pipelines.conditioning import read
from ldm.pipelines.draws import Draws, Shape
from ldm.pipelines.habits import HABITS, Habits
from ldm.pipelines.settings import SEEDS_BELOW, Settings, check_prompts, check_side, checked
from ldm.samplers import all_samplers

WrapModel = Callable[[Model], Model]


@dataclass(frozen=True)
class Batch:
    """The images that go through the network together: `at` are their places in the run, with a context and a seed each."""

    at: slice
    uncond: Tensor  # (b, n, d)
    cond: Tensor  # (b, n, d)
    draws: Draws


@dataclass(frozen=True)
class Run:
    """Everything about a run but the pictures it may start from. `prompts` has one for each image."""

    components: Components  # with their adapters
    settings: Settings
    size: tuple[int, int]  # width and height in pixels
    sampler: ModuleType
    grid: Grid
    prompts: list[str]
    cut_off: list[str]  # what of each prompt did not fit
    negative_cut_off: str
    uncond: Tensor  # (1, n, d)
    conds: Tensor  # (number of prompts, n, d)

    @property
    def habits(self) -> Habits:
        return HABITS[self.settings.convention]

    @property
    def latent_shape(self) -> Shape:
        """(c, h, w) of one image."""
        config = self.components.autoencoder.config
        return (config.latent_channels, self.size[1] // config.downsampling, self.size[0] // config.downsampling)

    def batches(self) -> Iterator[Batch]:
        """The run in parts. With one generator for all images there is one part only."""
        count, habits = len(self.prompts), self.habits
        width = count if habits.one_generator else self.settings.batch_size
        for start in range(0, count, width):
            at = slice(start, min(start + width, count))
            rows = torch.arange(at.start, at.stop) // self.settings.num_images
            seeds = [self.settings.seed + i for i in range(at.start, at.stop)]
            draws = Draws(seeds, one_generator=habits.one_generator, one_posterior=habits.one_posterior)
            yield Batch(at, self.uncond.expand(len(rows), -1, -1), self.conds[rows.to(self.conds.device)], draws)

    def from_image(self, strength: float) -> Grid | None:
        """The part of the grid that is walked from an image; see `ldm.diffusion.conventions.from_image`."""
        settings = self.settings
        return from_image(self.grid, strength, settings.sampler, convention=settings.convention, steps=settings.steps)

    def start(self, batch: Batch, noise: Tensor | None) -> Tensor:
        """The noise a batch begins with, N(0, 1): drawn, or its part of what the caller gave."""
        return self.place(batch.draws.noise(self.latent_shape) if noise is None else noise[batch.at])

    def place(self, x: Tensor) -> Tensor:
        """Noise, pixels or latents on the UNet's device, in the type they have between its calls: float32, or float64 with
        such a UNet."""
        weight = self.components.unet.conv_in.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if x.device.type != "cpu" or not weight.is_cuda:
            return x.to(weight.device, dtype)
        pinned = torch.empty_like(x, dtype=dtype, pin_memory=True).copy_(x)  # which a GPU fetches while the host goes on
        return pinned.to(weight.device, non_blocking=True)

    def sample(
        self,
        batch: Batch,
        x: Tensor,
        grid: Grid,
        after_step: AfterStep,
        *,
        widen: Widen | None = None,
        wrap: WrapModel = lambda model: model,
    ) -> Tensor:
        """Walk the grid from x (b, c, h, w) with the guided model. widen: see `guided`. wrap: what to put around the model."""
        settings = self.settings

        def draw() -> Tensor:
            return batch.draws.noise(self.latent_shape)

        predicts_v = self.components.schedule.prediction == "v_prediction"
        scale = settings.guidance_scale if self.habits.guide_below_1 else max(settings.guidance_scale, 1.0)
        model = guided(
            self.components.unet,
            batch.uncond,
            batch.cond,
            scale,
            interval=settings.guidance_interval,
            widen=widen,
            v_levels=levels_of(grid) if predicts_v else None,
        )
        if self.habits.step_draws and not self.sampler.STOCHASTIC and settings.eta == 0:
            model = _spending(model, draw)
        options = {"eta": settings.eta} if settings.eta > 0 else {}
        hook = _answering(after_step)
        return self.sampler.sample(wrap(model), x, grid, noise=lambda: self.place(draw()), after_step=hook, **options)


def prepare(
    components: Components, prompt: str | list[str], size: tuple[int | None, int | None], fields: dict[str, Any]
) -> Run:
    """Check every field, encode the prompts and lay the grid. Raises ValueError, one line, before anything is drawn."""
    settings, prompts = checked({"guidance_scale": components.guidance_scale, **fields}), check_prompts(prompt)
    conditioning = read(components, prompts, settings)
    usual = components.unet.config.sample_size * components.autoencoder.config.downsampling
    multiple = components.autoencoder.config.downsampling
    width, height = (usual if side is None else side for side in size)
    size = (check_side("width", width, multiple), check_side("height", height, multiple))
    if settings.watermark:
        watermark.check_size(*size)
    count = len(prompts) * settings.num_images
    if settings.seed + count > SEEDS_BELOW:
        raise ValueError(f"seed {settings.seed} for {count} images; expected at most {SEEDS_BELOW - count}")
    grid = make_grid(
        components.schedule,
        settings.steps,
        settings.sampler,
        convention=settings.convention,
        spacing=settings.spacing,
    )
    contexts = conditioning.contexts()
    return Run(
        components=conditioning.components,
        settings=settings,
        size=size,
        sampler=all_samplers()[settings.sampler],
        grid=grid,
        prompts=[text for text in prompts for _ in range(settings.num_images)],
        cut_off=[text for text in contexts.cut_off[1:] for _ in range(settings.num_images)],
        negative_cut_off=contexts.cut_off[0],
        uncond=contexts.states[:1],
        conds=contexts.states[1:],
    )


def sees_mask(components: Components) -> bool:
    """Whether the UNet was trained for inpainting. Raises ValueError where it takes neither kind of input, or is no model."""
    if not isinstance(components, Components):
        raise ValueError(f"components is a {type(components).__name__}; expected what ldm.load returns")
    latents, inputs = components.autoencoder.config.latent_channels, components.unet.config.in_channels
    if inputs not in (latents, 2 * latents + 1):
        raise ValueError(f"the UNet takes {inputs} channels; expected {latents}, or {2 * latents + 1} of an inpainting model")
    return inputs != latents


def check_plain(components: Components) -> None:
    """Raises ValueError for a model that wants a mask."""
    if sees_mask(components):
        inputs = components.unet.config.in_channels
        raise ValueError(f"the UNet takes {inputs} channels, so the model is for inpainting; use inpaint")


def check_noise(run: Run, noise: Tensor | None) -> None:
    """Noise that the caller gives is one tensor for all images. Raises ValueError where it is not."""
    expected = (len(run.prompts), *run.latent_shape)
    if noise is None:
        return
    if not isinstance(noise, Tensor) or tuple(noise.shape) != expected:
        found = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"noise of shape {found}; expected a tensor of {list(expected)}")
    if not noise.isfinite().all():
        raise ValueError("noise holds infinite values or NaN; expected N(0, 1)")


def _answering(after_step: AfterStep) -> AfterStep:
    """The hook, held to its contract: it must answer with the x to go on with."""

    def hook(x: Tensor, info: Info) -> Tensor:
        answer = after_step(x, info)
        if not isinstance(answer, Tensor) or answer.shape != x.shape:
            found = f"a tensor of {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"after_step returned {found}; expected the x to go on with, {list(x.shape)}")
        return answer

    return hook


def _spending(model: Model, draw: Callable[[], Tensor]) -> Model:
    """The model, with a draw spent at each call, as CompVis's samplers do."""

    def asked(x: Tensor, t: float) -> Tensor:
        eps = model(x, t)
        draw()
        return eps

    return asked
