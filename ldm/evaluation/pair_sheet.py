"""A sheet of pairs to look at: each picture beside its nearest of the training set, with similarity and names below."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ldm import images
from ldm.evaluation.near_duplicates import Pair

SIDE, GAP, LINE = 128, 12, 14  # pixels: of a picture, between pairs, of a line of text
COLUMNS = 4  # pairs side by side
NAMED = 20  # letters of a name, its last


def sheet(pairs: Sequence[Pair]) -> Image.Image:
    """The pairs in rows of COLUMNS, as given. Small pictures are enlarged by whole pixels, large ones reduced."""
    if not pairs:
        raise ValueError("no pairs to show; expected at least one")
    rows = -(-len(pairs) // COLUMNS)
    wide, high = 2 * SIDE + GAP, SIDE + 3 * LINE + GAP
    made = Image.new("RGB", (min(len(pairs), COLUMNS) * wide + GAP, rows * high + GAP), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=11)
    for k, pair in enumerate(pairs):
        left, top = GAP + k % COLUMNS * wide, GAP + k // COLUMNS * high
        made.paste(_fitted(images.read(pair.image)), (left, top))
        made.paste(_fitted(images.read(pair.training)), (left + SIDE, top))
        apart = "" if pair.pixels is None else f", pixels {pair.pixels:.3f} apart"
        for line, text in enumerate((f"{pair.similarity:.4f}{apart}", _short(pair.image.name), _short(pair.training.name))):
            draw.text((left, top + SIDE + line * LINE), text, fill="black", font=font)
    return made


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture in a grey square of SIDE."""
    longer = max(picture.size)
    if longer <= SIDE:
        resized = picture.resize([side * (SIDE // longer) for side in picture.size], Image.Resampling.NEAREST)
    else:
        resized = picture.resize([max(side * SIDE // longer, 1) for side in picture.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIDE, SIDE), (200, 200, 200))
    square.paste(resized, ((SIDE - resized.width) // 2, (SIDE - resized.height) // 2))
    return square


def _short(name: str) -> str:
    """A name's end, in letters that any font has."""
    shown = "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in name)
    return shown if len(shown) <= NAMED else "..." + shown[3 - NAMED :]
