"""Bad files of tensors, by `weights_convert.read`, by the command and by `ldm.load`: one clear line naming file, key, expected
and found; nothing run, nothing written, bounded memory. What is merely unusual is still read."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ldm
import weights_convert
from tests.checkpoints import SMALL, saved
from tests.refusal import CONTAINERS, NORM, TARGETS, TEXT, raw, read_or_refused, refused, refused_cheaply, write
from weights_convert import CheckpointError
from weights_convert.containers.torch_file import LEGACY_MAGIC
from weights_convert.layouts import single_file
from weights_convert.naming import shapes

# -- The safetensors header


def place(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": place([16], 0, 64), "b": place([16], 0, 64)}, "tensor b begins at byte 0 of the data; expected 64"),
        ({"a": place([8], 0, 32), "b": place([4], 48, 64)}, "tensor b begins at byte 48 of the data; expected 32"),
        ({"a": place([8], 0, 32)}, "64 bytes of data; its tensors end at 32"),
        ({"a": place([32], 0, 128)}, "tensor a ends at byte 128 of the data; found 64"),
        ({"a": place([7], 0, 64)}, "tensor a, [7] of float32, has 64 bytes; expected 28"),
        ({"a": place([16], 64, 0)}, "tensor a begins at byte 64 of the data; expected 0"),
        ({"a": place([2**62, 2**62], 0, 64)}, "has 64 bytes; expected 85,070"),
        ({"a": place([-16], 0, 64)}, "tensor a has shape [-16]; expected a list of at most 8 counts"),
        ({"a": place([1] * 99 + [16], 0, 64)}, "expected a list of at most 8 counts"),
        ({"a": place([16], 0, 64, "Q4")}, "tensor a has type 'Q4'; known are F64, F32"),
        ({"a": place([16], 0, 64, ["F32"])}, "tensor a has type ['F32']; known are F64, F32"),
        ({"a": place([16], 0, "64")}, "tensor a has data_offsets [0, '64']; expected where it begins and ends"),
        ({"a": [16]}, "tensor a is [16]; expected dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 5}}, "__metadata__ is {'a': 5}; expected an object of strings"),
        ({"visual.proj": place([4, 4], 0, 64)}, "no Stable Diffusion v1 component among its 1 tensors (such as visual.proj)"),
        ({}, "64 bytes of data; its tensors end at 0"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"{garbage}", "is not JSON"),
        (b"\xff\xfe" * 50, "is not JSON"),
        (b"[1]", "expected a JSON object, found a list"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
        (b" " * (9 << 20), "its header takes 9,437,184 bytes; no checkpoint needs over 8,388,608"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(tmp_path, header, expected):
    refused(raw(tmp_path / "a.safetensors", header), expected)


@pytest.mark.parametrize("length", [0, 3, 99_000_000, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_a_wrong_length_is_refused(tmp_path, length):
    refused(raw(tmp_path / "a.safetensors", {"a": place([16], 0, 64)}, length=length), "header")


@pytest.mark.parametrize(
    "said", ["[1]", "{}", "1" * 5000, '{"schedule": {}, "unet": {"depth": 1}}', '{"schedule": {}, "vae": {}}']
)
def test_a_file_that_describes_itself_wrongly_is_refused(tmp_path, said):
    save_file(TEXT, tmp_path / "a.safetensors", metadata={"ldm.architecture": said})
    refused(tmp_path / "a.safetensors", "a.safetensors, metadata ldm.architecture")


def test_no_header_takes_much_memory_or_time(tmp_path):
    """Each nearly as long as a header may be: of empty tensors, of empty lists, of lists in lists."""
    many = {"conv1.weight": place([0], 0, 0), **{f"visual.{i}": place([0], 0, 0) for i in range(100_000)}}
    lists = b'{"a":[' + b"[]," * 2_700_000 + b"[]]}"
    contents = many, lists, b'{"a":' + b"[" * 8_000_000 + b"]" * 100 + b"}"
    refused_cheaply([raw(tmp_path / f"{i}.safetensors", content, b"") for i, content in enumerate(contents)])


# -- What is no checkpoint, or part of one


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer, not the file itself"),
        (b"GIF89a and so on", "neither a safetensors file nor one that torch.save wrote; it starts with b'GIF89a a'"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, expected):
    (tmp_path / "a.ckpt").write_bytes(content)
    refused(tmp_path / "a.ckpt", expected)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path, container, kept):
    path = write(tmp_path / "a.safetensors", TEXT, container)
    os.truncate(path, int(path.stat().st_size * kept))
    refused(path)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("cond_stage_model.model.ln_final.weight", "Stable Diffusion 2"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "SDXL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "a LoRA"),
    ],
)
def test_another_models_checkpoint_is_called_by_its_name(tmp_path, name, model):
    refused(write(tmp_path / "a.safetensors", {name: torch.zeros(4)}), f"this is {model}; expected a Stable Diffusion v1")


# -- Tensors


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_renamed_tensor_is_reported_with_the_nearest_name(tmp_path, container):
    near = NORM.replace("norm", "nrm")
    state = {near if name == NORM else name: tensor for name, tensor in TEXT.items()}
    expected = f"text_encoder (transformers names): missing 1: {NORM} (found {near} instead?); unexpected 1: {near}"
    refused(write(tmp_path / "a", state, container), expected)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(5), f"misshapen 1: {NORM} (expected [16], found [5])"),
        (torch.zeros(0), f"misshapen 1: {NORM} (expected [16], found [0])"),
        (torch.zeros(()), f"misshapen 1: {NORM} (expected [16], found [])"),
        (torch.zeros(16, dtype=torch.int8), f"{NORM} has type int8; expected one of float64, float32, float16, bfloat16"),
    ],
)
def test_a_tensor_of_another_shape_or_type_is_reported_with_both(tmp_path, container, tensor, expected):
    refused(write(tmp_path / "a", {**TEXT, NORM: tensor}, container), expected)


def test_a_whole_unet_of_int8_is_refused(tmp_path):
    state = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in shapes(SMALL["unet"], "compvis").items()}
    refused(saved(tmp_path / "a.ckpt", state), "time_embed.0.weight has type int8; expected one of float64")


def test_an_image_tower_without_room_for_an_image_is_refused(tmp_path):
    state = {"conv1.weight": torch.zeros(4, 3, 2, 2), "positional_embedding": torch.zeros(0, 4), "proj": torch.zeros(4, 4)}
    refused(write(tmp_path / "a.safetensors", state), "image_encoder (openai names): missing")


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_surplus_tensor_is_refused_until_it_is_ignored(tmp_path, container):
    path = write(tmp_path / "a", {**TEXT, "extra.one": torch.zeros(1), "extra.two": torch.zeros(1)}, container)
    refused(path, "unexpected 2: ", "extra.one", "extra.two", "to read the file without them, name them in `ignore`")
    refused(path, "unexpected 1: extra.two", ignore=["extra.one"])
    for ignore in (["extra.one", "extra.two"], ["extra.*"]):
        assert set(weights_convert.read(path, ignore=ignore).components) == {"text_encoder"}


def test_a_surplus_average_is_refused_by_its_own_name_until_it_is_ignored(tmp_path):
    unet = {name: torch.zeros(shape) for name, shape in shapes(SMALL["unet"], "compvis").items()}
    averages = {single_file.ema_name(name): tensor.clone() for name, tensor in unet.items()}
    path, surplus = tmp_path / "a.ckpt", single_file.EMA_PREFIX + "extra.one"
    refused(
        saved(path, {**unet, **averages, surplus: torch.zeros(1)}),
        f"unet (compvis names) (EMA weights): unexpected 1: {surplus};",
    )
    assert "EMA" in weights_convert.read(path, ignore=[surplus]).components["unet"].source
    del averages[single_file.ema_name("out.2.bias")]
    refused(saved(path, {**unet, **averages}), "missing 1: model_ema.diffusion_modelout2bias")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: weights='best'; expected 'auto', 'ema' or 'raw'"):
        weights_convert.read(path, weights="best")


@pytest.mark.parametrize("container", CONTAINERS)
def test_names_in_a_file_can_neither_break_the_line_nor_fill_the_screen(tmp_path, container):
    names = ["a\nerror: all is well", "\x1b[2J", "\u202egnp.\u2028", "x" * 1_000_000]
    refused(write(tmp_path / "a", {**TEXT, **{name: torch.zeros(1) for name in names}}, container), "unexpected 4: ")
    refused(write(tmp_path / "a", {name: torch.zeros(1) for name in names}, container), "no Stable Diffusion v1 component")


def test_two_names_of_one_tensor_are_both_kept(tmp_path):
    """Not bad, only unusual: training code ties weights, and safetensors will not save them tied."""
    a, b = "encoder.layers.0.layer_norm1.weight", "encoder.layers.0.layer_norm2.weight"
    path = saved(tmp_path / "a.ckpt", {**TEXT, b: TEXT[a]})
    weights_convert.write(weights_convert.read(path), tmp_path / "native", "native")
    written = weights_convert.read(tmp_path / "native").components["text_encoder"].tensors
    assert torch.equal(written["layers.0.norm1.weight"], TEXT[a]) and torch.equal(written["layers.0.norm2.weight"], TEXT[a])


# -- Numbers


@pytest.fixture
def native(tiny_native, tmp_path) -> Path:
    return shutil.copytree(tiny_native, tmp_path / "native")


def put(folder: Path, name: str, index: tuple, value: float) -> None:
    """Set one number of the UNet."""
    state = load_file(folder / "unet.safetensors")
    state[name][index] = value
    save_file(state, folder / "unet.safetensors")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers_are_refused(native, value):
    put(native, "conv_out.weight", (1, 2, 0, 1), float(value))
    expected = f"{native / 'unet.safetensors'}: conv_out.weight holds 1 of 576 numbers that are NaN or infinite"
    refused(native, expected, opens=True)


@pytest.mark.parametrize(("to", "name"), TARGETS)
def test_values_beyond_a_precision_are_refused_where_it_is_asked_for(native, tmp_path, to, name):
    put(native, "conv_out.bias", (3,), -70_000.0)
    assert ldm.load(native).unet.conv_out.bias[3] == -70_000
    expected = r"unet.safetensors: conv_out.bias reaches 7e\+04, more than torch.float16 holds; use bfloat16 or float32"
    with pytest.raises(CheckpointError, match=expected):
        ldm.load(native, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=expected):
        weights_convert.write(weights_convert.read(native), tmp_path / name, to, "float16")
    assert list(tmp_path.iterdir()) == [native]


# -- Whatever it is


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([b"", b"PK\x03\x04", LEGACY_MAGIC, b"\x10" + bytes(7) + b"{"]), st.binary(max_size=300), st.booleans())
def test_any_bytes_are_read_or_refused(scratch, start, rest, called_safetensors):
    path = scratch / ("a.safetensors" if called_safetensors else "a.ckpt")
    path.write_bytes(start + rest)
    read_or_refused(path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_checkpoint_with_any_bytes_changed_or_cut_off_is_read_or_refused(scratch, container):
    """Most changes fall near either end, where names and shapes stand."""
    sound = write(scratch / "sound", TEXT, container).read_bytes()
    size = len(sound)
    positions = st.integers(0, 4000) | st.integers(size - 4000, size - 1) | st.integers(0, size - 1)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=4), st.just(size) | positions)
    def check(changes, kept):
        content = bytearray(sound)
        for position, byte in changes:
            content[position] = byte
        (scratch / "a").write_bytes(content[:kept])
        read_or_refused(scratch / "a")

    check()
