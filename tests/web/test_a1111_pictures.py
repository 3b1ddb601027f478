"""Pictures as AUTOMATIC1111's clients give them: sizes by resize_mode, masks by their transparency, texts of files."""

import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import ldm
from ldm.output import files
from ldm.web import a1111_pictures as pictures
from ldm.web import form
from tests.web.conftest import PROMPT, running

SIZE = {"width": 64, "height": 64}


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8))


@pytest.mark.parametrize(
    ("size", "inner"), [((200, 96), (133, 64)), ((96, 200), (64, 133)), ((64, 64), (64, 64)), ((9, 5), (115, 64))]
)
def test_resize_mode_1_cuts_off_what_is_too_much(size, inner):
    picture, left, top = noise(*size), inner[0] // 2 - 32, inner[1] // 2 - 32
    expected = picture.resize(inner, Image.Resampling.LANCZOS).crop((left, top, left + 64, top + 64))
    made = pictures.resized(picture, (64, 64), pictures.CROP)
    assert made.size == (64, 64) and ldm.images.difference(made, expected)[0] <= 1


@pytest.mark.parametrize(
    ("size", "inner"), [((200, 96), (64, 30)), ((96, 200), (30, 64)), ((64, 192), (21, 64)), ((5000, 1), (64, 1))]
)
def test_resize_mode_2_has_all_of_the_picture_and_fills_up_with_its_edges(size, inner):
    picture, left, top = noise(*size), 32 - inner[0] // 2, 32 - inner[1] // 2
    middle = picture.resize(inner, Image.Resampling.LANCZOS)
    made = pictures.resized(picture, (64, 64), pictures.FILL)
    assert made.size == (64, 64) and made.crop((left, top, left + inner[0], top + inner[1])).tobytes() == middle.tobytes()
    values = np.array(made).astype(int) if left == 0 else np.array(made).astype(int).swapaxes(0, 1)
    start, end = max(left, top), max(left, top) + min(inner)
    for ends, edge, beside in ((values[:start], start, start + 1), (values[end:], end - 1, end - 2)):
        assert len(ends) >= 16 and (ends == ends[0]).all()  # every row that is filled in is the same
        if min(inner) > 1:
            slope = values[edge] - values[beside]  # and what the edge has where it begins, an eighth of a pixel further
            assert abs(ends[0] - (values[edge] + slope / 8).clip(0, 255)).max() <= 1


def test_resize_mode_is_of_the_picture_and_of_its_mask(server, bundled):
    picture, mask = noise(200, 96), Image.new("L", (200, 96))
    mask.paste(255, (0, 0, 100, 96))
    common = {"prompt": PROMPT, "seed": 2, "steps": 3, "sampler_name": "DDIM", "cfg_scale": 3, "denoising_strength": 1, **SIZE}
    common |= {"init_images": [encoded(picture)], "mask": encoded(mask)}
    fields = {"steps": 3, "seed": 2, "guidance_scale": 3.0, "sampler": "ddim", "prompt_syntax": "a1111"}
    seen = []
    for mode in range(3):
        answer = server.client.post("/sdapi/v1/img2img", json=common | {"resize_mode": mode})
        own = [pictures.resized(one, (64, 64), mode) for one in (picture, mask)]
        expected = ldm.inpaint(bundled, PROMPT, *own, width=64, height=64, **fields)
        seen.append(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).tobytes())
        assert seen[-1] == expected.images[0].tobytes()
    assert len(set(seen)) == 3
    refused = server.client.post("/sdapi/v1/img2img", json=common | {"resize_mode": 3})
    (detail,) = refused.json()["detail"]
    assert refused.status_code == 422 and detail["loc"] == ["body", "resize_mode"]
    assert detail["msg"] == "resize_mode 3 (latent upscale) is not offered here; expected 0, 1 or 2"


def test_of_a_mask_with_transparency_the_opaque_part_counts():
    levels = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1)))
    black = Image.merge("RGBA", (*[Image.new("L", levels.size)] * 3, levels))
    grey = Image.merge("LA", (Image.new("L", levels.size), levels))
    few = levels.quantize(4)
    few.info["transparency"] = bytes([0, 100, 200, 255])
    for picture in (black, grey):
        assert np.array(pictures.mask(encoded(picture), form.Limits()))[0].tolist() == [0] * 129 + [255] * 127
    found = np.array(pictures.mask(encoded(few), form.Limits()))
    assert (found == np.where(np.array(few) >= 2, 255, 0)).all()
    opaque = Image.merge("RGBA", (*[levels] * 3, Image.new("L", levels.size, 255)))
    assert np.array(pictures.mask(encoded(opaque), form.Limits()).convert("L"))[0].tolist() == list(range(256))


def test_a_transparent_mask_is_inpainted_where_it_is_opaque(server, bundled):
    picture, white = Image.new("RGB", (64, 64), "orange"), Image.new("L", (64, 64))
    white.paste(255, (0, 0, 32, 64))
    mask = Image.new("RGBA", (64, 64), "black")
    for invert, alpha in ((0, white), (1, Image.eval(white, lambda value: 255 - value))):
        mask.putalpha(alpha)
        asked = {"prompt": PROMPT, "seed": 2, "steps": 3, "sampler_name": "DDIM", "cfg_scale": 3, "denoising_strength": 1}
        asked |= {"init_images": [encoded(picture)], "mask": encoded(mask), "inpainting_mask_invert": invert, **SIZE}
        answer = server.client.post("/sdapi/v1/img2img", json=asked).json()
        fields = {"steps": 3, "seed": 2, "guidance_scale": 3.0, "sampler": "ddim", "prompt_syntax": "a1111"}
        expected = ldm.inpaint(bundled, PROMPT, picture, white, **fields)
        made = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert made.tobytes() == expected.images[0].tobytes()


def test_the_texts_of_a_file_are_read_within_bounds(server, bundled, monkeypatch):
    with running(bundled, limits=form.Limits(most_image_pixels=64 * 64)) as bounded:
        large = bounded.client.post("/sdapi/v1/png-info", json={"image": encoded(Image.new("RGB", (65, 64)))})
        (detail,) = large.json()["detail"]
        assert large.status_code == 422 and detail["msg"] == "image has 65 x 64 pixels; expected at most 4,096 in all"
    broken = base64.b64encode(base64.b64decode(encoded(noise(64, 64)))[:-3000]).decode()
    for wrong in (base64.b64encode(b"GIF89a").decode(), broken):
        refused = server.client.post("/sdapi/v1/png-info", json={"image": wrong})
        (detail,) = refused.json()["detail"]
        assert refused.status_code == 422 and detail["msg"] == "image cannot be read as PNG, JPEG or WebP"
    at_once, most, decoded, lock, real = [], [], [], threading.Lock(), files.texts
    load = PngImagePlugin.PngImageFile.load_prepare
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: decoded.append(1) or load(self))

    def slow(file):
        with lock:
            at_once.append(1)
            most.append(len(at_once))
        time.sleep(0.1)
        with lock:
            at_once.pop()
        return real(file)

    monkeypatch.setattr(files, "texts", slow)
    asked = {"image": encoded(noise(64, 64))}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.client.post("/sdapi/v1/png-info", json=asked).status_code, range(8)))
    assert answers == [200] * 8 and max(most) == 2
    assert len(decoded) == 8  # each once
