"""Image to image: a picture's latents, noised part of the way, denoised under a prompt.

Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", arXiv:2108.01073.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import images
from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep, noised
from ldm.pipelines.result import Result, finish
from ldm.pipelines.run import check_noise, check_plain, prepare
from ldm.pipelines.settings import check_posterior, check_strength
from ldm.pipelines.sources import check_latents, encoded, image_size, known_latents, source_hash


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
    check_latents(run, image)
    ignored = strength == 1 and run.habits.ignore_image
    grid = run.grid if ignored else run.from_image(strength)  # None: no step at all, the image itself
    source = image
    if not ignored and not isinstance(image, Tensor):
        source = encoded(run, images.to_tensor(image, run.size))
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
