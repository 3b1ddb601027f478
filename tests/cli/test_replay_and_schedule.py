"""`ldm replay` and `ldm schedule`; the help of all commands."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import PngImagePlugin

import ldm
from ldm import images
from ldm.cli import parser
from ldm.diffusion.conventions import SPACINGS, make_grid
from ldm.diffusion.schedule import ScheduleConfig
from ldm.output import files
from ldm.pipelines.settings import Settings
from ldm.samplers import all_samplers
from tests import lora_files
from tests.command_line import PROMPT, ROOT, SMALL, Done, refused
from tests.refusal import one_line

# -- Again


def tampered(path: Path, target: Path) -> Path:
    """The same receipt around pixels of which one is another."""
    picture, receipt = images.read(path), files.read_receipt(path)
    picture.putpixel((3, 4), tuple(value ^ 16 for value in picture.getpixel((3, 4))))
    return files.save_as(picture, receipt, target)


@pytest.mark.parametrize(
    "words",
    [
        ("--sampler", "Euler a"),
        ("--sampler", "DPM++ 2M Karras", "-n", "blurry", "--guidance-scale", "3.3"),
        ("--sampler", "ddim", "--eta", "1", "--num-images", "3"),
        ("--convention", "compvis", "--num-images", "2"),
        ("--dtype", "bfloat16"),
        ("--guidance-interval", "10", "800", "--spacing", "trailing"),
    ],
)
def test_a_picture_is_made_again_and_found_the_same(command, tmp_path, words):
    made = command("txt2img", PROMPT, *SMALL, *words).paths[-1]
    again = command("replay", made, "-q", "--out", tmp_path / "again")
    copy, verdict = again.out.splitlines()
    assert again.status == 0 and Path(copy).parent == tmp_path / "again"
    alone = ("index", "batch", "latents_sha256", "pixels_sha256")  # in which a batch's picture may differ from one made alone
    first, second = ({k: v for k, v in files.read_receipt(path).items() if k not in alone} for path in (made, copy))
    assert first == second
    farthest, _ = images.difference(images.read(copy), images.read(made))
    batch = files.read_receipt(made)["batch"]
    if batch == files.read_receipt(copy)["batch"]:
        assert (farthest, verdict, again.err) == (0, "the same, pixel for pixel", "")
    else:
        assert farthest <= 1 and verdict.startswith("the same")
        assert again.err in ("", f"ldm: warning: batch was {batch}, is 1\n")


@pytest.mark.parametrize("strength", ["0", "0.5", "1"])
def test_a_picture_made_from_another_needs_that_one_again(command, tmp_path, picture, mask, strength):
    made = command("img2img", PROMPT, "--image", picture, "--steps", "2", "--strength", strength, "-q").paths[0]
    assert command("replay", made, "--image", picture, "-q").out == "the same, pixel for pixel\n"
    refused(command("replay", made, "-q"), tmp_path, "the picture was made with an image; give that as image too", there=1)
    wrong = "the image given is not the one that the picture was made from"
    refused(command("replay", made, "--image", tampered_copy(picture), "-q"), tmp_path, wrong, there=1)


def tampered_copy(path: Path) -> Path:
    image = images.read(path)
    image.putpixel((0, 0), tuple(value ^ 1 for value in image.getpixel((0, 0))))
    image.save(path.with_name("other.png"))
    return path.with_name("other.png")


def test_an_inpainted_picture_needs_its_mask_again(command, tmp_path, picture, mask):
    made = command("inpaint", PROMPT, "--image", picture, "--mask", mask, "--steps", "2", "--paste", "-q").paths[0]
    assert command("replay", made, "--image", picture, "--mask", mask, "-q").status == 0
    wrong = "the mask given is not the one that the picture was made from"
    refused(command("replay", made, "--image", picture, "--mask", tampered_copy(mask), "-q"), tmp_path, wrong, there=1)
    refused(command("replay", made, "--image", picture, "-q"), tmp_path, "was made with a mask; give that as mask too", there=1)
    made = command("inpaint", PROMPT, "--image", picture, "--mask", mask, "--invert-mask", "--steps", "2", "-q").paths[0]
    assert command("replay", made, "--image", picture, "--mask", mask, "--invert-mask", "-q").status == 0


def test_adapters_that_were_moved_are_named_by_their_new_folder(command, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    style = lora_files.kohya(old / "style.safetensors")
    torch.save({"<toy>": torch.ones(2, 32)}, old / "toy.bin")
    words = ("--lora", f"{style}:0.7", "--embedding", "cat=toy", "--adapter-folder", old)
    made = command("txt2img", "a cat <lora:style:0.2>", *SMALL, *words).paths[0]
    assert command("replay", made, "-q").out == "the same, pixel for pixel\n"
    old.rename(new)
    refused(command("replay", made, "-q"), tmp_path, "'toy'", str(old), "is no folder; name the one it is in", there=1)
    done = command("replay", made, "-q", "--adapter-folder", new)
    assert (done.status, done.out, done.err) == (0, "the same, pixel for pixel\n", "")
    lora_files.kohya(new / "style.safetensors", seed=1)
    done = command("replay", made, "-q", "--adapter-folder", new)
    assert done.status == 3 and "the files of its adapters" in done.err


def test_a_picture_whose_pixels_were_edited_is_found_out(command, tmp_path):
    made = command("txt2img", PROMPT, *SMALL).paths[0]
    done = command("replay", tampered(made, tmp_path / "edited.png"), "-q")
    share = 3 / (24 * 32 * 3)
    assert done == Done(3, f"not the same: {share:.2g} of the values differ, by at most 16 of 255\n", "")


def test_another_model_is_named_and_makes_another_picture(command, tmp_path, tiny_native):
    made = command("txt2img", PROMPT, *SMALL).paths[0]
    receipt = files.read_receipt(made)
    receipt["model"] = {"name": "other", "fingerprint": "0" * 16}
    forged = files.save_as(images.read(made), receipt, tmp_path / "forged.png")
    done = command("replay", forged, "-q")
    assert (done.out, done.err) == ("the same, pixel for pixel\n", "")  # what counts is the picture
    done = command("replay", made, "-q", "--dtype", "bfloat16")
    assert done.status == 3 and done.err == "ldm: warning: dtype was float32, is bfloat16\n"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"task": "upscale"}, "the receipt is of task 'upscale'; expected one of txt2img, img2img, inpaint"),
        ({"noise_sha256": "0"}, "was made from noise that was given as a tensor"),
        ({"dtype": "float8"}, "dtype 'float8'; expected one of float32"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
        ({"tokenizer": "t5"}, "tokenizer style 't5'; expected one of hf, openai"),
        ({"seed": -1}, "seed -1; for a drawn one, leave the seed out"),
        ({"steps": "2"}, "steps '2'; expected a whole number from 1"),
        ({"guidance_scale": None}, "guidance_scale None; expected a finite number"),
        ({"guidance_interval": [1]}, "guidance_interval [1]; expected two timesteps"),
        ({"sampler": "magic"}, "sampler 'magic'; expected one of ddim"),
        ({"spacing": {}}, "spacing {}; expected one of "),
        ({"width": 33}, "width 33 is not a multiple of 8; try 32 or 40"),
        ({"prompts": []}, "prompt []; expected text, or a list of texts that is not empty"),
        ({"prompts": [PROMPT], "index": 7}, "the receipt is of image 7 of 1"),
        ({"prompts": [PROMPT], "index": 0, "num_images": "2"}, "num_images '2'; expected a whole number from 1"),
        ({"prompts": [PROMPT], "index": 0, "num_images": None}, "num_images None; expected a whole number from 1"),
    ],
    ids=str,
)
def test_a_receipt_that_cannot_be_followed_is_refused(command, tmp_path, fields, expected):
    made = command("txt2img", PROMPT, *SMALL, "--seed", "1").paths[0]
    text = PngImagePlugin.PngInfo()
    text.add_text("ldm", json.dumps({**files.read_receipt(made), **fields}))
    images.read(made).save(tmp_path / "forged.png", pnginfo=text)
    refused(command("replay", tmp_path / "forged.png", "-q"), tmp_path, expected, there=1)


def test_what_is_no_picture_of_ours_is_not_made_again(command, tmp_path, picture):
    refused(command("replay", picture), tmp_path, f"{picture}: carries no receipt")
    refused(command("replay", tmp_path / "no.png"), tmp_path, f"{tmp_path / 'no.png'}: cannot be read as PNG (No such file")


# -- The schedule


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ((), {}),
        (("--steps", "7", "--sampler", "heun"), {"steps": 7, "sampler": "heun"}),
        (("--sampler", "DPM++ 2M Karras", "--steps", "5"), {"sampler": "dpmpp_2m", "spacing": "karras", "steps": 5}),
        (("--convention", "diffusers", "--sampler", "k_euler_a"), {"convention": "diffusers", "sampler": "euler_ancestral"}),
        (("--ddim_steps", "50", "--plms", "--convention", "compvis"), {"steps": 50, "convention": "compvis"}),
        (("--spacing", "exponential", "--sampler", "lms"), {"spacing": "exponential", "sampler": "lms"}),
    ],
)
def test_the_schedule_is_the_grid_itself(command, words, fields):
    used = {name: fields.get(name, getattr(Settings(), name)) for name in ("steps", "sampler", "convention", "spacing")}
    named = {"convention": used["convention"], "spacing": used["spacing"]}
    grid = make_grid(ScheduleConfig(), used["steps"], used["sampler"], **named)
    rows = json.loads(command("schedule", *words, "--json").out)
    assert [(row["step"], row["t"], row["sigma"], row["next_sigma"]) for row in rows] == [
        (i, step.t, step.sigma, step.next_sigma) for i, step in enumerate(grid.steps)
    ]
    assert [row["snr"] for row in rows] == pytest.approx([1 / step.sigma**2 for step in grid.steps], rel=1e-12)
    assert sum(row["calls"] for row in rows) == all_samplers()[used["sampler"]].calls(grid)
    lines = command("schedule", *words).out.splitlines()
    assert [float(line.split()[1]) for line in lines[1:-1]] == pytest.approx([step.t for step in grid.steps], abs=5e-4)
    calls = sum(row["calls"] for row in rows)
    assert lines[-1] == f"{len(grid)} steps, {calls} calls of the network, from sigma {grid.start_sigma:.5f}"


def test_a_schedule_that_misses_some_noise_is_warned_of(command):
    done = command("schedule", "--spacing", "leading", "--steps", "25")
    assert done.status == 0 and len(done.out.splitlines()) == 27
    message = one_line(done.err[:-1])
    assert (
        message.startswith("ldm: warning: begins at t = 961, sigma 11.68 of 14.61")
        and "--spacing trailing or tapered begins at the top" in message
    )
    assert one_line(command("schedule", "--convention", "compvis", "--steps", "600").err[:-1]).startswith("ldm: ")


@pytest.mark.parametrize("words", [(), ("--spacing", "trailing"), ("--spacing", "karras"), ("--spacing", "linspace")])
@pytest.mark.parametrize("steps", ["1", "3", "1000"])
def test_a_schedule_that_misses_none_is_not(command, words, steps):
    done = command("schedule", *words, "--steps", steps)
    assert (done.status, done.err) == (0, "")


def test_the_schedule_from_an_image_is_the_end_of_the_whole_one(command):
    whole, part = (
        json.loads(command("schedule", "--json", "--steps", "20", *words).out) for words in ((), ("--strength", "0.3"))
    )
    assert [(row["t"], row["sigma"]) for row in part] == [(row["t"], row["sigma"]) for row in whole[-6:]]
    assert command("schedule", "--strength", "0.01").out.startswith("no steps: 25 x strength 0.01 is less than one")


def test_the_schedule_may_be_a_models_own(command, tiny_native):
    done = command("schedule", "--json", "--ckpt", tiny_native)
    assert (done.status, done.out) == (0, command("schedule", "--json").out)


# -- Help


@pytest.mark.parametrize(
    "words", [("--help",), ("txt2img", "--help"), ("inpaint", "--help"), ("schedule", "-h"), ("paint",)], ids=str
)
def test_help_imports_nothing_heavy_and_takes_no_time(words):
    code = "import sys, time; begun = time.monotonic()\ntry:\n    from ldm.cli import run; run(sys.argv[1:])\nfinally:\n"
    code += "    heavy = [m for m in ('torch', 'numpy', 'PIL', 'tqdm', 'tokenizers', 'safetensors') if m in sys.modules]\n"
    code += "    print(heavy, time.monotonic() - begun, sep='|')"
    process = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    heavy, seconds = process.stdout.splitlines()[-1].split("|")
    assert heavy == "[]" and float(seconds) < 0.5
    assert process.returncode == (2 if words == ("paint",) else 0)


def help_of(task: str) -> str:
    subparsers = parser()._subparsers._group_actions[0].choices
    return " ".join(subparsers[task].format_help().split())


@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
def test_the_defaults_in_the_help_are_those_of_the_settings(task):
    text = help_of(task)
    defaults = dataclasses.asdict(Settings())
    spelled = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in defaults.items()}
    for option, name in (
        *(("--steps", "steps"), ("--sampler", "sampler"), ("--convention", "convention"), ("--eta", "eta")),
        *(("--num-images", "num_images"), ("--batch-size", "batch_size")),
    ):
        described = re.search(rf"{option}\b(?:(?!\(default).)*\(default ([^)]*)\)", text.partition("prompt:")[2])
        assert described and described.group(1) == spelled[name], (option, described)
    assert f"(default: the model's, or {spelled['guidance_scale']})" in text
    assert (defaults["seed"], defaults["tile"], defaults["spacing"], defaults["guidance_interval"]) == (None,) * 4


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_the_default_strength_in_the_help_is_the_functions(task):
    defaults = inspect.signature(getattr(ldm, task)).parameters
    assert f"1 (begun with noise alone); default {defaults['strength'].default:g}" in help_of(task)
    assert f"(default {defaults['posterior'].default})" in help_of(task)


def test_the_help_names_every_spacing():
    assert ", ".join(SPACINGS[:-1]) + f" or {SPACINGS[-1]}" in help_of("schedule")


def test_the_default_settings_are_those_of_the_demo_form():
    """512 x 512 is the model's own; 50 steps of the form are 25 here, as the design has it."""
    assert dataclasses.asdict(Settings()) == {
        **{"negative_prompt": "", "steps": 25, "guidance_scale": 7.5, "guidance_interval": None, "sampler": "pndm"},
        **{"spacing": None, "eta": 0.0, "convention": "ldm", "seed": None, "num_images": 1, "batch_size": 4, "tile": None},
        **{"prompt_syntax": "plain", "long_prompt": "cut", "clip_skip": 1, "loras": (), "embeddings": ()},
        **{"adapter_folder": None, "safety": "black", "watermark": False, "decode": True},
    }
