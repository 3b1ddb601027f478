"""Where whole pipelines differ between implementations, by the names of `ldm.diffusion.conventions`, as data."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What an implementation does beside sampling. Ours by default.

    one_generator: one generator draws for all images at once, instead of one for each image with a seed of its own.
    one_posterior: the autoencoder's draw for the image to start from is made once for all images.
    truncate: 255ths are cut off, not rounded.
    ignore_image: image-to-image at strength 1 begins with noise alone; otherwise with the image, noised as far as training did.
    guide_below_1: guidance scales under 1 are used as they are; otherwise they count as 1.

    Inpainting with a model that does not see the mask puts the known part back, noised to the level of the moment:
    blend_start: also into the very first x. blend_provisional: also into what a sampler only tries (PNDM, Heun).
    blend_end: at the end as well, without noise. blend_fresh: with new noise each time, not always the same.
    hidden_draw: a draw is spent on encoding the image without its hidden part, though the model does not see it.
    step_draws: noise is drawn at every step, though a deterministic sampler does not use it.

    Not followed: draws are in float32 always, where diffusers draws in the model's type (alike but for rounding, except in
    float64); and strength 0 is the image without noise always, where CompVis adds that of its first level.
    """

    one_generator: bool = False
    one_posterior: bool = False
    truncate: bool = False
    ignore_image: bool = True
    guide_below_1: bool = True
    blend_start: bool = True
    blend_provisional: bool = True
    blend_end: bool = True
    blend_fresh: bool = False
    hidden_draw: bool = False
    step_draws: bool = False


HABITS = {
    "ldm": Habits(),
    "kdiffusion": Habits(),  # samplers only: it has no pipelines
    "diffusers": Habits(
        one_generator=True,
        one_posterior=True,
        ignore_image=False,
        guide_below_1=False,
        blend_start=False,
        hidden_draw=True,
    ),
    "compvis": Habits(
        one_generator=True,
        truncate=True,
        ignore_image=False,
        blend_provisional=False,
        blend_end=False,
        blend_fresh=True,
        step_draws=True,
    ),
}
