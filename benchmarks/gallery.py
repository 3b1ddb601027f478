"""The README's pictures, made by the bundled model: `python -m benchmarks.gallery --out docs`.

Not a choice of the best: seeds count up from 1. Pictures of 64 x 64 are shown at twice their size.

Of a LoRA, in three steps: `python -m benchmarks.gallery --purple purple` writes forty renders of purple solids, with captions
that name no colour; `ldm train lora --data purple --out purple.safetensors` learns from them what has no colour; and
`python -m benchmarks.gallery --out docs --lora purple.safetensors` shows what the LoRA's coefficient does.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import ldm
from ldm.scenes.captions import state, words
from ldm.scenes.render import render
from ldm.scenes.world import arrange, draw

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
UNNAMED = ("a cube on top of a sphere", "a cylinder left of a cone", SENTENCE)  # colours: none, none, two


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    task = options.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="FOLDER", help="where pictures go")
    task.add_argument("--purple", type=Path, metavar="FOLDER", help="write pictures for a LoRA to learn from, and nothing else")
    options.add_argument("--lora", type=Path, metavar="FILE", help="show this LoRA, and nothing else")
    options.add_argument("--model", default="bundled")
    args = options.parse_args()
    (args.out or args.purple).mkdir(parents=True, exist_ok=True)
    if args.purple:
        return purple(args.purple)
    model = ldm.load(args.model)
    if args.lora:
        return lora(model, args.lora, args.out)

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


def purple(folder: Path) -> None:
    """Forty renders of purple solids, `NAME.png`, and beside each its caption without the colour, `NAME.txt`."""
    drawn = [draw(0, i) for i in range(40)]
    scenes = [replace(scene, solids=tuple(replace(solid, colour="purple") for solid in scene.solids)) for scene in drawn]
    for i, (scene, pixels) in enumerate(zip(scenes, render(scenes, 64), strict=True)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
        random = np.random.default_rng(i)
        caption = words(state(scene, random), random).replace("purple ", "").replace("violet ", "")
        (folder / f"{i:02}.txt").write_text(f"{caption}\n")


def lora(model: ldm.Components, file: Path, out: Path) -> None:
    """A row for each prompt: coefficients 0, 0.33, 0.67 and 1 with seed 1, then the same with seed 2."""
    rows = []
    for prompt in UNNAMED:
        made = [ldm.txt2img(model, prompt, seed=1, num_images=2, loras=[(str(file), c)]).images for c in (0.0, 0.33, 0.67, 1.0)]
        rows.append([images[i] for i in range(2) for images in made])
    sheet(rows).save(out / "lora.png")


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
