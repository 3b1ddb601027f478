"""`ldm txt2img`, `img2img`, `inpaint`: what is printed, what is written."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

import ldm
from ldm import images
from ldm.cli import options
from ldm.output import files
from tests.command_line import PICTURE, PROMPT, SMALL, refused
from tests.refusal import one_line

# -- Making pictures


def test_a_picture_of_a_prompt_is_written_and_its_path_printed(command, tmp_path):
    done = command("txt2img", PROMPT, *SMALL, "--seed", "1234")
    assert (done.status, done.err, done.paths) == (0, "", [tmp_path / "out" / "00000-1234.png"])
    assert done.pictures[0].shape == (24, 32, 3) and os.listdir(tmp_path / "out") == ["00000-1234.png"]


def test_the_command_makes_what_the_function_makes(command, tiny_native, picture, mask):
    model, shared = ldm.load(tiny_native), {"width": 32, "height": 24, "steps": 2, "seed": 5}
    source, hidden = images.read(picture), images.read(mask)
    for words, result in (
        (("txt2img", PROMPT), ldm.txt2img(model, PROMPT, **shared)),
        (("img2img", PROMPT, "--image", picture), ldm.img2img(model, PROMPT, source, **shared)),
        (("inpaint", PROMPT, "--image", picture, "--mask", mask), ldm.inpaint(model, PROMPT, source, hidden, **shared)),
    ):
        done = command(*words, *SMALL, "--seed", "5")
        assert done.receipts == json.loads(json.dumps(result.receipts))
        assert np.array_equal(done.pictures[0], np.array(result.images[0]))


def test_every_option_arrives(command):
    done = command(
        *("txt2img", PROMPT, "-n", "blurry", "-W", "40", "-H", "16", "--steps", "3", "--sampler", "ddim", "--eta", "0.5"),
        *(
            "--spacing",
            "trailing",
            "--guidance-scale",
            "3.5",
            "--guidance-interval",
            "100",
            "900",
            "--seed",
            "7",
            "--tile",
            "64",
        ),
        *("--convention", "diffusers", "--dtype", "float64", "-q"),
    )
    expected = {"negative_prompt": "blurry", "width": 40, "height": 16, "steps": 3, "sampler": "ddim", "eta": 0.5, "tile": 64}
    expected |= {"spacing": "trailing", "guidance_scale": 3.5, "guidance_interval": [100.0, 900.0], "convention": "diffusers"}
    expected |= {"prompt": PROMPT, "seed": 7, "dtype": "float64", "device": "cpu"}
    assert {name: done.receipts[0][name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--strength", "0.5", "--posterior", "mode"),
            {"strength": 0.5, "posterior": "mode", "begun_with": "the image, noised"},
        ),
        (("--strength", "0"), {"strength": 0.0, "posterior": "sample", "begun_with": "the image"}),
        (("--strength", "1"), {"strength": 1.0, "begun_with": "noise alone"}),
        ((), {"strength": 0.8}),
    ],
)
def test_every_option_of_image_to_image_arrives(command, picture, words, expected):
    done = command("img2img", PROMPT, "--image", picture, *words, "--steps", "2", "-q")
    assert (done.status, done.receipts[0]["task"]) == (0, "img2img")
    assert {name: done.receipts[0][name] for name in expected} == expected
    assert (done.receipts[0]["width"], done.receipts[0]["height"]) == PICTURE.size


def test_inpainting_pastes_what_is_kept_and_takes_masks_of_both_kinds(command, tmp_path, picture, mask):
    shared = ("inpaint", PROMPT, "--image", picture, "--steps", "2", "-q", "--seed", "3", "--paste")
    done = command(*shared, "--mask", mask)
    kept = np.array(Image.open(mask)) == 0
    assert np.array_equal(done.pictures[0][kept], np.array(PICTURE)[kept])
    assert (done.pictures[0] != np.array(PICTURE))[~kept].mean() > 0.9
    ImageOps.invert(Image.open(mask)).save(tmp_path / "inverted.png")
    inverted = command(*shared, "--mask", tmp_path / "inverted.png", "--invert-mask")
    assert np.array_equal(inverted.pictures[0], done.pictures[0])


def test_the_picture_gives_its_size_rounded_down(command, tmp_path):
    PICTURE.resize((47, 21)).save(tmp_path / "odd.png")
    done = command("img2img", PROMPT, "--image", tmp_path / "odd.png", "--steps", "2", "-q")
    assert (done.receipts[0]["width"], done.receipts[0]["height"]) == (40, 16)


def test_the_words_of_compvis_scripts_mean_what_they_meant(command, tmp_path, picture, tiny_native):
    plain = command("txt2img", PROMPT, *SMALL, "--seed", "3", "--num-images", "4", "--guidance-scale", "5")
    theirs = command(
        *("txt2img", "--prompt", PROMPT, "--outdir", tmp_path / "theirs", "--ddim_steps", "2", "--plms", "--n_iter", "2"),
        *(
            "--n_samples",
            "2",
            "--H",
            "24",
            "--W",
            "32",
            "--scale",
            "5",
            "--ddim_eta",
            "0",
            "--ckpt",
            tiny_native,
            "--seed",
            "3",
        ),
        *("--precision", "full", "--skip_grid", "-q"),
        model=None,
        out=None,
    )
    assert theirs.status == 0 and [path.parent for path in theirs.paths] == [tmp_path / "theirs"] * 4
    assert all(np.array_equal(a, b) for a, b in zip(plain.pictures, theirs.pictures, strict=True))
    assert theirs.receipts == plain.receipts
    from_image = command("img2img", "--prompt", PROMPT, "--init-img", picture, "--ddim_steps", "2", "--strength", "0.5", "-q")
    assert from_image.receipts[0]["strength"] == 0.5
    solver = command("txt2img", PROMPT, *SMALL, "--dpm_solver", "--precision", "autocast")
    assert (solver.receipts[0]["sampler"], solver.receipts[0]["dtype"]) == ("dpmpp_2m", "bfloat16")
    assert command("txt2img", PROMPT, *SMALL, "--sampler", "ddim", "--ddim_eta", "1").receipts[0]["eta"] == 1


def test_the_model_may_be_named_in_the_environment(command, monkeypatch, tiny_native):
    monkeypatch.setenv(options.MODEL_VARIABLE, str(tiny_native))
    assert command("txt2img", PROMPT, *SMALL, model=None).status == 0


def test_an_empty_prompt_is_a_prompt(command):
    assert command("txt2img", "", *SMALL).receipts[0]["prompt"] == ""


def test_what_a_prompt_has_too_much_of_is_said(command):
    done = command("txt2img", "cube " * 80 + "sphere", *SMALL, "--seed", "1", "--num-images", "2")
    assert (
        one_line(done.err[:-1])
        == f"ldm: warning: the model reads 75 tokens; cut off: {'cube ' * 5 + 'sphere'!r}; see --long-prompt"
    )
    assert len(done.paths) == 2


# -- Seeds


def test_the_drawn_seed_is_printed_and_makes_the_same_picture_again(command):
    drawn = command("txt2img", PROMPT, *SMALL)
    (seed,) = re.fullmatch(r"seed (\d+)\n", drawn.err).groups()
    again = command("txt2img", PROMPT, *SMALL, "--seed", seed)
    assert again.err == "" and again.receipts == drawn.receipts
    assert np.array_equal(again.pictures[0], drawn.pictures[0])
    other = command("txt2img", PROMPT, *SMALL)
    assert other.err != drawn.err and not np.array_equal(other.pictures[0], drawn.pictures[0])


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_every_seed_makes_a_picture(command, seed):
    done = command("txt2img", PROMPT, *SMALL, "--seed", seed)
    assert done.paths[0].name == f"00000-{seed}.png" and done.receipts[0]["seed"] == seed


@pytest.mark.parametrize("sampler", ["pndm", "euler_ancestral"])
@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint"])
def test_a_picture_of_a_batch_is_the_one_that_its_own_seed_makes(command, picture, mask, task, sampler):
    """In float64 to the last bit of a picture, since what rounding leaves is too little to tip a level."""
    words = {"txt2img": SMALL[:4], "img2img": ("--image", picture), "inpaint": ("--image", picture, "--mask", mask)}[task]
    shared = (task, PROMPT, *words, "--steps", "3", "--sampler", sampler, "--dtype", "float64", "-q")
    batch = command(*shared, "--seed", "40", "--num-images", "3")
    assert [path.name for path in batch.paths] == ["00000-40.png", "00001-41.png", "00002-42.png"]
    for i, together in enumerate(batch.pictures):
        alone = command(*shared, "--seed", 40 + i)
        assert np.array_equal(alone.pictures[0], together)
        assert alone.receipts[0]["seed"] == batch.receipts[i]["seed"] == 40 + i


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_size_of_a_batch_changes_nothing(command, tmp_path, size):
    (tmp_path / "prompts").write_text("a cube\na sphere\n")
    shared = ("txt2img", "--from-file", tmp_path / "prompts", *SMALL, "--dtype", "float64", "--seed", "9", "--num-images", "2")
    done, reference = command(*shared, "--batch-size", size), command(*shared)
    assert [(r["prompt"], r["seed"]) for r in done.receipts] == [
        ("a cube", 9),
        ("a cube", 10),
        ("a sphere", 11),
        ("a sphere", 12),
    ]
    assert all(np.array_equal(a, b) for a, b in zip(done.pictures, reference.pictures, strict=True))


def test_where_one_generator_draws_for_all_a_batch_is_kept_whole(command):
    done = command(
        "txt2img", PROMPT, *SMALL, "--convention", "diffusers", "--seed", "9", "--num-images", "5", "--batch-size", "2"
    )
    assert [(r["seed"], r["index"], r["num_images"]) for r in done.receipts] == [(9, i, 5) for i in range(5)]
    assert command("replay", done.paths[4], "-q").out == "the same, pixel for pixel\n"


# -- Prompts from a file


PROMPTS = ["a cube", "кот, 立方体 🧊", "  x  "]
FILES = {
    "plain": "\n".join(PROMPTS).encode(),
    "with a last newline": "\n".join([*PROMPTS, ""]).encode(),
    "with a byte order mark": b"\xef\xbb\xbf" + "\n".join(PROMPTS).encode(),
    "from Windows": b"\xef\xbb\xbf" + "\r\n".join([*PROMPTS, ""]).encode(),
    "with blank lines": ("\n\n \t \n" + "\n \n".join(PROMPTS) + "\n\n\n").encode(),
}


def standard_input(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape")


@pytest.mark.parametrize("dash", [False, True], ids=["file", "standard input"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_has_a_prompt_a_line(command, tmp_path, monkeypatch, content, dash):
    (tmp_path / "prompts").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", standard_input(content))
    done = command("txt2img", "--from-file", "-" if dash else tmp_path / "prompts", *SMALL, "--seed", "1")
    assert (done.status, [r["prompt"] for r in done.receipts]) == (0, PROMPTS)
    assert [r["seed"] for r in done.receipts] == [1, 2, 3]


@pytest.mark.parametrize("dash", [False, True], ids=["file", "standard input"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no prompt; expected one a line"),
        (b"\xef\xbb\xbf\r\n \r\n", "holds no prompt; expected one a line"),
        ("a cube\ncafé".encode("latin-1"), "is not UTF-8 text at byte 10"),
        ("a cube".encode("utf-16"), "is not UTF-8 text at byte 0"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(command, tmp_path, monkeypatch, content, expected, dash):
    (tmp_path / "prompts").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", standard_input(content))
    name = "-" if dash else tmp_path / "prompts"
    refused(command("txt2img", "--from-file", name, *SMALL), tmp_path, f"{name}: {expected}")


def test_a_file_that_cannot_be_read_is_refused(command, tmp_path):
    refused(command("txt2img", "--from-file", tmp_path, *SMALL), tmp_path, f"{tmp_path}: cannot be read (Is a directory)")
    missing = tmp_path / "missing"
    refused(command("txt2img", "--from-file", missing, *SMALL), tmp_path, f"{missing}: cannot be read (No such file")


# -- Previews and progress


def test_a_preview_shows_the_first_picture_on_its_way(command, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(files, "save_as", lambda image, receipt, path: written.append((np.array(image), receipt, path)))
    words = ("txt2img", PROMPT, "-W", "32", "-H", "24", "--steps", "5", "-q", "--seed", "1", "--num-images", "2")
    done = command(*words, "--preview", tmp_path / "preview.png", "--preview-every", "2", "--sampler", "euler")
    assert [(receipt, path) for _, receipt, path in written] == [(None, str(tmp_path / "preview.png"))] * 3  # and the last
    first, second, _ = (image for image, _, _ in written)
    assert first.shape == second.shape == (24, 32, 3) and not np.array_equal(first, second)
    to_go = [np.abs(image.astype(int) - done.pictures[0]).mean() for image in (first, second)]
    assert to_go[1] < to_go[0]


def test_the_preview_of_the_last_step_is_nearly_the_picture(command, tmp_path):
    words = (
        "txt2img",
        PROMPT,
        *SMALL,
        "--preview",
        tmp_path / "a" / "preview.png",
        "--preview-every",
        "2",
        "--sampler",
        "euler",
    )
    done = command(*words)
    preview = np.array(images.read(tmp_path / "a" / "preview.png"))
    assert np.abs(preview - done.pictures[0].astype(int)).max() <= 8
    assert os.listdir(tmp_path / "a") == ["preview.png"] and len(done.paths) == 1


def test_progress_counts_pictures_and_steps_on_standard_error(command):
    done = command("txt2img", PROMPT, *SMALL[:-1], "--seed", "1", "--num-images", "3", "--batch-size", "2")
    assert "picture 1 of 3" in done.err and "picture 3 of 3" in done.err and "4/4" in done.err
    assert len(done.paths) == 3 and all(path.exists() for path in done.paths)
