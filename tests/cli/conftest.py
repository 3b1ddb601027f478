"""Fixtures of the command line: commands run in this process, with a model loaded once."""

import functools
from pathlib import Path

import pytest
from PIL import Image

from ldm import checkpoint
from ldm.cli import options, run
from tests.command_line import PICTURE, Done


@pytest.fixture(scope="module")
def load_once():
    return functools.lru_cache(checkpoint.load)


@pytest.fixture
def command(tiny_native, tmp_path, capsys, monkeypatch, load_once):
    """Run `ldm` with these words; the tiny model and a folder for pictures are named where they make pictures."""
    monkeypatch.setattr(checkpoint, "load", load_once)
    monkeypatch.delenv(options.MODEL_VARIABLE, raising=False)

    def ldm_(*words: object, model: object = tiny_native, out: object = tmp_path / "out") -> Done:
        line = [str(word) for word in words]
        if line[0] not in ("schedule", "inspect") and model is not None:
            line += ["--model", str(model)]
        if line[0] in ("txt2img", "img2img", "inpaint") and out is not None:
            line += ["--out", str(out)]
        capsys.readouterr()
        try:
            status = run(line)
        except SystemExit as stop:  # argparse
            status = stop.code
        return Done(status, *capsys.readouterr())

    return ldm_


@pytest.fixture
def picture(tmp_path) -> Path:
    PICTURE.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path) -> Path:
    made = Image.new("L", PICTURE.size, 0)
    made.paste(255, (8, 8, 24, 16))
    made.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"
