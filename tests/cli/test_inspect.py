"""`ldm inspect`, and the watermark that it looks for."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import weights_convert
from ldm.output import watermark
from tests import lora_files
from tests.checkpoints import saved

SMALL = ("-W", "16", "-H", "16", "--steps", "1", "--seed", "1")


def grainy(width=512, height=512):
    """The package's method wants grain: of smooth pictures it loses some bits."""
    return Image.fromarray(np.random.default_rng(0).integers(60, 200, (height, width, 3), dtype=np.uint8))


def test_a_picture_of_ours_tells_how_it_was_made(command, tmp_path):
    made = command("txt2img", "a red cube", "-n", "dull", *SMALL)
    (path,) = made.out.split()
    told = command("inspect", path)
    assert told.status == 0
    for line in ("prompt: a red cube", "negative prompt: dull", "seed: 1", "sampler: pndm", "pixels: as they were made"):
        assert f"  {line}" in told.out
    found = json.loads(command("inspect", path, "--json").out)
    assert found["receipt"]["prompt"] == "a red cube" and found["pixels_as_made"] is True and found["size"] == [16, 16]


def test_a_picture_that_was_changed_is_told(command, tmp_path):
    made = command("txt2img", "a red cube", *SMALL)
    (path,) = made.out.split()
    with Image.open(path) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("ldm", image.text["ldm"])
        changed = image.point(lambda v: 255 - v)
        changed.save(tmp_path / "changed.png", pnginfo=info)
    assert "pixels: NOT those of the receipt" in command("inspect", str(tmp_path / "changed.png")).out


def test_what_other_tools_wrote_is_shown_and_nothing_is_said_to_be_nothing(command, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a")
    grainy(20, 20).save(tmp_path / "other.png", pnginfo=info)
    grainy(20, 20).save(tmp_path / "plain.jpg")
    told = command("inspect", str(tmp_path / "other.png"), str(tmp_path / "plain.jpg"))
    assert told.status == 0
    assert "no receipt; parameters:\n    a cat\n    Steps: 20" in told.out and "no receipt, no parameters" in told.out


def test_what_is_no_picture_is_refused_in_one_line(command, tmp_path):
    (tmp_path / "x.png").write_text("no picture")
    told = command("inspect", str(tmp_path / "x.png"))
    assert told.status == 1 and len(told.err.splitlines()) == 1 and "x.png" in told.err


def test_a_picture_too_small_for_the_watermark_is_refused_before_it_is_made(command, tmp_path):
    told = command("txt2img", "a", *SMALL, "--watermark")
    assert told.status == 1 and "watermark on a picture of 16 x 16; it needs 256 x 256 pixels" in told.err


@pytest.mark.reference
def test_the_watermark_is_written_and_read_back(command, tmp_path):
    pytest.importorskip("imwatermark", reason="needs the reference extra")
    from imwatermark import WatermarkDecoder

    marked = watermark.embed(grainy())
    marked.save(tmp_path / "marked.png")
    grainy().save(tmp_path / "plain.png")
    assert watermark.is_marked(marked) and not watermark.is_marked(grainy()) and not watermark.is_marked(grainy(64, 64))
    told = command("inspect", str(tmp_path / "marked.png"), str(tmp_path / "plain.png")).out
    assert told.count("watermark: StableDiffusionV1") == 1 and told.count("watermark: none") == 1
    decoder = WatermarkDecoder("bytes", 136)
    assert decoder.decode(np.ascontiguousarray(np.asarray(marked)[..., ::-1]), "dwtDct") == b"StableDiffusionV1"
    assert np.abs(np.asarray(marked).astype(int) - np.asarray(grainy())).mean() < 12


@pytest.mark.parametrize("change", [{"adapters": 3}, {"adapters": ["x"]}, {"verdict": "good"}], ids=str)
def test_a_receipt_that_was_tampered_with_is_refused_in_one_line(command, tmp_path, change):
    made = command("txt2img", "a red cube", *SMALL)
    with Image.open(made.paths[0]) as image:
        info = PngImagePlugin.PngInfo()
        info.add_text("ldm", json.dumps({**json.loads(image.text["ldm"]), **change}))
        image.save(tmp_path / "x.png", pnginfo=info)
    told = command("inspect", tmp_path / "x.png")
    assert told.status == 1 and len(told.err.splitlines()) == 1 and next(iter(change)) in told.err


def test_loras_verdicts_and_what_of_a_lora_is_of_no_use_are_told(command, tmp_path, tiny_native_safe):
    lora_files.kohya(tmp_path / "style.safetensors", **{"lora_unet_other.lora_up.weight": torch.ones(1)})
    words = ("a <lora:style:0.5>", *SMALL, "--adapter-folder", tmp_path, "--embedding", f"toy={toy(tmp_path)}")
    made = command("txt2img", *words, "--safety", "flag", model=tiny_native_safe)
    assert made.status == 0
    assert "ldm: warning: LoRA style: 1 tensors are of no layer of this model: lora_unet_other.lora_up.weight" in made.err
    told = command("inspect", made.paths[0]).out
    assert "  LoRA: style at 0.5\n" in told and "  embedding: toy\n" in told
    (receipt,) = made.receipts
    verdict = receipt["verdict"]
    assert verdict["flagged"] and f"  safety: flagged for concepts {verdict['concepts']}; action: flag; margins" in told
    assert f"by concept: 0: {verdict['margins'][0]}, 1: {verdict['margins'][1]}, " in told


def toy(folder):
    torch.save({"<toy>": torch.ones(2, 32)}, folder / "learned_embeds.bin")
    return folder / "learned_embeds.bin"


# -- Checkpoints and traces


def test_the_command_prints_it_and_its_status_tells(command, tiny_native, tmp_path):
    compvis = tmp_path / "tiny.ckpt"
    weights_convert.write(weights_convert.read(tiny_native), compvis, "compvis")
    told = command("inspect", compvis)
    assert told.status == 0 and f"sha256: {hashlib.sha256(compvis.read_bytes()).hexdigest()}" in told.out
    for line in (
        "unet: compvis names below 'model.diffusion_model.', 496 tensors",
        "pickle, not run: ",
        "numbers: ",
        "no weights: ",
    ):
        assert line in told.out
    assert "WRONG" not in told.out
    state = dict(torch.load(compvis, weights_only=True)["state_dict"])
    del state["model.diffusion_model.out.2.bias"]
    wrong = command("inspect", saved(tmp_path / "a.ckpt", {"state_dict": state}))
    assert (
        wrong.status == 3
        and "WRONG: unet: 1 missing" in wrong.out
        and "missing 1 of out.2: model.diffusion_model.out.2.bias" in wrong.out
    )
    found = json.loads(command("inspect", tiny_native, "--json", "--no-values").out)
    assert found["layout"] == "a native folder" and not found["wrong"] and len(found["files"]) == 3
    none = command("inspect", tmp_path / "none.ckpt")
    assert none.status == 1 and len(none.err.splitlines()) == 1


def test_a_trace_is_listed(command, tmp_path):
    made = command(
        "trace", "a red cube", "-o", tmp_path / "a.trace", "-W", "16", "-H", "16", "--steps", "1", "--seed", "1", "-q"
    )
    assert made.status == 0
    told = command("inspect", tmp_path / "a.trace")
    assert told.status == 0 and "calls of the network" in told.out and "  unet.conv_in" in told.out
