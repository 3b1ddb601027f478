"""What goes out with a picture: the text that galleries read, the receipt, and files that are whole or not there at all."""

import contextlib
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import ldm
from ldm.checkpoint import REQUIRED
from ldm.output import files
from ldm.output import receipt as receipts
from ldm.samplers import all_samplers
from tests import seeded
from tests.refusal import as_nobody, one_line

PROMPT = "a red cube on top of a blue sphere"
RECEIPT = {
    "format": 1,
    "task": "txt2img",
    "prompt": PROMPT,
    "negative_prompt": "",
    "steps": 25,
    "sampler": "euler_ancestral",
    "spacing": None,
    "guidance_scale": 7.5,
    "eta": 0.0,
    "seed": 1234,
    "width": 512,
    "height": 384,
    "model": {"name": "sd-v1-4", "fingerprint": "0123456789abcdef"},
    "tokenizer": "hf",
    "dtype": "float32",
    "device": "cpu",
    "versions": {"ldm": "0.1.0"},
}
FIELDS = "Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 1234, Size: 512x384, Model hash: 0123456789abcdef, Model: sd-v1-4"
PICTURE = Image.fromarray((seeded.values("picture", (96, 128, 3)).view(np.uint32) % 256).astype(np.uint8))  # about 36 kB
HOSTILE = {
    "lines": "a cube\n\non a\r\nsphere\n",
    "unicode": "куб 立方体 🧊 e\u0301 \u202e \u2028 \x85 \x1b[2J",
    "latin": "café à l'ÿ",
    "quotes": "\"a\" 'b' `c` \\ \\n {} <x:1> (red:1.5)",
    "NUL": "a\0b\0",
    "fields": "a cube, Steps: 5, Sampler: x\nSteps: 9, Seed: 1",
    "long": "a red cube " * 20_000,
    "empty": "",
    "blank": "  ",
    "half a character": "caf\udce9",
}


def receipt(**fields) -> dict:
    return {**RECEIPT, **fields}


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as opened:
        opened.load()
        return dict(opened.text)


def as_galleries_read(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields of a `parameters` text: its last line has "name: value" between commas, a value in
    quotation marks where it has commas itself; what stands above is the prompt and, from its mark on, the negative one."""
    above, _, last = text.rpartition("\n")
    pairs = re.findall(r'([A-Za-z][\w /-]*): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last)
    assert ", ".join(f"{name}: {value}" for name, value in pairs) == last
    prompt, _, negative = above.partition("\nNegative prompt: ")
    return prompt, negative, {name: json.loads(value) if value[:1] == '"' else value for name, value in pairs}


# -- The text that galleries read


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, f"{PROMPT}\n{FIELDS}, Version: ldm 0.1.0"),
        ({"negative_prompt": "blurry"}, f"{PROMPT}\nNegative prompt: blurry\n{FIELDS}, Version: ldm 0.1.0"),
        ({"strength": 0.75}, f"{PROMPT}\n{FIELDS}, Denoising strength: 0.75, Version: ldm 0.1.0"),
        ({"strength": 0.0}, f"{PROMPT}\n{FIELDS}, Denoising strength: 0.0, Version: ldm 0.1.0"),
        ({"prompt": ""}, f"\n{FIELDS}, Version: ldm 0.1.0"),
    ],
)
def test_the_parameters_are_as_the_web_interface_writes_them(fields, expected):
    assert receipts.parameters(receipt(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"spacing": "karras"}, "Schedule type", "Karras"),
        ({"sampler": "ddim", "eta": 0.5}, "Eta", "0.5"),
        ({"guidance_scale": 0.0}, "CFG scale", "0"),
        ({"guidance_scale": 12.25}, "CFG scale", "12.25"),
        ({"seed": 0}, "Seed", "0"),
        ({"seed": 2**64 - 1}, "Seed", str(2**64 - 1)),
    ],
)
def test_a_field_is_in_the_parameters_as_it_was_given(fields, name, expected):
    assert as_galleries_read(receipts.parameters(receipt(**fields)))[2][name] == expected


@pytest.mark.parametrize("name", ["a,b", "a, Seed: 5", "a\nb", "a: b", '"a"', "ä 立 'b'", "caf\udce9", " a "])
def test_no_name_of_a_model_can_add_a_field_or_a_line(tmp_path, name):
    path = files.save(PICTURE, receipt(model={"name": name, "fingerprint": "f"}), tmp_path)
    prompt, negative, fields = as_galleries_read(texts(path)["parameters"])
    assert (prompt, negative, fields["Seed"], fields["Model hash"]) == (PROMPT, "", "1234", "f")
    assert list(fields)[-2:] == ["Model", "Version"] and files.read_receipt(path)["model"]["name"] == name


@pytest.mark.parametrize("sampler", sorted(all_samplers()))
def test_every_sampler_has_a_label_that_names_it_again(sampler):
    label = as_galleries_read(receipts.parameters(receipt(sampler=sampler)))[2]["Sampler"]
    assert sampler == ldm.samplers.find(label).NAME


@pytest.mark.parametrize("negative", ["", "blurry,\nugly"])
@pytest.mark.parametrize("prompt", HOSTILE.values(), ids=HOSTILE)
def test_any_prompt_comes_back_from_the_file(tmp_path, prompt, negative):
    made = receipt(prompt=prompt, negative_prompt=negative)
    path = files.save(PICTURE, made, tmp_path)
    assert files.read_receipt(path) == made
    legible = prompt.replace("\0", "").encode(errors="replace").decode()
    read_prompt, read_negative, fields = as_galleries_read(texts(path)["parameters"])
    assert (read_prompt, read_negative, fields["Seed"]) == (legible, negative, "1234")


# -- The receipt


def test_a_receipt_and_its_picture_come_back_from_the_file(tmp_path):
    numbers = {"guidance_scale": 0.1 + 0.2, "eta": 5e-324, "seed": 2**64 - 1, "guidance_interval": [0.0, 1e308], "tile": None}
    made = receipt(**numbers, prompts=["a", "b"], posterior="sample", paste=False)
    path = files.save(PICTURE, made, tmp_path)
    assert files.read_receipt(str(path)) == made
    with Image.open(path) as opened:
        assert opened.mode == "RGB" and np.array_equal(np.array(opened), np.array(PICTURE))


def test_the_receipt_of_a_run_comes_back_from_the_file(tmp_path, tiny_native):
    components = ldm.load(tiny_native)
    result = ldm.txt2img(components, HOSTILE["quotes"], steps=1, width=32, height=24, guidance_interval=(0, 500), seed=3)
    path = files.save(result.images[0], result.receipts[0], tmp_path)
    assert files.read_receipt(path) == json.loads(json.dumps(result.receipts[0]))
    found = ldm.replay(components, files.read_receipt(path))
    assert found.same and not found.changes and np.array_equal(np.array(found.image), np.array(result.images[0]))


def with_text(path: Path, text: str | None) -> Path:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text("ldm", text)
    PICTURE.save(path, pnginfo=info)
    return path


def edited(**fields) -> str:
    return json.dumps(receipt(**fields))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "carries no receipt; expected a PNG written by ldm and not saved anew by another program"),
        *(("", "its receipt is not JSON"), ("{", "its receipt is not JSON"), (edited()[:-5], "its receipt is not JSON")),
        ("[" * 100_000, "its receipt is not JSON"),
        (f'{{"format": {"1" * 5000}}}', "its receipt is not JSON"),
        *((text, "its receipt has no format; expected one written by ldm") for text in ("[]", "{}", "null", '"a"', "3")),
        (edited(format=2), "its receipt has format 2; this version reads 1"),
        (edited(format="1"), "its receipt has format '1'; expected one written by ldm"),
        (json.dumps({k: v for k, v in RECEIPT.items() if k != "seed"}), "its receipt has no seed; expected one written by ldm"),
        (edited(seed="1"), "its receipt has seed '1'; expected one written by ldm"),
        (edited(task=["txt2img"]), "its receipt has task ['txt2img']; expected"),
        (edited(prompt=None), "its receipt has prompt None; expected"),
        (edited(width=1.5), "its receipt has width 1.5; expected"),
        (edited(model="sd"), "its receipt has model 'sd'; expected"),
        (edited(versions=[]), "its receipt has versions []; expected"),
        *((edited(**{name: 5}), f"its receipt has {name} 5; expected") for name in ("dtype", "device", "tokenizer", "sampler")),
        (edited(dtype=["x" * 10_000]), "its receipt has dtype ['xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_or_foreign_receipt_is_refused_in_one_line(tmp_path, text, expected):
    path = with_text(tmp_path / "a.png", text)
    with pytest.raises(ValueError) as caught:
        files.read_receipt(path)
    assert one_line(caught.value).startswith(f"{path}: {expected}")


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(sorted(RECEIPT)), ANY_JSON, max_size=2) | ANY_JSON)
def test_whatever_a_receipt_says_it_is_read_or_refused(changes):
    text = json.dumps({**RECEIPT, **changes} if isinstance(changes, dict) else changes)
    try:
        found = receipts.from_json(text, "a.png")
    except ValueError as error:
        assert one_line(error).startswith("a.png: its receipt ")
    else:
        assert json.dumps(found) == text


@pytest.mark.parametrize("kind", ["empty", "text", "half", "JPEG", "missing", "folder", "bomb"])
def test_what_is_no_png_has_no_receipt(tmp_path, kind):
    path = tmp_path / "a.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", 2_000_000, 2_000_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    if kind in ("half", "JPEG"):
        PICTURE.save(path, "PNG" if kind == "half" else "JPEG")
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"a red cube", "bomb": bomb}[kind])
    with pytest.raises(ValueError) as caught:
        files.read_receipt(path)
    assert one_line(caught.value).startswith(f"{path}: cannot be read as PNG (")


def test_a_picture_saved_anew_by_another_program_carries_none(tmp_path):
    path = files.save(PICTURE, RECEIPT, tmp_path)
    with Image.open(path) as opened:
        opened.convert("RGB").save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="carries no receipt"):
        files.read_receipt(tmp_path / "b.png")


# -- Numbers


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([], "00000-1234.png"),
        (["00000-1.png"], "00001-1234.png"),
        (["00000-1.png", "00007-1.png", "00003-9.png"], "00008-1234.png"),
        (["00004.png"], "00005-1234.png"),
        (["00004-a b-c.png"], "00005-1234.png"),
        (["99999-1.png"], "100000-1234.png"),
        (
            ["00100-1.jpg", "x00100-1.png", "0100-1.png", "00100-1.png.txt", "00100x.png", "grid.png", ".00100-1.png"],
            "00000-1234.png",
        ),
        (["00003-1.png/"], "00004-1234.png"),
    ],
    ids=str,
)
def test_a_picture_takes_the_number_after_the_highest(tmp_path, there, expected):
    for name in there:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("mine")
    assert files.save(PICTURE, RECEIPT, tmp_path) == tmp_path / expected
    assert sorted(os.listdir(tmp_path)) == sorted([*(name.rstrip("/") for name in there), expected])
    assert all((tmp_path / name).read_text() == "mine" for name in there if not name.endswith("/"))


def test_a_missing_folder_is_made(tmp_path):
    path = files.save(PICTURE, RECEIPT, str(tmp_path / "a" / "b"))
    assert path == tmp_path / "a" / "b" / "00000-1234.png" and files.read_receipt(path) == RECEIPT


def write_several(folder: Path, writer: int, count: int, start) -> None:
    start.wait()
    for i in range(count):
        files.save(PICTURE, receipt(prompt=f"{writer} {i}"), folder)


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_writers_in_several_processes_never_overwrite_one_another(tmp_path, monkeypatch, links):
    def no_link(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    writers = [context.Process(target=write_several, args=(tmp_path, writer, 12, start)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == [f"{i:05}-1234.png" for i in range(48)]
    prompts = [files.read_receipt(path)["prompt"] for path in tmp_path.iterdir()]
    assert sorted(prompts) == sorted(f"{writer} {i}" for writer in range(4) for i in range(12))


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_a_picture_is_as_for_every_other_file(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        path = files.save(PICTURE, RECEIPT, tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == expected


# -- Whole or not at all


@contextlib.contextmanager
def full_disk():
    """Files end at 10 kB, less than a picture takes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def save(folder: Path) -> Path:
    return files.save(PICTURE, RECEIPT, folder)


def save_as(folder: Path) -> Path:
    return files.save_as(PICTURE, None, folder / "preview.png")


@pytest.mark.parametrize("write", [save, save_as])
def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path, write):
    (tmp_path / "preview.png").write_text("mine")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert files.read_receipt(save(tmp_path)) == RECEIPT


@pytest.mark.parametrize("write", [save, save_as])
def test_a_folder_that_nothing_can_be_written_into_stays_as_it_is(write):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "preview.png").write_text("mine")
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(PermissionError):
            write(folder)
        folder.chmod(0o755)
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("write", [save, save_as])
def test_a_file_where_the_folder_should_be_is_left_alone(tmp_path, write):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OSError):
        write(tmp_path / "a")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("write", "moment"),
    [
        *((save, moment) for moment in ("fsync", "chmod", "link")),
        *((save_as, moment) for moment in ("fsync", "chmod", "replace")),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, write, error, moment):
    def interrupt(*_, **__):
        assert [path.suffix for path in tmp_path.iterdir() if path.name[0] == "."] == [".partial"]
        raise error

    (tmp_path / "preview.png").write_text("mine")
    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(error):
        write(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_links_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError):
        save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_picture_under_a_given_name_replaces_the_one_before(tmp_path):
    first, second = PICTURE, PICTURE.transpose(Image.Transpose.ROTATE_180)
    for picture, given_receipt in ((first, None), (second, RECEIPT)):
        path = files.save_as(picture, given_receipt, str(tmp_path / "preview"))
        with Image.open(path) as opened:
            assert opened.format == "PNG" and np.array_equal(np.array(opened), np.array(picture))
    assert os.listdir(tmp_path) == ["preview"] and files.read_receipt(path) == RECEIPT


# -- Hashes


@pytest.fixture(scope="module")
def models(tiny_native) -> dict[str, dict]:
    """The tiny model in several precisions, by their names."""
    loaded = {str(dtype): ldm.load(tiny_native, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    return {name: {kind: getattr(model, kind) for kind in REQUIRED} for name, model in loaded.items()}


def test_a_model_has_one_fingerprint_in_every_precision(models):
    found = {receipts.fingerprint(modules) for modules in models.values()}
    assert len(found) == 1 and re.fullmatch("[0-9a-f]{16}", found.pop())


def test_other_weights_have_another_fingerprint(models):
    modules = models["torch.float32"]
    before = receipts.fingerprint(modules)
    found = {before}
    for seed in range(5):
        components = ldm.build("tiny", seed=seed)
        found.add(receipts.fingerprint({kind: getattr(components, kind) for kind in REQUIRED}))
    assert len(found) == 6
    bias = modules["unet"].conv_out.bias
    kept = bias.clone()
    bias[0] += 0.5
    assert receipts.fingerprint(modules) not in found
    bias.copy_(kept)
    assert receipts.fingerprint(modules) == before


def test_weights_in_other_places_have_another_fingerprint():
    a, b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    swapped = receipts.fingerprint({"a": b, "b": a})
    assert receipts.fingerprint({"a": a, "b": b}) == receipts.fingerprint({"b": b, "a": a}) != swapped
    wide, tall = torch.nn.Linear(2, 8, bias=False), torch.nn.Linear(8, 2, bias=False)
    tall.weight.data = wide.weight.data.reshape(2, 8)
    assert receipts.fingerprint({"a": wide}) != receipts.fingerprint({"a": tall})


def test_a_fingerprint_of_many_weights_takes_no_time(models):
    large = torch.nn.Linear(4096, 4096)
    start = time.monotonic()
    receipts.fingerprint({**models["torch.float32"], "large": large})
    assert time.monotonic() - start < 0.5


def test_a_pictures_hash_is_of_its_pixels_and_its_size_alone(tmp_path):
    path = files.save(PICTURE, RECEIPT, tmp_path)
    other = PICTURE.copy()
    other.putpixel((5, 5), tuple(value ^ 1 for value in other.getpixel((5, 5))))
    with Image.open(path) as opened:
        assert receipts.picture_hash(opened) == receipts.picture_hash(PICTURE) != receipts.picture_hash(other)
    assert receipts.picture_hash(Image.new("L", (4, 2), 9)) == receipts.picture_hash(Image.new("RGB", (4, 2), (9,) * 3))
    assert receipts.picture_hash(Image.new("RGB", (4, 2))) != receipts.picture_hash(Image.new("RGB", (2, 4)))


def test_a_tensors_hash_is_of_its_values_and_its_shape_alone():
    x = seeded.tensor("x", 2, 3, 4)
    assert receipts.tensor_hash(x) == receipts.tensor_hash(x.double()) == receipts.tensor_hash(x.mT.contiguous().mT)
    assert len({receipts.tensor_hash(y) for y in (x, x.mT, x.reshape(3, 2, 4), x + 1e-6)}) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["mkstemp", "fsync", "link", "unlink"])
def test_a_signal_in_the_middle_of_writing_waits_until_the_file_is_whole(tmp_path, monkeypatch, number, moment):
    """It comes through afterwards, to whom it was meant for."""
    home = tempfile if moment == "mkstemp" else os
    original, heard = getattr(home, moment), []

    def interrupted(*arguments, **options):
        signal.raise_signal(number)
        return original(*arguments, **options)

    before = signal.signal(number, lambda *_: heard.append(sorted(path.name for path in tmp_path.iterdir())))
    try:
        monkeypatch.setattr(home, moment, interrupted)
        path = files.save(PICTURE, receipt(seed=5), tmp_path)
        monkeypatch.undo()
    finally:
        signal.signal(number, before)
    assert heard == [["00000-5.png"]] and files.read_receipt(path)["seed"] == 5
