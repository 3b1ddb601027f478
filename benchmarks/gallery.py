"""The README's pictures, made by the bundled model: `python -m benchmarks.gallery --out docs`.

Not a choice of the best: seeds count up from 1. Pictures of 64 x 64 are shown at twice their size.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import ldm
from ldm.scenes.render import render
from ldm.scenes.world import arrange

SHOWN = 2  # times its size
GAP = 4
SENTENCE = "a red cube on top of a blue sphere"
TURNED = "a blue sphere on top of a red cube"
OTHERS = (
    "a green cone left of a purple cylinder",
    "a purple cylinder left of a green cone",
    "a yellow sphere in front of a cyan cube",
    "a small white ball next to a big orange box",
    "a red sphere under a white cube",
    "a cyan cylinder under a yellow cone, and a red sphere right of the cyan cylinder",
    "a white cone behind a red cylinder",
    "an orange sphere",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options.add_argument("--model", default="bundled")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = ldm.load(args.model)

    rows = [ldm.txt2img(model, prompt, seed=1, num_images=8, batch_size=8).images for prompt in (SENTENCE, TURNED)]
    sheet([*rows, ldm.txt2img(model, list(OTHERS), seed=1, batch_size=8).images]).save(args.out / "text_to_image.png")

    source = picture("stacked", (("blue", "sphere"), ("red", "cube")))
    prompt = "a green cone on top of a blue sphere"
    changed = [ldm.img2img(model, prompt, source, strength=s, seed=1).images[0] for s in (0.3, 0.6, 0.9)]
    sheet([[source, *changed]]).save(args.out / "image_to_image.png")

    source = picture("side by side", (("red", "cube"), ("yellow", "cone")))
    mask = Image.new("L", source.size, 0)
    ImageDraw.Draw(mask).rectangle((32, 8, 63, 56), fill=255)
    prompt = "a red cube left of a blue sphere"
    filled = ldm.inpaint(model, prompt, source, mask, seed=1, num_images=2).images
    sheet([[source, mask.convert("RGB"), *filled]]).save(args.out / "inpainting.png")


def picture(layout: str, contents: tuple[tuple[str, str], ...]) -> Image.Image:
    """A render, for a picture to start from."""
    scene = arrange(layout, contents, np.random.default_rng(4))
    return Image.fromarray(render([scene], 64)[0].permute(1, 2, 0).numpy())


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows, on white."""
    width, height = (side * SHOWN + GAP for side in rows[0][0].size)
    page = Image.new("RGB", (max(map(len, rows)) * width - GAP, len(rows) * height - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            larger = image.resize((width - GAP, height - GAP), Image.Resampling.NEAREST)
            page.paste(larger, (x * width, y * height))
    return page


if __name__ == "__main__":
    main()
