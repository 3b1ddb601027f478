"""`ldm trace` and `ldm diff`."""

import json

import pytest

from ldm.numerics.traces import Trace
from tests.command_line import PROMPT

RUN = ("--seed", "1", "--steps", "2", "--sampler", "ddim", "-W", "32", "-H", "32", "-q")


@pytest.fixture
def pair(command, tmp_path):
    """The same run twice."""
    for name in "ab":
        assert command("trace", PROMPT, "-o", tmp_path / name, *RUN).status == 0
    return tmp_path / "a", tmp_path / "b"


def test_a_run_is_traced_and_told_of_in_a_line(command, tmp_path):
    made = command("trace", PROMPT, "-o", tmp_path / "a", *RUN, "-n", "dull", "--guidance-scale", "2")
    trace = Trace(tmp_path / "a")
    assert made.out == f"{tmp_path / 'a'}: {len(trace.keys)} tensors of 2 calls of the network, seed 1\n" and made.err == ""
    run = trace.about["run"]
    assert (run["prompt"], run["sampler"], run["negative_prompt"], run["width"]) == (PROMPT, "ddim", "dull", 32)


def test_what_is_traced_can_be_chosen(command, tmp_path):
    command("trace", PROMPT, "-o", tmp_path / "a", *RUN, "--only", "unet.down.*.conv1", "--only", "sampler.x")
    names = {key.name for key in Trace(tmp_path / "a").keys}
    given = {"unet.x", "unet.t", "unet.context", "text_encoder.ids", "autoencoder.latents"}
    assert "sampler.x" in names and given <= names
    assert all(name in given or name == "sampler.x" or name.endswith(".conv1") for name in names)
    command("trace", PROMPT, "-o", tmp_path / "b", *RUN, "--blocks")
    names = {key.name for key in Trace(tmp_path / "b").keys}
    assert {
        "unet.down.0",
        "unet.middle",
        "unet.up.0",
        "sampler.eps",
        "picture",
    } <= names and "unet.down.0.residual" not in names


def test_traces_of_the_same_are_the_same(command, pair):
    for options in ({}, {"model": None}):
        done = command("diff", *pair, **options)
        assert done.status == 0 and "the same, but for rounding" in done.out and "past tolerance" not in done.out


def test_a_difference_is_located_and_the_status_tells(command, pair, tmp_path):
    command("trace", PROMPT, "-o", tmp_path / "c", *RUN, "--guidance-scale", "5")
    for options in ({}, {"model": None}):
        done = command("diff", pair[0], tmp_path / "c", **options)
        assert done.status == 3 and len(done.out.splitlines()) < 24
        assert "first past tolerance: sampler.eps, call 0" in done.out
        assert "the guidance scale is 5, where it should be 7.5" in done.out
    assert "wrong by itself: sampler.eps, call 0" in command("diff", pair[0], tmp_path / "c").out
    table = command("diff", pair[0], tmp_path / "c", "--table").out.splitlines()
    assert len(table) > len(Trace(pair[0]).keys) and any(
        line.startswith("sampler.eps, call 0") and "*" in line for line in table
    )
    found = json.loads(command("diff", pair[0], tmp_path / "c", "--json").out)
    assert found["first"]["key"] == {"name": "sampler.eps", "call": 0, "repeat": 0} and len(found["rows"]) > 500
    assert command("diff", pair[0], tmp_path / "c", "--tolerance", "10", model=None).status == 0


@pytest.mark.reference
def test_a_plot_is_drawn(command, pair, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    done = command("diff", *pair, "--plot", tmp_path / "a.png")
    assert done.status == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    done = command("diff", *pair, "--plot", tmp_path / "a.jpg")
    assert (done.status, done.err) == (1, f"ldm: plot {tmp_path / 'a.jpg'}; expected the name of a PNG\n")
    done = command("diff", *pair, "--plot", tmp_path / "no" / "a.png")
    assert done.status == 1 and f"there is no folder {tmp_path / 'no'}; create it first\n" in done.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("trace", PROMPT, "-o", "OUT", "--num-images", "2"), "several pictures; a trace is of one"),
        (("trace", "-o", "OUT"), "0 prompts given"),
        (("trace", PROMPT, "-o", "OUT/a/b"), "there is no folder"),
        (("trace", PROMPT, "-o", "."), "exists already"),
        (("trace", PROMPT, "-o", "OUT", "--steps", "0"), "steps 0"),
        (("trace", "a (cat", "--compel", "-o", "OUT"), "position 3: the bracket is not closed"),
        (("diff", "OUT", "OUT"), "there is no such folder"),
        (("diff", ".", "."), "has no manifest.json"),
        (("diff", "OUT", "OUT", "--tolerance", "-1"), "tolerance -1.0; expected a number from 0"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_and_leaves_nothing(command, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    done = command(*(word.replace("OUT", str(tmp_path / "out")) for word in words))
    assert done.status == 1 and done.out == "" and len(done.err.splitlines()) == 1 and expected in done.err
    assert not (tmp_path / "out").exists() and not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


def test_the_precision_report_is_a_table_or_json(command):
    done = command("precision", "--no-peers", "--size", "32")
    lines = done.out.splitlines()
    assert done.status == 0 and lines[0].startswith("variant") and any(line.startswith("bfloat16   ") for line in lines)
    for line in command("precision", "--no-peers", "--size", "32", "--json").out.splitlines():
        found = json.loads(line)
        assert found["output"] > 0 and found["parts"]
    for words, expected in (
        (("--t", "1000"), "t 1000"),
        (("--size", "12"), "size 12"),
        (("--dtype", "float32"), "of every type"),
    ):
        done = command("precision", *words)
        assert done.status == 1 and expected in done.err and len(done.err.splitlines()) == 1


def test_a_model_that_is_not_known_is_told_so(command):
    done = command("verify")
    assert done.status == 4 and "none of the known checkpoints" in done.out and done.out.count("not applicable") == 8
    done = command("verify", "--as", "v2")
    assert done.status == 1 and done.err == "ldm: version 'v2'; expected one of v1-1, v1-2, v1-3, v1-4, v1-5\n"
