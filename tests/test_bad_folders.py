"""Bad folders and bad targets: one clear line naming file, field, expected and found; nothing written, nothing left behind."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ldm
import weights_convert
from tests.refusal import TARGETS, convert, edit, read_or_refused, refused
from weights_convert import CheckpointError, writing


@pytest.fixture
def native(tiny_native, tmp_path) -> Path:
    return shutil.copytree(tiny_native, tmp_path / "native")


@pytest.fixture(scope="module")
def written_diffusers(tiny_native, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "diffusers"
    weights_convert.write(weights_convert.read(tiny_native), path, "diffusers")
    return path


@pytest.fixture
def diffusers(written_diffusers, tmp_path) -> Path:
    return shutil.copytree(written_diffusers, tmp_path / "diffusers")


# -- Diffusers folders


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no whole model here; expected model.json, or folders text_encoder, unet, vae")
    refused(tmp_path / "nowhere", "there is no such file or folder")
    refused(tmp_path / ("a" * 300), "there is no such file or folder")
    with pytest.raises(CheckpointError, match="say hub:owner/name"):
        ldm.load("owner/name")


def test_a_diffusers_folder_without_a_component_says_which(diffusers):
    (diffusers / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(diffusers, str(diffusers / "vae"), "no weights; expected diffusion_pytorch_model.safetensors", "found config.json")
    shutil.rmtree(diffusers / "vae")
    refused(diffusers, "missing vae")
    shutil.copytree(diffusers / "unet", diffusers / "vae")
    refused(diffusers, str(diffusers / "vae" / "config.json"))


def test_a_component_of_another_kind_is_refused(diffusers):
    shutil.copy(diffusers / "vae" / "diffusion_pytorch_model.safetensors", diffusers / "unet")
    refused(diffusers, "holds no unet; its tensors are named")


NO_OBJECT = [b"", b"not JSON", b"\xff", b"[" * 100_000, b"[]", b"1" * 5000, b" " * (9 << 20)]


@pytest.mark.parametrize(
    "where", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
)
@pytest.mark.parametrize("content", NO_OBJECT, ids=lambda content: str(content[:9]))
def test_a_file_that_holds_no_json_object_is_refused(diffusers, where, content):
    (diffusers / where).write_bytes(content)
    refused(diffusers, str(diffusers / where))


@pytest.mark.parametrize(
    ("where", "fields", "expected"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline'; expected one of"),
        ("unet/config.json", {"use_linear_projection": True}, "use_linear_projection is True; Stable Diffusion v1 has False"),
        ("unet/config.json", {"attention_head_dim": [5, 10]}, "attention_head_dim is [5, 10]; expected something like 8"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "(expected [16, 1024], found [16, 32])"),
        ("unet/config.json", {"block_out_channels": [16, 32]}, "2 block_out_channels but 3 down_block_types"),
        ("unet/config.json", {"block_out_channels": [10**9] * 3}, "expected at most 1048576, found 1000000000"),
        ("unet/config.json", {"down_block_types": [[]]}, "down_block_types is [[]]; expected a list of names"),
        ("unet/config.json", {"down_block_types": ["SimpleCrossAttnDownBlock2D"]}, "has 'SimpleCrossAttnDownBlock2D'"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D"]}, "expected the way down mirrored"),
        ("unet/config.json", {"sample_size": [None, None]}, "sample_size is [None, None]; expected something like 64"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor is 0.1; Stable Diffusion v1 has None"),
        ("vae/config.json", {"down_block_types": 5}, "down_block_types is 5; expected a list of names"),
        ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor is nan; expected something like 0.18215"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; Stable Diffusion v1 has 'quick_gelu'"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected at most 256"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "expected scaled_linear or linear or cosine"),
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}, "beta_end is 1.5; expected at most 0.999"),
        ("tokenizer/vocab.json", {"a": "b"}, "expected every id from 0 to 49407 once"),
        ("tokenizer/vocab.json", {"\ud800": 49408}, "a token has half a character, '\\ud800'"),
    ],
)
def test_a_diffusers_folder_of_another_model_is_refused_by_the_setting(diffusers, where, fields, expected):
    edit(diffusers / where, **fields)
    refused(diffusers, expected)


@pytest.mark.parametrize("ignore", [["extra.one"], ["extra.*"]])
def test_a_surplus_tensor_in_a_folder_is_refused_until_it_is_ignored(native, diffusers, ignore):
    unet, text = diffusers / "unet" / "diffusion_pytorch_model.safetensors", diffusers / "text_encoder" / "model.safetensors"
    for folder, file in (native, native / "unet.safetensors"), (diffusers, unet), (diffusers, text):
        sound = load_file(file)
        save_file({**sound, "extra.one": torch.zeros(1)}, file)
        refused(folder, str(file), "unexpected", "extra.one", "name them in `ignore`")
        assert weights_convert.read(folder, ignore=ignore).components
        save_file(sound, file)


# -- Native folders


@pytest.mark.parametrize("value", [None, "16", -1, 0, 2.5, True, 10**9, [16], {}, [[16]]], ids=repr)
@pytest.mark.parametrize("field", ["residual_blocks", "level_widths", "attention_levels", "latent_channels"])
def test_a_native_index_is_refused_fast_where_a_field_is_no_sensible_number(native, field, value):
    components = json.loads((native / "model.json").read_text())["components"]
    kind = "unet" if field in components["unet"] else "autoencoder"
    edit(native / "model.json", components={**components, kind: {**components[kind], field: value}})
    refused(native, kind)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"format": 2}, "format is 2; this version reads 1"),
        ({"format": [[[[[[]]]]]]}, "this version reads 1"),
        ({"components": []}, "components is []; expected an object of text_encoder, unet"),
        ({"components": {"transformer": {}}}, "expected an object of text_encoder, unet"),
        ({"components": {"unet": []}}, "expected a JSON object of UNet fields, found list"),
        ({"components": {"unet": {"depth": 3}}}, "unknown field 'depth' of UNet; known are in_channels"),
        ({"components": {"text_encoder": {"layers": 10**9}}}, "layers is 1000000000; expected at most 256"),
        ({"components": {"unet": {"level_widths": [16] * 999}}}, "expected at most 16, found 999"),
        ({"components": {"unet": {"level_widths": [16]}}}, "1 level_widths but 4 attention_levels"),
        ({"components": {"unet": {}}}, "time_embedding.linear_1.weight (expected [1280, 320], found [64, 16])"),
        ({"components": {"safety": {}}}, "safety.safetensors: cannot be read (No such file or directory)"),
        ({"schedule": {"beta_schedule": "sigmoid"}}, "beta_schedule is 'sigmoid'; expected scaled_linear or linear or cosine"),
        ({"schedule": {"train_steps": 10**9}}, "train_steps is 1000000000; expected at most"),
        ({"sampling": 3}, "expected a JSON object of Sampling fields, found int"),
        ({"sampling": {"guidance": 3.0}}, "unknown field 'guidance' of Sampling; known are guidance_scale"),
        ({"sampling": {"guidance_scale": "3"}}, "guidance_scale is '3'; expected something like 7.5"),
        ({"sampling": {"guidance_scale": -1}}, "guidance_scale is -1; expected something like 7.5"),
    ],
    ids=str,
)
def test_a_native_index_that_does_not_describe_its_folder_is_refused(native, fields, expected):
    edit(native / "model.json", **fields)
    refused(native, expected)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("heads", 3, "unet has heads 3; expected a divisor of 16"),
        ("norm_groups", 5, "unet has norm_groups 5; expected a divisor of 16"),
    ],
)
def test_a_number_that_no_tensor_vouches_for_must_still_fit_to_be_loaded(native, field, value, expected):
    components = json.loads((native / "model.json").read_text())["components"]
    edit(native / "model.json", components={**components, "unet": {**components["unet"], field: value}})
    with pytest.raises(CheckpointError, match=expected):
        ldm.load(native)


def test_a_vocabulary_larger_than_the_text_encoders_is_refused_when_loading(diffusers):
    edit(diffusers / "tokenizer" / "vocab.json", **{"a new word": 49408})
    with pytest.raises(CheckpointError, match="the vocabulary has 49,409 tokens, the text encoder 49,408"):
        ldm.load(diffusers)


@pytest.mark.parametrize("merges", [[["a", "b", "c"]], [[["a"], "b"]], ["a  b"], ["no such"], [5], "a b"], ids=repr)
def test_merges_that_join_no_two_tokens_are_refused(diffusers, merges):
    vocabulary = json.loads((diffusers / "tokenizer" / "vocab.json").read_text())
    (diffusers / "tokenizer" / "vocab.json").unlink()
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
    (diffusers / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": model}))
    refused(diffusers, str(diffusers / "tokenizer" / "tokenizer.json"), "merge")


@pytest.mark.parametrize("where", ["model.json", "unet.safetensors"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_not_read(native, where):
    (native / where).unlink()
    (native / where).symlink_to("/dev/zero")
    refused(native, f"{native / where}: expected a file, found a folder, pipe or device")
    (native / where).unlink()
    os.mkfifo(native / where)
    refused(native, f"{native / where}: expected a file, found a folder, pipe or device")


def test_a_precision_that_no_model_runs_in_is_refused(tiny_native):
    with pytest.raises(CheckpointError, match=r"cannot be loaded in dtype torch.int8; expected one of torch.float32"):
        ldm.load(tiny_native, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="expected one of float64, float32, float16, bfloat16"):
        weights_convert.write(weights_convert.read(tiny_native), tiny_native.parent / "x", "native", "int8")
    assert list(tiny_native.parent.iterdir()) == [tiny_native]


# -- Writing


@pytest.mark.parametrize(("to", "name"), TARGETS)
def test_a_target_that_cannot_be_made_is_refused_and_left_as_it_is(tiny_native, tmp_path, to, name):
    (tmp_path / name).write_text("mine")
    for target, expected in (
        (tmp_path / name, "exists already; give another name or remove it first"),
        (tmp_path / "no" / name, f"there is no folder {tmp_path / 'no'}; create it first"),
        (Path("/proc") / name, "cannot be written ("),
        (tmp_path / ("a" * 250 + name), "cannot be written (File name too long)"),
    ):
        code, message = convert(tiny_native, target, to)
        assert code == 1 and message.startswith(f"{target}: {expected}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("to", "name"), TARGETS)
def test_a_full_disk_is_reported_and_nothing_is_left_on_it(tiny_native, tmp_path, to, name):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, message = convert(tiny_native, tmp_path / name, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and message.startswith(f"{tmp_path / name}: cannot be written (") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "name"), TARGETS)
def test_an_interrupted_write_leaves_nothing(tiny_native, tmp_path, monkeypatch, to, name):
    def save(tensors, path, strings):
        path.write_bytes(b"half a file")
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "save", save)
    assert convert(tiny_native, tmp_path / name, to) == (130, f"interrupted; {tmp_path / name} was not written")
    assert not list(tmp_path.iterdir())


# -- Whatever it is

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@pytest.mark.parametrize("where", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model.json"])
def test_whatever_a_configuration_says_it_is_read_or_refused(native, diffusers, where):
    path = native / where if where == "model.json" else diffusers / where
    sound = json.loads(path.read_text())

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.sampled_from(sorted(sound)), ANY_JSON, min_size=1, max_size=2))
    def check(changes):
        path.write_text(json.dumps({**sound, **changes}))
        read_or_refused(native if where == "model.json" else diffusers)

    check()
