"""`--fast`: the same pictures, and receipts that tell of it."""

import numpy as np

from tests import lora_files
from tests.command_line import PROMPT, SMALL, refused


def test_fast_makes_the_same_picture_and_replay_makes_it_fast_again(command):
    plain, fast = (command("txt2img", PROMPT, *SMALL, "--seed", "3", *more) for more in ((), ("--fast",)))
    assert "acceleration" not in plain.receipts[0] and fast.receipts[0]["acceleration"]["winograd"] == "auto"
    assert np.abs(plain.pictures[0].astype(int) - fast.pictures[0]).max() <= 1
    replayed = command("replay", fast.paths[0], "-q", out=None)
    assert (replayed.status, replayed.out) == (0, "the same, pixel for pixel\n"), replayed


def test_loras_are_refused_with_it(command, tmp_path):
    file = lora_files.kohya(tmp_path / "style.safetensors")
    refused(command("txt2img", PROMPT, *SMALL, "--fast", "--lora", str(file)), tmp_path, "leave --fast out")


def test_commands_that_look_into_a_model_have_no_such_option(command, tmp_path):
    done = command("precision", "--fast")
    assert done.status == 2 or "unrecognized arguments: --fast" in done.err


def test_approximations_are_options_of_fast_which_replay_repeats(command, tmp_path):
    refused(command("txt2img", PROMPT, *SMALL, "--cache-steps", "2"), tmp_path, "--cache-steps is for --fast")
    refused(command("txt2img", PROMPT, *SMALL, "--fast", "--merge-tokens", "2"), tmp_path, "merge_tokens 2.0; expected a share")
    made = command("txt2img", PROMPT, *SMALL, "--fast", "--cache-steps", "2", "--seed", "3")
    assert made.receipts[0]["acceleration"]["cache_steps"] == 2
    replayed = command("replay", made.paths[0], "-q", out=None)
    assert (replayed.status, replayed.out) == (0, "the same, pixel for pixel\n"), replayed
