"""What the command line refuses, in one line and with nothing left behind; and what a process of its own does."""

import contextlib
import os
import re
import resource
import signal
import struct
import tempfile
import time
import zlib
from pathlib import Path

import pytest

import ldm.pipelines.text_to_image
from ldm.cli import options
from ldm.output import files
from tests.command_line import PROMPT, SMALL, Done, refused, start
from tests.refusal import as_nobody, one_line

# -- Refusing


ANYWHERE = [  # for the three that make pictures
    (("--steps", "0"), "steps 0; expected a whole number from 1"),
    (("--steps", "-3"), "steps -3; expected a whole number from 1"),
    (("--steps", "1001"), "1001 steps; expected 1 to 1000"),
    (("--guidance-scale", "nan"), "guidance_scale nan; expected a finite number, 0 or more"),
    (("--guidance-scale", "inf"), "guidance_scale inf; expected a finite number, 0 or more"),
    (("--guidance-scale", "-1"), "guidance_scale -1.0; expected a finite number, 0 or more"),
    (("--guidance-interval", "900", "100"), "guidance_interval 900.0 to 100.0; expected the lower timestep first"),
    (("--guidance-interval", "nan", "100"), "guidance_interval's timestep nan; expected"),
    (("--width", "500"), "width 500 is not a multiple of 8; try 496 or 504"),
    (("--height", "500"), "height 500 is not a multiple of 8; try 496 or 504"),
    (("--width", "0"), "width 0; expected a whole number from 8"),
    (("--height", "-8"), "height -8; expected a whole number from 8"),
    (("--width", "7"), "width 7; expected a whole number from 8"),
    (("--width", str(8 * 10**12)), "width 8000000000000; expected a whole number from 8 to 65536"),
    (("--height", str(8 * 10**30)), "expected a whole number from 8 to 65536"),
    (("--seed", "-1"), "seed -1; for a drawn one, leave the seed out"),
    (("--seed", str(2**64)), "seed 18446744073709551616; expected a whole number from 0 to"),
    (("--seed", str(2**64 - 1), "--num-images", "2"), "seed 18446744073709551615"),
    (("--seed", str(2**64 - 5), "--num-images", "6"), "seed 18446744073709551611"),
    (("--num-images", "0"), "num_images 0; expected a whole number from 1"),
    (("--num-images", "-2"), "num_images -2; expected a whole number from 1"),
    (("--n_iter", "0"), "n_iter 0; expected 1 or more"),
    (("--batch-size", "0"), "batch_size 0; expected a whole number from 1"),
    (("--sampler", "magic"), "sampler 'magic'; expected one of ddim, ddpm"),
    (("--sampler", ""), "sampler ''; expected one of ddim, ddpm"),
    (("--sampler", "ddim Karras", "--spacing", "leading"), "name one spacing, not two"),
    (("--spacing", "wide"), "spacing 'wide'; expected one of "),
    (("--convention", "mine"), "convention 'mine'; expected one of ldm, diffusers, kdiffusion, compvis"),
    (("--convention", "compvis", "--sampler", "heun"), "convention 'compvis' has no heun sampler"),
    (("--sampler", "lcm", "--steps", "51"), "51 steps; a latent consistency model was distilled on 50"),
    (("--eta", "0.5"), "eta 0.5 with sampler pndm; only ddim takes eta"),
    (("--eta", "1.5", "--sampler", "ddim"), "eta 1.5; expected 0 to 1"),
    (("--eta", "nan", "--sampler", "ddim"), "eta nan; expected 0 to 1"),
    (("--tile", "10"), "tile 10; expected a whole number from 64"),
    (("--tile", "65"), "tile 65 is not a multiple of 8; try 64 or 72"),
    (("--dtype", "int8"), "dtype 'int8'; expected one of float32, bfloat16, float16, float64"),
    (("--device", "abacus"), "device 'abacus' cannot be used here"),
    (("--device", "cuda:99"), "device 'cuda:99' cannot be used here"),
    (("--device", "meta"), "device 'meta' cannot be used here"),
    (("--weights", "best"), "weights='best' chooses within a single file; this is a folder"),
    (("--tokenizer", "t5"), "tokenizer style 't5'; expected one of hf, openai"),
    (("--prompt", "another"), "2 prompts given; expected one of PROMPT, --prompt and --from-file"),
    (("--from-file", "/dev/null"), "2 prompts given; expected one of PROMPT, --prompt and --from-file"),
    (("--preview-every", "0"), "preview-every 0; expected 1 or more"),
    (("--preview", "/"), "preview / is a folder; expected the name of a PNG"),
    (("--preview", "/proc/none/a.png"), "/proc/none: nothing can be written there (No such file or directory)"),
    (("--negative-prompt", "caf\udce9"), "half a character (a lone surrogate) at position 3"),
]
FROM_IMAGE = [
    (("--strength", "1.5"), "strength 1.5; expected 0 to 1"),
    (("--strength", "-0.1"), "strength -0.1; expected 0 to 1"),
    (("--strength", "nan"), "strength nan; expected 0 to 1"),
    (("--posterior", "mean"), "posterior 'mean'; expected one of sample, mode"),
    (("--image", "/no.png"), "/no.png: cannot be read (No such file or directory)"),
    (("--image", "/"), "/: cannot be read (Is a directory)"),
    (("--image", "/dev/null"), "/dev/null: cannot be read as PNG, JPEG or WebP ("),
    (("--image", __file__), f"{__file__}: cannot be read as PNG, JPEG or WebP ("),
]
INPAINT = [
    (("--mask", "/no.png"), "/no.png: cannot be read (No such file or directory)"),
    (("--strength", "0"), "strength 0.0 of 25 steps leaves none to run; raise strength or steps"),
]


@pytest.mark.parametrize(("words", "expected"), ANYWHERE, ids=str)
def test_a_field_out_of_range_is_refused_in_one_line(command, tmp_path, words, expected):
    refused(command("txt2img", PROMPT, "--steps", "2", *words), tmp_path, expected)


@pytest.mark.parametrize(("words", "expected"), [*FROM_IMAGE, *ANYWHERE[:9]], ids=str)
def test_a_field_of_image_to_image_out_of_range_is_refused_in_one_line(command, tmp_path, picture, words, expected):
    refused(command("img2img", PROMPT, "--image", picture, *words), tmp_path, expected)


@pytest.mark.parametrize(("words", "expected"), [*FROM_IMAGE, *INPAINT, *ANYWHERE[:9]], ids=str)
def test_a_field_of_inpainting_out_of_range_is_refused_in_one_line(command, tmp_path, picture, mask, words, expected):
    refused(command("inpaint", PROMPT, "--image", picture, "--mask", mask, *words), tmp_path, expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps", "0"), "steps 0; expected"),
        (("--steps", "1001"), "1001 steps; expected 1 to 1000"),
        (("--sampler", "magic"), "sampler 'magic'; expected one of"),
        (("--spacing", "wide"), "spacing 'wide'; expected one of"),
        (("--convention", "mine"), "convention 'mine'; expected one of"),
        (("--strength", "nan"), "strength nan; expected 0 to 1"),
        (("--convention", "compvis", "--steps", "999"), "CompVis's grid has no 999 steps of 1000"),
        (("--convention", "compvis", "--steps", "50", "--strength", "1"), "CompVis's image-to-image has no strength 1"),
        (("--model", "/no.ckpt"), "/no.ckpt"),
    ],
    ids=str,
)
def test_a_field_of_the_schedule_out_of_range_is_refused_in_one_line(command, tmp_path, words, expected):
    refused(command("schedule", *words), tmp_path, expected)


@pytest.mark.parametrize(
    "words",
    [
        *(
            (),
            ("--steps", "2.5"),
            ("--steps", "many"),
            ("--guidance-scale", "high"),
            ("--seed", "0x10"),
            ("a prompt", "another"),
        ),
        *(("--precision", "half"), ("--guidance-interval", "1"), ("--unknown",), ("--width",)),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_answered_in_one_line_too(command, tmp_path, words):
    done = command(*(("txt2img", PROMPT, *words) if words else ("img2img", PROMPT)))  # that needs an image
    assert (done.status, done.out) == (2, "") and not (tmp_path / "out").exists()
    assert re.fullmatch(r"ldm( \w+)?: .*; see ldm \w+ --help", one_line(done.err.removesuffix("\n")))


def test_a_command_that_there_is_not_is_answered_with_those_there_are(command):
    for words in (("paint",), ("",)):
        done = command(*words, model=None)
        assert done.status == 2 and all(name in done.err for name in ("txt2img", "img2img", "inpaint", "replay", "schedule"))


def test_a_prompt_is_asked_for_and_a_model_that_has_no_name_is_refused(command, tmp_path):
    refused(command("txt2img", *SMALL), tmp_path, "0 prompts given; expected one of PROMPT, --prompt and --from-file")
    refused(command("txt2img", PROMPT, *SMALL, model=""), tmp_path, "--model names nothing; name a checkpoint, or leave it out")


def test_a_model_that_is_none_is_refused(command, tmp_path, picture):
    refused(command("txt2img", PROMPT, *SMALL, model="/no/model.ckpt"), tmp_path, "/no/model.ckpt")
    refused(command("txt2img", PROMPT, *SMALL, model="runwayml/stable"), tmp_path, "to fetch it from the hub, say hub:runwayml")
    refused(command("txt2img", PROMPT, *SMALL, model=picture), tmp_path, str(picture))
    refused(command("txt2img", PROMPT, *SMALL, model=tmp_path), tmp_path, str(tmp_path))


def test_what_is_refused_for_its_fields_makes_no_folder(command, tmp_path):
    refused(command("txt2img", PROMPT, "--steps", "0"), tmp_path)
    refused(command("img2img", PROMPT, "--image", "/no.png"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_fault_of_ours_is_not_hidden(command, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(ldm.pipelines.text_to_image, "txt2img", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        command("txt2img", PROMPT, *SMALL)


def test_debugging_shows_where_an_error_came_from(command):
    with pytest.raises(ValueError, match="steps 0"):
        command("txt2img", PROMPT, "--steps", "0", "--debug")


# -- Where nothing can be written


def test_an_unwritable_folder_is_refused_before_anything_is_made(command, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("a model was loaded")

    command("txt2img", PROMPT, *SMALL, out=tmp_path / "first")  # so that nothing is imported without rights
    monkeypatch.setattr(options, "load", fail)
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        (tmp_path / "file").write_text("mine")
        for folder, reason in (
            (name, "Permission denied"),
            (f"{name}/a", "Permission denied"),
            (tmp_path / "file", "File exists"),
        ):
            with contextlib.nullcontext() if reason == "File exists" else as_nobody():
                done = command("txt2img", PROMPT, *SMALL, out=folder)
            refused(done, tmp_path, f"{folder}: nothing can be written there ({reason}); name another folder with --out")
        assert os.listdir(name) == [] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("words", [(), ("--preview", "preview.png", "--preview-every", "1")], ids=["picture", "preview"])
def test_a_disk_that_fills_up_leaves_finished_pictures_and_no_part_of_one(command, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    small = command("txt2img", PROMPT, *SMALL, "--seed", "1", *words)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        done = command("txt2img", PROMPT, *SMALL, "--seed", "1", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert small.status == 0 and len(before) == len(words) // 4 + 1
    refused(done, tmp_path, "File too large", there=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# -- Processes


@pytest.fixture
def endless(tiny_native, tmp_path):
    """A run of more pictures than anybody waits for, with two of them made."""
    words = ("txt2img", PROMPT, "--model", tiny_native, "--out", tmp_path / "out", "-W", "16", "-H", "16", "--steps", "2")
    process = start(*words, "-q", "--seed", "1", "--num-images", "100000", "--batch-size", "2")
    with process:
        process.printed = [process.stdout.readline(), process.stdout.readline()]
        yield process
        process.kill()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_finished_pictures_and_no_part_of_one(endless, tmp_path, number, status):
    time.sleep(0.3)
    endless.send_signal(number)
    out, err = endless.communicate(timeout=30)
    paths = [Path(line) for line in ("".join(endless.printed) + out).splitlines()]
    found = sorted((tmp_path / "out").iterdir())
    assert endless.returncode == status and len(paths) >= 2
    assert found[: len(paths)] == paths and len(found) <= len(paths) + 1  # one may be there and not yet be printed
    for i, path in enumerate(found):
        assert path.name == f"{i:05}-{1 + i}.png" and files.read_receipt(path)["seed"] == 1 + i
    assert re.fullmatch(r"ldm: interrupted; (\d+) of 100000 pictures are in (.*)\n", err).groups() in [
        (str(count), str(tmp_path / "out")) for count in (len(found), len(found) - 1)
    ]


def test_who_reads_our_output_may_leave(endless, tmp_path):
    endless.stdout.close()
    assert endless.wait(30) == 1 and endless.stderr.read() == ""
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix != ".png"]


def test_a_process_says_one_line_too_and_takes_names_that_are_no_text(tiny_native, tmp_path):
    """With what only a process has: warnings of libraries, and a standard output of its own."""
    data = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    large = tmp_path / "large.png"
    large.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + bytes(12))
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    shared = (*SMALL, "--seed", "1", "--model", tiny_native)
    refusing = start("img2img", PROMPT, "--image", large, *shared, "--out", tmp_path / "out")
    writing = start("txt2img", PROMPT, *shared, "--out", folder, text=False)
    out, err = refusing.communicate(timeout=60)
    refused(Done(refusing.returncode, out, err), tmp_path, "large.png: ")
    assert writing.communicate(timeout=60) == (folder + b"/00000-1.png\n", b"") and writing.returncode == 0
    assert os.listdir(folder) == [b"00000-1.png"]
