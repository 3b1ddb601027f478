"""CompVis's invisible watermark: the bytes `StableDiffusionV1` in the larger waves of a picture's colour, by choice.

Through the package invisible-watermark (extra `watermark`), method dwtDct, as CompVis's scripts call it: anybody with that
package can read it. It survives PNG, and no crop or resize. The package's method loses bits of some pictures as it writes
them, smooth ones above all; so its absence proves nothing.
"""

from types import ModuleType

import numpy as np
from PIL import Image

MESSAGE = b"StableDiffusionV1"
METHOD = "dwtDct"
SMALLEST = 256 * 256  # pixels; the package takes none with less


def check_size(width: int, height: int) -> None:
    """Raises ValueError for a picture that is too small, ImportError where the package is not there."""
    if width * height < SMALLEST:
        raise ValueError(f"watermark on a picture of {width} x {height}; it needs 256 x 256 pixels; leave the watermark off")
    _package()


def embed(picture: Image.Image) -> Image.Image:
    """The picture with the watermark in it. Raises as `check_size` does."""
    check_size(*picture.size)
    encoder = _package().WatermarkEncoder()
    encoder.set_watermark("bytes", MESSAGE)
    return Image.fromarray(_turned(encoder.encode(_turned(np.asarray(picture.convert("RGB"))), METHOD)))


def is_marked(picture: Image.Image) -> bool:
    """Whether the watermark can be read from the picture. Raises ImportError where the package is not there."""
    package = _package()
    if picture.width * picture.height < SMALLEST:
        return False
    decoder = package.WatermarkDecoder("bytes", 8 * len(MESSAGE))
    return decoder.decode(_turned(np.asarray(picture.convert("RGB"))), METHOD) == MESSAGE


def _turned(pixels: np.ndarray) -> np.ndarray:
    """Red for blue: the package has channels in OpenCV's order."""
    return np.ascontiguousarray(pixels[..., ::-1])


def _package() -> ModuleType:
    try:
        import imwatermark
    except ImportError as error:
        raise ImportError(f"the watermark needs {error.name}; install it with: pip install 'ldm[watermark]'") from None
    return imwatermark
