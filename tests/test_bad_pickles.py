"""Hostile pickles and archives: none runs, none is believed about its sizes, and none costs much memory or time.

Each stands where a checkpoint's pickle would, in an archive of torch.save's and in a file of its older kind.
"""

import copyreg
import pickle
import pickletools
import shlex
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weights_convert
from tests.refusal import TEXT, archive, read_or_refused, refused, refused_cheaply, write
from weights_convert.containers.torch_file import LEGACY_MAGIC, MAX_DIRECTORY_BYTES


def contained(path: Path, container: str, program: bytes, storages: tuple[bytes, ...] = ()) -> Path:
    """A file of torch.save's in which `program` is the pickle of the data, and "0", "1", ... are storages."""
    if container == "zip":
        return archive(path, {"data.pkl": program, **{f"data/{key}": data for key, data in enumerate(storages)}})
    numbers = b"".join(struct.pack("<Q", len(data) // 4) + data for data in storages)
    keys = [str(key) for key in range(len(storages))]
    before = LEGACY_MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    path.write_bytes(before + program + pickle.dumps(keys, 2) + numbers)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)


def tensor(shape: list[int], strides: list[int], offset: int = 0, length: int = 4) -> bytes:
    """A state dict with the tensor "a": a window on storage "0" of `length` float32 numbers."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(length) + b"tQ"
    sides = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
    return b"\x80\x02}" + text("a") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sides + b"\x89)tRs."


# -- Code


def programs(sentinel: Path) -> dict[str, bytes]:
    """Pickles that make the file `sentinel` when Python's own unpickler reads them, one for each way of naming a function."""
    command = f"V{shlex.join(['touch', str(sentinel)])}\n".encode()
    opening, arguments = f"Vopen({str(sentinel)!r}, 'w')\n".encode(), text("touch") + text(str(sentinel))
    return {
        "GLOBAL os.system": b"cos\nsystem\n(" + command + b"tR.",
        "GLOBAL builtins.eval": b"cbuiltins\neval\n(" + opening + b"tR.",
        "GLOBAL of Python 2": b"c__builtin__\neval\n(" + opening + b"tR.",
        "STACK_GLOBAL subprocess": b"\x80\x04" + text("subprocess") + text("call") + b"\x93](" + arguments + b"e\x85R.",
        "STACK_GLOBAL through an attribute": b"\x80\x04" + text("torch") + text("os.system") + b"\x93(" + command + b"tR.",
        "INST": b"(" + command + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + command + b"o.",
        "EXT1": b"\x80\x02\x82\xf0(" + command + b"tR.",
        "EXT2": b"\x80\x02\x83\xf0\x00(" + command + b"tR.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00(" + command + b"tR.",
        "a memo": b"cos\nsystem\np0\n0(" + command + b"tp1\n0g0\ng1\nR.",
        "an attribute of an attribute": b"cbuiltins\ngetattr\n(ctyping\nAny\nV__class__\ntRcos\nsystem\n(" + command + b"tR.",
        "an inner key": b"\x80\x02}" + text("state_dict") + b"}" + text("a") + b"cos\nsystem\n(" + command + b"tRss.",
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", programs(Path("x")))
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, name, container):
    sentinel = tmp_path / "was run"
    program = programs(sentinel)[name]
    (tmp_path / "in").mkdir()
    refused(contained(tmp_path / "in" / "a.ckpt", container, program), "refused, nothing was run")
    assert not sentinel.exists()
    copyreg.add_extension("os", "system", 0xF0)
    try:
        pickle.loads(program)  # the threat is real
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert sentinel.exists()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_function_that_is_known_by_name_only_is_never_called(tmp_path, container):
    """`codecs.encode` and the like are let pass, since numpy leaves them in checkpoints; what they would make is not made."""
    program = b"\x80\x02}" + text("a") + b"c_codecs\nencode\n(Vx\nVno such codec\ntRs."
    refused(contained(tmp_path / "a.ckpt", container, program), "holds no tensors; its keys are a")


# -- Sizes

LIST = (
    b"\x80\x02]q\x00" + (b"(" + b"N" * 10_000 + b"e") * 10 + b"ctorch\nSize\nq\x01"
)  # 100,000 items, to be copied by torch.Size
KEYS = [b"(" + b"".join(number(k * (2**61 - 1)) + b"N" for k in range(i, i + 9_000)) + b"u" for i in range(1, 90_000, 9_000)]
COSTLY = {
    "tuples of tuples of tuples": b"\x80\x02)q\x000" + (b"(" + b"h\x00" * 9 + b"tq\x000") * 60 + b"h\x00.",
    "a deep tuple": b"\x80\x02)" + b"\x85" * 500_000 + b".",
    "a deep list": b"\x80\x02]q\x000" + b"]h\x00aq\x000" * 200_000 + b"h\x00.",
    "a deep stack": b"\x80\x02" + b"]" * 1_000_000 + b".",
    "marks within marks": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary in itself": b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s.",
    "millions of dictionaries": b"\x80\x04" + b"}\x940" * 5_000_000 + b"N.",
    "millions of instructions": b"\x80\x02" + b"N0" * 8_000_000 + b"N.",
    "memo entry 2,147,483,647": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a memo entry of a thousand digits": b"}p" + b"9" * 1000 + b"\n.",
    "a number of millions of bytes": b"\x80\x02\x8b" + struct.pack("<i", 8_000_000) + b"\x7f" * 8_000_000 + b".",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "text longer than the file": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"x.",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b"N.",
    "a list copied again and again": LIST + b"h\x01h\x00\x85R0" * 50_000 + b".",
    "a list copied and kept": LIST + b"h\x01h\x00\x85R" * 10_000 + b".",
    "keys of one hash": b"\x80\x02}" + b"".join(KEYS) + b".",
    "a tensor of 9,000 dimensions": tensor([2**62] * 9_000, [2**62] * 9_000),
    "a pickle larger than any": b"\x80\x02" + b"N0" * (9 << 20) + b".",
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_no_pickle_takes_much_memory_or_time(tmp_path, container):
    refused_cheaply([contained(tmp_path / f"{name}.ckpt", container, program) for name, program in COSTLY.items()])


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (tensor([5], [1]), "tensor a [5] needs 20 bytes, its storage has 16"),
        (tensor([2, 2], [3, 1]), "tensor a [2, 2] needs 20 bytes, its storage has 16"),
        (tensor([1], [1], offset=4), "tensor a [1] needs 20 bytes, its storage has 16"),
        (tensor([0], [1], offset=2**62), "its storage has 16"),
        (tensor([2**40], [0]), "tensor a [1099511627776] needs 4,398,046,511,104 bytes, its storage has 16"),
        (tensor([4], [-1], offset=3), "a tensor of shape (4,), strides (-1,) and offset 3"),
        (tensor([-4], [1]), "a tensor of shape (-4,), strides (1,) and offset 0"),
        (tensor([2**64], [1]), "a tensor of shape (18446744073709551616,)"),
        (tensor([4], [1, 1]), "a tensor of shape (4,), strides (1, 1) and offset 0"),
        (tensor([1] * 9, [1] * 9), "a tensor of shape (1, 1, 1, 1, 1, 1, ...)"),
    ],
)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_tensor_reaching_out_of_its_storage_is_refused(tmp_path, container, program, expected):
    refused(contained(tmp_path / "a.ckpt", container, program, (bytes(16),)), expected)


@pytest.mark.parametrize(
    ("container", "storages", "expected"),
    [
        ("zip", (), "tensor a needs storage 0, which the file does not have"),
        ("legacy", (), "tensor a needs storage 0, which the file does not have"),
        ("zip", (bytes(16),), "tensor a [8] needs 32 bytes, its storage has 16"),
        ("legacy", (bytes(16),), "storage 0 has 4 numbers; expected 8"),
        ("legacy", (bytes(32), bytes(16)), "whose storage 1 nothing refers to"),
    ],
)
def test_a_storage_missing_or_of_another_size_is_refused(tmp_path, container, storages, expected):
    refused(contained(tmp_path / "a.ckpt", container, tensor([8], [1], length=8), storages), expected)


@pytest.mark.parametrize("padding", range(4))
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_tensors_of_one_storage_take_no_more_memory_than_the_file(tmp_path, container, padding):
    """Each is a view, or, where the storage begins at an odd byte of the file, a copy of its own numbers and no others."""
    whole, state, begin = torch.cat([one.flatten() for one in TEXT.values()]), {"padding": "x" * padding}, 0
    for name, one in TEXT.items():
        state[name] = whole[begin : begin + one.numel()].view(one.shape)
        begin += one.numel()
    path = write(tmp_path / "a.ckpt", state, container)
    component = weights_convert.read(path).components["text_encoder"]
    found = {component.tensors.foreign_name(name): one for name, one in component.tensors.items()}
    assert all(torch.equal(found[name], TEXT[name]) for name in TEXT)
    assert sum(one.untyped_storage().nbytes() for one in found.values()) <= path.stat().st_size


# -- Archives

EMPTY = {"data.pkl": b"\x80\x02}."}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({**EMPTY, "constants.pkl": b""}, "a TorchScript program, not a checkpoint; load it with torch.jit.load"),
        ({"image.png": b""}, "a zip archive without the data.pkl that torch.save writes"),
        ({**EMPTY, "byteorder": b"big"}, "written on a big-endian machine"),
        (EMPTY, "holds no tensors; its keys are none"),
    ],
)
def test_an_archive_of_something_else_is_refused(tmp_path, entries, expected):
    refused(archive(tmp_path / "a.ckpt", entries), expected)


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
def test_a_compressed_archive_is_refused_unopened(tmp_path, entry):
    path = archive(tmp_path / "a.ckpt", {**EMPTY, entry: bytes(20 << 20)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "is compressed, which torch.save never does")


def test_an_archive_with_two_entries_of_one_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            file.writestr("a/data.pkl", EMPTY["data.pkl"])
    refused(tmp_path / "a.ckpt", "the archive has 1 names twice, such as data.pkl; expected each once")


@pytest.mark.parametrize("wide", [False, True])
def test_an_archive_whose_directory_is_larger_than_any_is_refused_unread(tmp_path, wide):
    """wide: only the second, 64-bit directory says so, and the first one is modest."""
    size = MAX_DIRECTORY_BYTES + 1
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, 46 if wide else size, 0, 0)
    if wide:
        end64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 0)
        end = end64 + struct.pack("<4sIQI", b"PK\x06\x07", 0, size, 1) + end
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04" + bytes(size - 4) + end)
    refused(tmp_path / "a.ckpt", "the archive's directory takes 4,194,305 bytes; no checkpoint needs over 4,194,304")


@pytest.mark.parametrize("offset", [1, 2**31, 2**32 - 2])
def test_an_archive_whose_directory_points_astray_is_refused(tmp_path, offset):
    content = bytearray(archive(tmp_path / "a.ckpt", EMPTY).read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 42, offset)
    (tmp_path / "a.ckpt").write_bytes(content)
    refused(tmp_path / "a.ckpt", "no entry where the directory puts a/data.pkl")


def test_a_legacy_file_of_a_big_endian_machine_is_refused(tmp_path):
    content = contained(tmp_path / "a.ckpt", "legacy", tensor([4], [1]), (bytes(16),)).read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content.replace(pickle.dumps(True, 2)[2:3] + b"s", b"\x89s", 1))
    refused(tmp_path / "a.ckpt", "written on a big-endian machine")


# -- Whatever it is

NAMES = [
    "collections\nOrderedDict\n",
    "torch._utils\n_rebuild_tensor_v2\n",
    "torch\nSize\n",
    "torch\nFloatStorage\n",
    "numpy\ndtype\n",
]
INSTRUCTIONS = (
    st.sampled_from([one.code.encode("latin-1") for one in pickletools.opcodes if one.arg is None])
    | st.sampled_from(NAMES).map(lambda name: b"c" + name.encode())
    | st.sampled_from(["storage", "0", "cpu", "state_dict"]).map(text)
    | st.integers(-1, 9).map(number)
    | st.builds(lambda code, n: code + bytes([n]), st.sampled_from([b"q", b"h", b"K"]), st.integers(0, 9))
    | st.binary(max_size=9)
)


@settings(max_examples=500, deadline=None)
@given(st.lists(INSTRUCTIONS, max_size=40), st.sampled_from(["zip", "legacy"]))
def test_any_program_is_read_or_refused(tmp_path_factory, instructions, container):
    program = b"\x80\x02}" + b"".join(instructions) + b"."
    read_or_refused(contained(tmp_path_factory.getbasetemp() / "program.ckpt", container, program, (bytes(16),)))
