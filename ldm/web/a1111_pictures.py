"""Pictures as AUTOMATIC1111's web interface takes them: masks by their transparency, sizes by resize_mode, texts of files."""

import io
from contextlib import suppress

from PIL import Image, ImageOps

from ldm import images
from ldm.output import files
from ldm.web import form

JUST_RESIZE, CROP, FILL, LATENT = range(4)  # resize_mode
OPAQUE_ABOVE = 128  # of 255


def mask(text: str, limits: form.Limits) -> Image.Image:
    """A mask: its opaque part where anything in it is transparent, else its white part. Raises FieldError."""
    data = form.decoded(text, "mask")
    seen = form.picture_of(data, "mask", limits.most_image_pixels)
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as opened:
        if not opened.has_transparency_data:
            return seen
        upright = opened
        with suppress(Exception):  # damaged EXIF says nothing; its readers raise SyntaxError, struct.error and more
            upright = ImageOps.exif_transpose(opened)
        alpha = upright.convert("RGBA").getchannel("A")
    return seen if alpha.getextrema() == (255, 255) else alpha.point(lambda value: 255 * (value > OPAQUE_ABOVE))


def resized(picture: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    """The picture in this size, as resize_mode 1 and 2 say; left as it is by 0, which is what the pipelines do anyway.

    1 keeps the proportions and cuts off what is too much, evenly at both ends. 2 keeps them too, has all of the picture in the
    middle, and fills the ends with its outermost rows or columns.
    """
    if mode == JUST_RESIZE or picture.size == size:
        return picture
    wider = picture.width * size[1] > picture.height * size[0]  # than it is to be
    by_height = wider == (mode == CROP)
    if by_height:
        inner = (max(picture.width * size[1] // picture.height, 1), size[1])
    else:
        inner = (size[0], max(picture.height * size[0] // picture.width, 1))
    left, top = (whole // 2 - part // 2 for whole, part in zip(size, inner, strict=True))
    if mode == CROP:
        return _window(picture, inner, (-left, -top), size)
    middle = picture.resize(inner, Image.Resampling.LANCZOS)
    made = Image.new(picture.mode, size)
    made.paste(middle, (left, top))
    for edge, at in _ends(inner, (left, top), size):
        if at[2] > at[0] and at[3] > at[1]:
            made.paste(middle.resize((at[2] - at[0], at[3] - at[1]), box=edge), at)
    return made


def _window(picture: Image.Image, inner: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """What a window of this size shows of the picture resized to `inner`; the rest, which can be large, is not computed."""
    scales = [own / made for own, made in zip(picture.size, inner, strict=True)]
    starts = [scale * start for scale, start in zip(scales, corner, strict=True)]
    ends = [start + scale * side for start, scale, side in zip(starts, scales, size, strict=True)]
    ends = [min(end, own) for end, own in zip(ends, picture.size, strict=True)]
    return picture.resize(size, Image.Resampling.LANCZOS, box=(*starts, *ends))


def _ends(
    inner: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> list[tuple[tuple[int, int, int, int], tuple[int, int, int, int]]]:
    """Of the middle, the edges (boxes without width or height: Pillow reads their values off the pixels beside them), and the
    parts of the whole that each of them fills."""
    (width, height), (left, top) = inner, corner
    right, bottom = left + width, top + height
    return [
        ((0, 0, width, 0), (0, 0, size[0], top)),
        ((0, height, width, height), (0, bottom, size[0], size[1])),
        ((0, 0, 0, height), (0, 0, left, size[1])),
        ((width, 0, width, height), (right, 0, size[0], size[1])),
    ]


def texts(text: str, limits: form.Limits) -> dict[str, str]:
    """What a picture file says of itself, by its keys; its size is looked at before anything is unpacked. Raises FieldError."""
    data = form.decoded(text, "image")
    try:
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as opened:
            width, height = opened.size
    except Exception:  # Pillow's readers raise OSError, SyntaxError, struct.error and more
        raise form.FieldError("image", "image cannot be read as PNG, JPEG or WebP") from None
    if width * height > limits.most_image_pixels:
        most = f"expected at most {limits.most_image_pixels:,} in all"
        raise form.FieldError("image", f"image has {width} x {height} pixels; {most}")
    try:
        return files.texts(io.BytesIO(data))
    except ValueError:
        raise form.FieldError("image", "image cannot be read as PNG, JPEG or WebP") from None
