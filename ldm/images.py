"""Pictures <-> tensors (b, 3, h, w) in [-1, 1], and masks (1, 1, h, w) of 0 and 1. The only place that rounds.

Reading is strict: PNG, JPEG or WebP, one frame. What can be converted without doubt is: pictures are turned upright as their
EXIF says, transparency is laid on white, CMYK and palettes become RGB, 16 bits become 8. What cannot is refused, by name.
Of the JPEGs in which telephones keep more than the photograph, it is the photograph.
"""

import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # that files of these have
MOST_PIXELS = 1 << 26  # 8192 x 8192: more is a mistake, or an attack by a small file that unpacks to much


def read(path: str | Path | BinaryIO, *, name: str | None = None, most_pixels: int | None = None) -> Image.Image:
    """The picture in a file, upright, in 8-bit RGB. Raises ValueError, one line, where it is not one.

    name: what the line calls it; its path where left out. most_pixels: where fewer than MOST_PIXELS are allowed.
    """
    name = str(path) if name is None else name
    try:
        with Image.open(path, formats=FORMATS) as opened:
            _check(opened, name, most_pixels)
            opened.load()
            return rgb(opened, name)
    except ValueError as error:
        raise error if str(error).startswith(name) else _unreadable(name, error) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and more
        raise _unreadable(name, error) from None


def rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """A picture as 8-bit RGB, upright, transparency laid on white. Raises ValueError where that would be a guess."""
    _check(image, name)
    image = _upright(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image, name)
    if image.mode == "F":
        raise ValueError(f"{name}: has floating-point values; expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def floor_to(side: int, multiple: int) -> int:
    """The largest multiple that fits in `side`, at least one."""
    return max(side // multiple, 1) * multiple


def to_tensor(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture -> (1, 3, h, w) in [-1, 1], float32, resized (Lanczos) to size (width, height) where it has another."""
    image = rgb(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return 2 * pixels.permute(2, 0, 1)[None] - 1


def mask_to_tensor(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask -> (1, 1, h, w), float32: 1 where it is nearer to white, resized as a picture is; 0 elsewhere."""
    mask = rgb(mask, "the mask")
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.LANCZOS)
    grey = torch.from_numpy(np.array(mask.convert("L"), dtype=np.float32)) / 255
    return (grey >= 0.5).float()[None, None]


def to_images(pixels: Tensor, *, truncate: bool = False) -> list[Image.Image]:
    """(b, 3, h, w) in [-1, 1] -> pictures. What lies outside is clamped; 255ths are rounded, half to even, or cut off.

    Raises ValueError where a value is NaN.
    """
    if pixels.isnan().any():
        raise ValueError("the pixels hold NaN; expected values about -1 to 1")
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    levels = levels.floor() if truncate else levels.round()
    arrays = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def difference(one: Image.Image, other: Image.Image) -> tuple[int, float]:
    """Of two pictures in RGB: the largest difference of a value, 0 to 255, and the share of values that differ.

    Pictures of different sizes differ in everything.
    """
    if one.size != other.size:
        return 255, 1.0
    apart = np.abs(np.array(one, dtype=np.int16) - np.array(other, dtype=np.int16))
    return int(apart.max()), float((apart > 0).mean())


def _check(image: Image.Image, name: str, most_pixels: int | None = None) -> None:
    most = MOST_PIXELS if most_pixels is None else most_pixels
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ValueError(f"{name}: has {frames} frames; expected a single picture; save one frame on its own")
    if image.width * image.height > most:
        raise ValueError(f"{name}: has {image.width} x {image.height} pixels; expected at most {most:,} in all")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing; its readers raise SyntaxError, struct.error and more
        return image


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The picture in L, or in LA where one of its values stands for transparency."""
    values = np.array(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name}: has 32-bit values; expected 8 or 16 bits a channel")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _unreadable(path: str, error: Exception) -> ValueError:
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return ValueError(f"{path}: cannot be read ({error.strerror})")
    reason = re.sub(r" <\S+ object at \w+>", "", " ".join(str(error).split()))  # of what is read from memory
    return ValueError(f"{path}: cannot be read as PNG, JPEG or WebP ({reason[:120]})")
