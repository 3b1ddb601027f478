"""Image to image: a picture's latents, noised part of the way, denoised under a prompt.

Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", arXiv:2108.01073.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import images
from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.models.autoencoder import Posterior
from ldm.output.receipt import picture_hash, tensor_hash
from ldm.pipelines import latents as autoencoding
from ldm.pipelines.run import Batch, Result, Run, check_noise, check_plain, finish, noised, prepare
from ldm.pipelines.settings import check_posterior, check_strength


@torch.no_grad()
def img2img(
    components: Components,
    prompt: str | list[str],
    image: Image.Image | Tensor,
    *,
    strength: float = 0.8,
    posterior: str = "sample",
    width: int | None = None,
    height: int | None = None,
    noise: Tensor | None = None,
    after_step: AfterStep = keep,
    **settings: Any,
) -> Result:
    """Make pictures of a prompt that keep something of `image`: a picture, or latents (1 or n, 4, h, w) as the UNet has them.

    strength: 0 (the image itself, through the autoencoder and back) to 1 (the image is ignored, as our own convention has
        it; the others leave a trace). int(steps x strength) steps are run.
    posterior: "sample" or "mode" of what the autoencoder makes of the image.
    width, height: multiples of 8, to which the image is resized; its own size, rounded down, where left out.
    noise: N(0, 1) to noise the image with. after_step, settings: as in `txt2img`.
    """
    strength = check_strength(strength)
    check_posterior(posterior)
    check_plain(components)
    run = prepare(components, prompt, image_size(components, image, width, height), settings)
    check_noise(run, noise)
    if isinstance(image, Tensor) and (len(image) not in (1, len(run.prompts)) or not image.isfinite().all()):
        raise ValueError(f"latents of {len(image)} images for {len(run.prompts)}; expected 1 or {len(run.prompts)}, all finite")
    ignored = strength == 1 and run.habits.ignore_image
    grid = run.grid if ignored else run.from_image(strength)
    source = image
    if not ignored and not isinstance(image, Tensor):
        source = autoencoding.encode(components.autoencoder, run.place(images.to_tensor(image, run.size)), run.settings.tile)
    parts = []
    for batch in run.batches():
        if ignored:
            x = run.grid.noise_scale * run.start(batch, noise)
        else:
            x = known_latents(run, batch, source, posterior)
            if grid is not None:
                x = noised(x, run.start(batch, noise), grid.start_sigma)
        parts.append(x if grid is None else run.sample(batch, x, grid, after_step))
    begun = "noise alone" if ignored else "the image" if grid is None else "the image, noised"
    result = finish(run, parts, "img2img", grid, noise, strength=strength, posterior=posterior, begun_with=begun)
    for i, receipt in enumerate(result.receipts):
        receipt["image_sha256"] = source_hash(image, i)
    return result


def image_size(
    components: Components, image: Image.Image | Tensor, width: int | None, height: int | None
) -> tuple[int | None, int | None]:
    """The size asked for, or the image's own, rounded down to what the autoencoder takes."""
    factor = components.autoencoder.config.downsampling
    if isinstance(image, Tensor):
        channels = components.autoencoder.config.latent_channels
        if image.ndim != 4 or image.shape[1] != channels:
            raise ValueError(f"image is a tensor of shape {list(image.shape)}; expected latents (n, {channels}, h, w)")
        own = (image.shape[3] * factor, image.shape[2] * factor)
        if width not in (None, own[0]) or height not in (None, own[1]):
            raise ValueError(f"size {width} x {height} for latents of {own[0]} x {own[1]}; leave out width and height")
    elif isinstance(image, Image.Image):
        upright = images.rgb(image)
        own = tuple(images.floor_to(side, factor) for side in upright.size)
    else:
        raise ValueError(f"image is a {type(image).__name__}; expected a PIL image, or latents as a tensor")
    return (own[0] if width is None else width, own[1] if height is None else height)


def known_latents(run: Run, batch: Batch, source: Posterior | Tensor, posterior: str) -> Tensor:
    """The latents to start from, for each image of the batch (b, 4, h, w): drawn from what the autoencoder made of a picture,
    or given as they are, for all images or for each."""
    if isinstance(source, Tensor):
        own = run.place(source if len(source) == 1 else source[batch.at])
    else:
        noise = run.place(batch.draws.posterior(run.latent_shape)) if posterior == "sample" else None
        drawn = source.mode() if noise is None else source.sample(noise)
        own = run.place(drawn) * run.components.autoencoder.config.scaling_factor
    return own.expand(batch.draws.count, -1, -1, -1)


def source_hash(image: Image.Image | Tensor, i: int = 0) -> str:
    """What a receipt says of the picture, or of the latents, that image i started from."""
    if isinstance(image, Tensor):
        return tensor_hash(image[min(i, len(image) - 1)])
    return picture_hash(images.rgb(image))
