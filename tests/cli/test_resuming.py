"""`--resume`: a run that knows what it is of, and makes what is not there yet."""

import json
import os
import shutil

import numpy as np
import pytest

from ldm.output import files
from tests.command_line import PICTURE, PROMPT, SMALL, refused

RUN = ("txt2img", PROMPT, *SMALL, "--num-images", "5", "--batch-size", "2", "--resume")


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_that_can_be_resumed_makes_the_same_pictures(command, tmp_path):
    plain = command(*RUN[:-1], "--seed", "7", out=tmp_path / "plain")
    done = command(*RUN, "--seed", "7")
    assert (done.status, done.err) == (0, "")
    assert done.paths == [tmp_path / "out" / f"0000{i}-{7 + i}.png" for i in range(5)]
    assert [path.read_bytes() for path in done.paths] == [path.read_bytes() for path in plain.paths]
    assert "run.json" in os.listdir(tmp_path / "out") and "run.json" not in os.listdir(tmp_path / "plain")


def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(command, tmp_path):
    out = tmp_path / "out"
    whole = command(*RUN, "--seed", "7").paths
    before, kept = contents(out), {path: path.stat().st_ino for path in (whole[0], whole[2], whole[4])}
    whole[1].unlink()  # half of a portion
    whole[3].write_bytes(before[whole[3].name][:-20])
    (out / ".x1y2.partial").write_bytes(b"of a process that was killed")
    (out / "notes.txt").write_text("not ours")
    done = command(*RUN, "--seed", "7")
    assert (done.status, done.paths) == (0, whole)
    assert contents(out) == before | {"notes.txt": b"not ours"}
    assert {path: path.stat().st_ino for path in kept} == kept


def test_a_stopped_run_goes_on(command, tmp_path, monkeypatch):
    undisturbed = command(*RUN, "--seed", "7", out=tmp_path / "undisturbed")
    save, written = files.save_as, []

    def stopping(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(save(*arguments))

    monkeypatch.setattr(files, "save_as", stopping)
    stopped = command(*RUN, "--seed", "7")
    assert (stopped.status, stopped.out) == (130, "")
    assert stopped.err == f"ldm: interrupted; the same command goes on in {tmp_path / 'out'}\n"
    monkeypatch.setattr(files, "save_as", save)
    assert len(written) == 3 and len(os.listdir(tmp_path / "out")) == 4
    assert command(*RUN, "--seed", "7").status == undisturbed.status == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_drawn_seed_is_kept(command, tmp_path):
    begun = command(*RUN)
    seed = json.loads((tmp_path / "out" / "run.json").read_text())["seed"]
    assert begun.err == f"seed {seed}\n"
    before = contents(tmp_path / "out")
    begun.paths[1].unlink()
    assert command(*RUN).paths == begun.paths and contents(tmp_path / "out") == before
    other = ("--seed", str(seed + 1))
    refused(command(*RUN, *other), tmp_path, f"seed {seed} and not {seed + 1}", there=6)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps", "3"), "holds a run with steps 2 and not 3; go on with those, or name another folder"),
        (("--guidance-scale", "2"), "guidance_scale 7.5 and not 2.0"),
        (("--batch-size", "3"), "batch_size 2 and not 3"),
        (("--num-images", "6"), "num_images 5 and not 6, total 5 and not 6"),
        (("--dtype", "float64"), 'dtype "float32" and not "float64"'),
        (("--width", "40"), "width 32 and not 40"),
    ],
    ids=str,
)
def test_another_run_in_the_same_folder_is_refused_in_one_line(command, tmp_path, words, expected):
    assert command(*RUN, "--seed", "7").status == 0
    refused(command(*RUN, "--seed", "7", *words), tmp_path, str(tmp_path / "out"), expected, there=6)


def test_other_prompts_another_picture_and_another_task_are_refused(command, tmp_path, picture):
    shared = ("--image", picture, "--steps", "2", "-q", "--seed", "7", "--resume")
    assert command("img2img", PROMPT, *shared).status == 0
    refused(command("img2img", "a sphere", *shared), tmp_path, "prompts_sha256", there=2)
    refused(command("txt2img", PROMPT, *SMALL, "--seed", "7", "--resume"), tmp_path, "image_sha256", there=2)
    PICTURE.transpose(0).save(picture)
    refused(command("img2img", PROMPT, *shared), tmp_path, "image_sha256", there=2)


def test_pictures_of_no_known_run_are_not_mixed_with(command, tmp_path):
    command("txt2img", PROMPT, *SMALL, "--seed", "7")
    refused(command(*RUN), tmp_path, "holds pictures, and no run.json", there=1)
    (tmp_path / "out" / "run.json").write_text("{")
    refused(command(*RUN), tmp_path, "run.json: cannot be read", there=2)
    (tmp_path / "out" / "run.json").write_text("[]")
    refused(command(*RUN), tmp_path, "run.json: is not the record of a run", there=2)


def test_what_is_refused_anywhere_is_refused_here(command, tmp_path):
    refused(command(*RUN, "--steps", "0"), tmp_path, "steps 0; expected")
    refused(command(*RUN, "--seed", str(2**64 - 2)), tmp_path, "for 5 images; expected at most")
    refused(command(*RUN, model="/no.ckpt"), tmp_path, "/no.ckpt")
    refused(command(*RUN, out="/proc/none"), tmp_path, "/proc/none: nothing can be written there")


def test_pictures_that_are_gone_at_the_end_are_counted(command, tmp_path, monkeypatch):
    save = files.save_as
    monkeypatch.setattr(files, "save_as", lambda *given: None if given[2].name == "00003-10.png" else save(*given))
    done = command(*RUN, "--seed", "7")
    expected = "1 of 5 pictures are missing or damaged (00003-10.png); the same command goes on"
    refused(done, tmp_path, expected, there=5)


def test_images_that_share_a_generator_are_resumed_prompt_by_prompt(command, tmp_path):
    (tmp_path / "prompts").write_text("a cube\na sphere\n")
    shared = ("txt2img", "--from-file", tmp_path / "prompts", *SMALL, "--convention", "diffusers", "--num-images", "2")
    plain = command(*shared, "--seed", "3", out=tmp_path / "plain")
    done = command(*shared, "--seed", "3", "--resume")
    assert [path.name for path in done.paths] == [path.name for path in plain.paths]
    assert [path.read_bytes() for path in done.paths] == [path.read_bytes() for path in plain.paths]
    shutil.copy(done.paths[0], done.paths[1])  # whole, and so left alone
    done.paths[2].unlink()
    again = command(*shared, "--seed", "3", "--resume")
    assert np.array_equal(again.pictures[2], plain.pictures[2]) and np.array_equal(again.pictures[1], plain.pictures[0])
