"""What a run may start from: a picture or latents, the size they give it, and what a receipt says of them."""

from PIL import Image
from torch import Tensor

from ldm import images
from ldm.checkpoint import Components
from ldm.models.autoencoder import Posterior
from ldm.output.receipt import picture_hash, tensor_hash
from ldm.pipelines import autoencoding
from ldm.pipelines.run import Batch, Run


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
        raise ValueError(
            f"image is a {type(image).__name__}; expected a PIL image (ldm.images.read opens a file), or latents as a tensor"
        )
    return (own[0] if width is None else width, own[1] if height is None else height)


def check_latents(run: Run, image: Image.Image | Tensor) -> None:
    """Latents given in the place of a picture are one for all images, or one for each."""
    if not isinstance(image, Tensor):
        return
    if len(image) not in (1, len(run.prompts)):
        raise ValueError(f"latents of {len(image)} images for a run of {len(run.prompts)}; expected 1 or as many")
    if not image.isfinite().all():
        raise ValueError("the latents given hold infinite values or NaN")


def known_latents(run: Run, batch: Batch, source: Posterior | Tensor, posterior: str) -> Tensor:
    """The latents to start from, for each image of the batch (b, 4, h, w): drawn from what the autoencoder made of a picture,
    or given as they are, for all images or for each."""
    if isinstance(source, Tensor):
        own = run.place(source if len(source) == 1 else source[batch.at])
    else:
        sampled = posterior == "sample"
        drawn = source.sample(batch.draws.posterior(run.latent_shape).to(source.mean)) if sampled else source.mode()
        own = run.place(drawn) * run.components.autoencoder.config.scaling_factor
    return own.expand(batch.draws.count, -1, -1, -1)


def source_hash(image: Image.Image | Tensor, i: int = 0) -> str:
    """What a receipt says of the picture, or of the latents, that image i started from."""
    if isinstance(image, Tensor):
        return tensor_hash(image[min(i, len(image) - 1)])
    return picture_hash(images.rgb(image))


def encoded(run: Run, pixels: Tensor) -> Posterior:
    """What the autoencoder makes of pixels (1, 3, H, W)."""
    return autoencoding.encode(run.components.autoencoder, run.place(pixels), run.settings.tile)
