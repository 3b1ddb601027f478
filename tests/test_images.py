"""Pictures and tensors: what is read, into which pixels, and what is refused; and the only place that rounds."""

import contextlib
import io
import os
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from ldm import images
from tests import seeded
from tests.refusal import as_nobody, one_line

WHITE = 255
ORIENTATION = 0x0112  # the EXIF tag
# EXIF's orientation -> what makes the stored rows upright (JEITA CP-3451, "Orientation").
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
GREY_16 = np.arange(65536).reshape(64, 1024)


def noise(*shape: int) -> np.ndarray:
    """Bytes without any order."""
    return (seeded.values("picture", shape).view(np.uint32) % 251).astype(np.uint8)


RGB = noise(23, 41, 3)
PICTURE = Image.fromarray(RGB)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, colour: int, *extra: bytes, bits: int = 8, size: tuple[int, int] | None = None) -> bytes:
    """A PNG put together by hand: of values (h, w[, c]), or of that size without any. colour: the header's type of colour."""
    width, height = size or values.shape[1::-1]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def read(folder: Path, content: bytes) -> np.ndarray:
    """What `images.read` makes of a file with this content, as (h, w, 3)."""
    (folder / "a").write_bytes(content)
    image = images.read(folder / "a")
    assert image.mode == "RGB"
    return np.array(image)


def on_white(colour: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) laid on white, opacity (h, w) in 255ths, before rounding."""
    share = opacity[..., None] / 255
    return colour * share + WHITE * (1 - share)


def as_grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


# -- Reading


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("PNG", {"compress_level": 0}), ("WEBP", {"lossless": True})])
def test_a_lossless_picture_is_read_pixel_for_pixel(tmp_path, kind, options):
    assert np.array_equal(read(tmp_path, encoded(PICTURE, kind, **options)), RGB)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})])
def test_a_lossy_picture_is_read_as_its_decoder_has_it(tmp_path, kind, options):
    content = encoded(PICTURE, kind, **options)
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(read(tmp_path, content), np.array(opened.convert("RGB")))


def test_the_content_counts_and_not_the_name_of_the_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(PICTURE, "PNG"))
    assert np.array_equal(np.array(images.read(str(tmp_path / "a.jpg"))), RGB)


def test_one_bit_becomes_black_and_white(tmp_path):
    bits = noise(9, 13) > 125
    assert np.array_equal(read(tmp_path, encoded(Image.fromarray(bits), "PNG")), as_grey(np.where(bits, 255, 0)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_grey_becomes_three_equal_colours(tmp_path, kind):
    grey = noise(9, 13)
    assert np.array_equal(read(tmp_path, encoded(Image.fromarray(grey), kind, lossless=True)), as_grey(grey))


def test_a_palette_becomes_its_colours(tmp_path):
    image = PICTURE.quantize(16)
    palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    assert np.array_equal(read(tmp_path, encoded(image, "PNG")), palette[np.array(image)])


def test_sixteen_bit_grey_becomes_the_nearest_of_eight_bits(tmp_path):
    assert np.array_equal(read(tmp_path, png(GREY_16, 0, bits=16)), as_grey(np.rint(GREY_16 / 257)))


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colours_come_within_one_of_what_they_are(tmp_path, colour, channels):
    """Pillow keeps their upper byte alone."""
    values = np.repeat(GREY_16[..., None], channels, axis=2)
    if channels in (2, 4):
        values[..., -1] = 65535
    assert np.abs(read(tmp_path, png(values, colour, bits=16)) - as_grey(GREY_16 / 257)).max() < 1


def test_cmyk_becomes_rgb(tmp_path):
    """Adobe's JPEGs hold ink upside down, which Pillow knows and undoes."""
    cmyk = np.zeros((16, 32, 4), np.uint8)
    cmyk[:, :16] = (0, 255, 255, 0)  # no cyan: red
    cmyk[:, 16:] = (255, 0, 255, 51)  # a darker green
    expected = np.where(np.arange(32)[None, :, None] < 16, (255, 0, 0), (0, 204, 0)) + np.zeros((16, 1, 1))
    found = read(tmp_path, encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100))
    assert np.abs(found - expected).max() <= 2


# -- Transparency


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_laid_on_white(tmp_path, kind):
    opacity = noise(23, 41)
    opacity[:3], opacity[3:6] = 0, 255
    image = Image.fromarray(np.concatenate([RGB, opacity[..., None]], axis=2), "RGBA")
    found = read(tmp_path, encoded(image, kind, lossless=True, exact=True))
    assert np.abs(found - on_white(RGB, opacity)).max() <= 1
    assert (found[:3] == WHITE).all() and np.array_equal(found[3:6], RGB[3:6])


def test_transparent_grey_is_laid_on_white(tmp_path):
    grey, opacity = noise(9, 13), noise(13, 9).T
    found = read(tmp_path, encoded(Image.fromarray(np.dstack([grey, opacity]), "LA"), "PNG"))
    assert np.abs(found - on_white(as_grey(grey), opacity)).max() <= 1


def test_a_palettes_transparency_is_laid_on_white(tmp_path):
    places = np.arange(12).reshape(3, 4) % 3
    colours, opacity = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 99]]), np.array([0, 128, 255])
    content = png(places, 3, chunk(b"PLTE", bytes(colours.ravel().tolist())), chunk(b"tRNS", bytes(opacity.tolist())))
    assert np.abs(read(tmp_path, content) - on_white(colours[places], opacity[places])).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_a_grey_value_that_stands_for_transparency_is_white(tmp_path, bits):
    values = np.arange(24).reshape(4, 6) * (1 if bits == 8 else 257)
    content = png(values, 0, chunk(b"tRNS", struct.pack(">H", values[2, 3])), bits=bits)
    expected = np.arange(24).reshape(4, 6)
    expected[2, 3] = WHITE
    assert np.array_equal(read(tmp_path, content), as_grey(expected))


def test_a_colour_that_stands_for_transparency_is_white(tmp_path):
    values = np.arange(36).reshape(3, 4, 3)
    expected = values.copy()
    expected[1, 2] = WHITE
    assert np.array_equal(read(tmp_path, png(values, 2, chunk(b"tRNS", struct.pack(">HHH", *values[1, 2])))), expected)


# -- Upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright_once(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(PICTURE, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        expected = UPRIGHT[orientation](np.array(opened))
    assert np.array_equal(read(tmp_path, content), expected)
    assert np.array_equal(np.array(images.rgb(images.read(tmp_path / "a"))), expected)


def test_transparency_is_turned_with_its_picture(tmp_path):
    image, exif = PICTURE.convert("RGBA"), Image.Exif()
    image.putalpha(Image.fromarray(np.where(noise(23, 41) > 125, 255, 0).astype(np.uint8)))
    exif[ORIENTATION] = 6
    plain = read(tmp_path, encoded(image, "PNG"))
    assert np.array_equal(read(tmp_path, encoded(image, "PNG", exif=exif)), UPRIGHT[6](plain))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0garbage and more", b"Exif\0\0II", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"],
    ids=["garbage", "two bytes", "points nowhere", "cut short"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_picture_with_damaged_exif_is_read_as_it_stands(tmp_path, kind, exif):
    content = encoded(PICTURE, kind, exif=exif)
    with Image.open(io.BytesIO(content)) as opened:
        assert np.array_equal(read(tmp_path, content), np.array(opened))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert np.array_equal(read(tmp_path, encoded(PICTURE, "PNG", exif=exif)), RGB)


# -- Refusing


def frames(kind: str) -> bytes:
    return encoded(PICTURE, kind, save_all=True, append_images=[PICTURE.transpose(Image.Transpose.ROTATE_180)])


def blank(side: int) -> bytes:
    """The header of a large PNG, and no pixels."""
    return png(np.zeros((0, 0)), 2, size=(side, side))


NOT_ONE = "cannot be read as PNG, JPEG or WebP ("
REFUSED = {
    "empty": (b"", NOT_ONE),
    "text": (b"a red cube on top of a blue sphere", NOT_ONE),
    "GIF": (encoded(PICTURE, "GIF"), NOT_ONE),
    "BMP": (encoded(PICTURE, "BMP"), NOT_ONE),
    "float TIFF": (encoded(Image.new("F", (4, 4)), "TIFF"), NOT_ONE),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NOT_ONE),
    "a PNG's mark alone": (b"\x89PNG\r\n\x1a\n", NOT_ONE),
    "half a PNG": (encoded(PICTURE, "PNG")[:2000], NOT_ONE),
    "half a JPEG": (encoded(PICTURE, "JPEG")[:1000], NOT_ONE),
    "half a WebP": (encoded(PICTURE, "WEBP")[:400], NOT_ONE),
    "a PNG with a wrong checksum": (encoded(PICTURE, "PNG").replace(b"IDAT", b"IDAT\0", 1), NOT_ONE),
    "a PNG without pixels": (png(np.zeros((0, 0)), 2, size=(8, 8)), NOT_ONE),
    "a PNG of no width": (png(np.zeros((0, 0)), 2, size=(0, 8)), NOT_ONE),
    "animated PNG": (frames("PNG"), "has 2 frames; expected a single picture; save one frame on its own"),
    "animated WebP": (frames("WEBP"), "has 2 frames; expected a single picture"),
    "just too large": (
        png(np.zeros((0, 0)), 2, size=(8192, 8193)),
        "has 8192 x 8193 pixels; expected at most 67,108,864 in all",
    ),
    "large": (blank(10_000), "has 10000 x 10000 pixels; expected at most 67,108,864 in all"),
    "enormous": (blank(2_000_000_000), NOT_ONE),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("content", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_to_start_from_is_refused_at_once(tmp_path, content, expected):
    path, start = tmp_path / "a.png", time.monotonic()
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        images.read(path)
    assert one_line(caught.value).startswith(f"{path}: {expected}")
    assert time.monotonic() - start < 1


def test_a_file_that_is_not_there_or_not_to_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "a.png"
        path.write_bytes(encoded(PICTURE, "PNG"))
        path.chmod(0)
        for place, expected in (
            (path, "cannot be read (Permission denied)"),
            (folder, "cannot be read (Is a directory)"),
            (f"{folder}/b.png", "cannot be read (No such file or directory)"),
            (f"{path}/b.png", "cannot be read"),
            (folder + "/" + "b" * 300, "cannot be read"),
            (f"{folder}/b\0.png", "cannot be read"),
        ):
            with as_nobody(), pytest.raises(ValueError) as caught:
                images.read(place)
            assert str(caught.value).startswith(f"{place}: {expected}")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("F", (4, 4)), "the image: has floating-point values; expected 8 or 16 bits a channel"),
        (Image.new("I", (4, 4), 65536), "the image: has 32-bit values; expected 8 or 16 bits a channel"),
        (Image.new("I", (4, 4), -1), "the image: has 32-bit values"),
    ],
)
def test_values_whose_range_would_be_a_guess_are_refused(image, expected):
    with pytest.raises(ValueError) as caught:
        images.rgb(image)
    assert one_line(caught.value).startswith(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_with_any_bytes_changed_or_cut_off_is_read_or_refused(tmp_path_factory, kind):
    path = tmp_path_factory.mktemp("scratch") / "a"
    sound = encoded(PICTURE, kind, exif=Image.Exif())
    position = st.integers(0, 120) | st.integers(0, len(sound) - 1)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4), st.just(len(sound)) | position)
    def check(changes, kept):
        content = bytearray(sound)
        for place, byte in changes:
            content[place] = byte
        path.write_bytes(content[:kept])
        try:
            assert images.read(path).mode == "RGB"
        except ValueError as error:
            assert one_line(error).startswith(str(path))

    check()


def test_a_picture_is_not_changed_by_being_converted():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    with Image.open(io.BytesIO(encoded(PICTURE, "PNG", exif=exif))) as opened:
        opened.load()
        before = opened.size, opened.mode, opened.tobytes(), dict(opened.getexif())
        images.to_tensor(opened, (8, 8))
        images.mask_to_tensor(opened, (8, 8))
        assert (opened.size, opened.mode, opened.tobytes(), dict(opened.getexif())) == before


def test_lab_and_the_like_are_converted_or_refused_in_words():
    lab = ImageCms.profileToProfile(PICTURE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    for image in (lab, PICTURE.convert("HSV"), PICTURE.convert("YCbCr"), PICTURE.convert("RGBA").convert("RGBa")):
        with contextlib.suppress(ValueError):
            assert images.rgb(image).mode == "RGB"


# -- Tensors


def test_a_tensor_has_rows_columns_and_colours_where_they_belong():
    found = images.to_tensor(PICTURE, PICTURE.size)
    assert found.dtype == torch.float32
    expected = torch.from_numpy(RGB.astype(np.float64)).permute(2, 0, 1)[None] / 255 * 2 - 1
    assert torch.allclose(found.double(), expected, rtol=0, atol=1.2e-7)


def test_black_and_white_are_the_ends_of_the_range():
    ends = Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8))
    assert torch.equal(images.to_tensor(ends, (2, 1)), torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_eight_bit_value_survives_the_way_to_a_tensor_and_back(dtype):
    values = np.arange(256, dtype=np.uint8)
    every = np.stack([values, values[::-1], np.roll(values, 77)], axis=1).reshape(16, 16, 3)
    (back,) = images.to_images(images.to_tensor(Image.fromarray(every), (16, 16)).to(dtype))
    assert back.mode == "RGB" and np.array_equal(np.array(back), every)


def tensor_near(levels: np.ndarray) -> torch.Tensor:
    """(1, 3, 1, n), float32: values whose 255ths are these levels, as nearly as there are any."""
    return torch.from_numpy(levels / 255 * 2 - 1).float().expand(1, 3, 1, len(levels))


@pytest.mark.parametrize(("truncate", "rounding"), [(False, np.rint), (True, np.floor)])
def test_what_lies_between_two_levels_is_rounded_or_cut_off(truncate, rounding):
    between = np.arange(255)[:, None] + np.array([0.01, 0.25, 0.49, 0.51, 0.75, 0.99])
    (found,) = images.to_images(tensor_near(between.ravel()), truncate=truncate)
    assert np.array_equal(np.array(found), as_grey(rounding(between.ravel())[None]))


def test_halves_are_rounded_to_even_and_cut_off():
    """Of the halves only some are float32 numbers after the way through [-1, 1]; all of those are here."""
    halves = np.arange(255) + 0.5
    near = torch.from_numpy(halves / 255 * 2 - 1).float()
    tried = 0
    for values in (near, near.nextafter(torch.tensor(2.0)), near.nextafter(torch.tensor(-2.0))):
        exact = (((values / 2 + 0.5) * 255) == torch.from_numpy(halves).float()).numpy()
        chosen, pixels = halves[exact], values[torch.from_numpy(exact)].expand(1, 3, 1, -1)
        tried += len(chosen)
        assert np.array_equal(np.array(images.to_images(pixels)[0]), as_grey(np.rint(chosen)[None]))
        assert np.array_equal(np.array(images.to_images(pixels, truncate=True)[0]), as_grey(np.floor(chosen)[None]))
    assert tried > 200
    grey = torch.zeros(1, 3, 1, 1)  # 127.5
    assert images.to_images(grey)[0].getpixel((0, 0)) == (128,) * 3
    assert images.to_images(grey, truncate=True)[0].getpixel((0, 0)) == (127,) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_lies_outside_is_clamped(dtype):
    pixels = torch.tensor([-torch.inf, -1e4, -1.5, 1.5, 1e4, torch.inf], dtype=dtype).expand(1, 3, 1, 6)
    for truncate in (False, True):
        (found,) = images.to_images(pixels, truncate=truncate)
        assert np.array_equal(np.array(found), as_grey(np.array([[0, 0, 0, 255, 255, 255]])))


def test_a_batch_becomes_its_pictures_in_order():
    pixels = torch.cat([images.to_tensor(Image.new("RGB", (4, 2), (i, 2 * i, 3 * i)), (4, 2)) for i in range(5)])
    kept = pixels.clone()
    found = images.to_images(pixels)
    assert [np.array(image).tolist() for image in found] == [[[[i, 2 * i, 3 * i]] * 4] * 2 for i in range(5)]
    assert torch.equal(pixels, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_refused(dtype):
    pixels = torch.zeros(2, 3, 4, 4, dtype=dtype)
    pixels[1, 2, 3, 0] = torch.nan
    with pytest.raises(ValueError) as caught:
        images.to_images(pixels)
    assert "hold NaN" in one_line(caught.value)


# -- Sizes and masks


@pytest.mark.parametrize("size", [(8, 8), (41, 23), (80, 48), (1, 1)])
def test_resizing_is_pillows_lanczos(size):
    expected = np.array(PICTURE.resize(size, Image.Resampling.LANCZOS))
    (found,) = images.to_images(images.to_tensor(PICTURE, size))
    assert np.array_equal(np.array(found), expected)


@pytest.mark.parametrize(("side", "expected"), [(1, 8), (7, 8), (8, 8), (15, 8), (16, 16), (519, 512)])
def test_a_side_is_rounded_down_but_never_to_nothing(side, expected):
    assert images.floor_to(side, 8) == expected


def test_a_mask_is_one_from_the_middle_grey_on():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = images.mask_to_tensor(Image.fromarray(grey), (16, 16))
    assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(grey >= 128).float()[None, None])


def test_a_mask_is_resized_as_a_picture_is():
    mask = Image.fromarray(np.where(noise(30, 20) > 125, 255, 0).astype(np.uint8))
    expected = np.array(mask.resize((8, 16), Image.Resampling.LANCZOS)) >= 128
    assert torch.equal(images.mask_to_tensor(mask, (8, 16)), torch.from_numpy(expected).float()[None, None])


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        *(("1", 1, 1), ("1", 0, 0), ("RGB", (255, 255, 0), 1), ("RGB", (255, 0, 0), 0), ("RGBA", (0, 0, 0, 0), 1)),
        *(
            ("RGBA", (0, 0, 0, 255), 0),
            ("LA", (255, 255), 1),
            ("I;16", 65535, 1),
            ("I;16", 32767, 0),
            ("CMYK", (0, 0, 0, 0), 1),
        ),
    ],
)
def test_a_mask_of_any_kind_is_judged_by_its_brightness(mode, colour, expected):
    mask = Image.new(mode, (8, 8), colour)
    assert torch.equal(images.mask_to_tensor(mask, (8, 8)), torch.full((1, 1, 8, 8), float(expected)))


# -- How far two pictures are apart


def test_pictures_are_compared_value_by_value():
    other = RGB.copy()
    other[3, 4] = other[3, 4] ^ 1
    other[0, 0, 0] = 255 if RGB[0, 0, 0] < 128 else 0
    apart = np.abs(other.astype(int) - RGB.astype(int))
    assert images.difference(PICTURE, PICTURE.copy()) == (0, 0.0)
    assert images.difference(PICTURE, Image.fromarray(other)) == (apart.max(), 4 / RGB.size)
    assert images.difference(PICTURE, PICTURE.resize((5, 5))) == (255, 1.0)


def test_of_a_telephones_jpeg_with_several_pictures_it_is_the_photograph(tmp_path):
    first, second = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (4, 3), "blue")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    found = images.read(tmp_path / "a.jpg")
    assert found.size == (8, 6) and found.getpixel((0, 0))[0] > 250
