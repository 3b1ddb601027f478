"""How a bad checkpoint is to be refused, and the making of bad ones: files put together by hand, sound or not."""

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
import weights_convert
from tests import seeded
from tests.checkpoints import SMALL
from weights_convert import CheckpointError
from weights_convert.__main__ import main
from weights_convert.naming import shapes

# A whole checkpoint as small as they come: a text encoder.
TEXT = {name: seeded.weight(name, shape) for name, shape in shapes(SMALL["text_encoder"], "transformers").items()}
NORM = "final_layer_norm.weight"
# Kinds of file, and what torch.save is told so as to write one.
CONTAINERS = {
    "safetensors": {},
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "legacy": {"_use_new_zipfile_serialization": False},
}
TARGETS = [("native", "out"), ("diffusers", "out"), ("compvis", "out.ckpt"), ("compvis", "out.safetensors")]


@contextlib.contextmanager
def as_nobody():
    """Without root's right to everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def one_line(error: object) -> str:
    message = str(error)
    assert message.isprintable() and len(message) < 1500, message
    return message


def refused(path: Path, *expected: str, opens: bool = False, **options) -> None:
    """All three borders refuse the path with one line that says what is expected, and write nothing.

    opens: the file is sound until its numbers are read.
    """
    before = sorted(path.parent.rglob("*"))
    for border in (ldm.load,) if opens else (ldm.load, weights_convert.read):
        with pytest.raises(CheckpointError) as caught:
            border(path, **options)
        message = one_line(caught.value)
        for text in (str(path)[:500], *expected):
            assert text in message, message
    if not options:
        assert convert(path, path.parent / "target", "native") == (1, message)
    assert sorted(path.parent.rglob("*")) == before


READ_ALL = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (400 << 20,) * 2)
import weights_convert
for path in sys.argv[1:]:
    start = time.monotonic()
    try:
        weights_convert.read(path)
    except weights_convert.CheckpointError as error:
        print(f"{time.monotonic() - start:.1f} {error}")
"""


def refused_cheaply(paths: list[Path]) -> None:
    """A process that may take 400 MB refuses them all, within seconds each."""
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        seconds, _, message = line.partition(" ")
        assert float(seconds) < 20 and one_line(message).startswith(str(path)), line


def convert(source: Path, target: Path, to: str) -> tuple[int, str]:
    """What the command returns, and the one line that it complains in."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main([str(source), str(target), "--to", to])
    assert errors.getvalue().startswith("error: ") and errors.getvalue().endswith("\n")
    return code, one_line(errors.getvalue()[len("error: ") : -1])


def read_or_refused(path: Path) -> None:
    """Read every number of the checkpoint, or be refused with one line: no third thing may happen."""
    try:
        for component in weights_convert.read(path).components.values():
            for name in component.tensors:
                float(component.tensors[name].double().sum())
    except CheckpointError as error:
        one_line(error)


def write(path: Path, state: dict, container: str = "safetensors") -> Path:
    save_file(state, path) if container == "safetensors" else torch.save(state, path, **CONTAINERS[container])
    return path


def raw(path: Path, header: object, data: bytes = bytes(64), length: int | None = None) -> Path:
    """A safetensors file as the parts say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive with these entries below its top folder."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"a/{name}", content)
    return path


def edit(path: Path, **fields) -> None:
    """Set fields of the JSON object in the file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
