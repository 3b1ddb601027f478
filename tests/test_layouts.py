"""Checkpoints of every layout: each is read as the same tensors, and written so that it is read as the same again."""

import collections
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ldm
import weights_convert
from tests import seeded
from tests.checkpoints import FULL, NAMINGS, SMALL, manifest, same, saved, tensors_of
from tests.refusal import edit
from weights_convert import architecture, writing
from weights_convert.__main__ import main
from weights_convert.checkpoint import Checkpoint
from weights_convert.component import Component
from weights_convert.layouts import schedule_buffers, single_file
from weights_convert.naming import shapes, to_foreign
from weights_convert.tokenizer_files import clip_vocabulary, read_vocabulary, write_vocabulary

# -- From layout to layout


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("to", "name"), [("native", "n"), ("compvis", "c.safetensors"), ("compvis", "c.ckpt"), ("diffusers", "d")]
)
def test_a_layout_and_back_to_native_is_bit_exact(tiny_native, tmp_path, to, name, dtype):
    source = weights_convert.read(tiny_native)
    weights_convert.write(source, tmp_path / name, to, dtype)
    again = weights_convert.read(tmp_path / name)
    assert again.layout == to and again.schedule == source.schedule and again.vocabulary == source.vocabulary
    weights_convert.write(again, tmp_path / "back", "native")
    target = torch.float32 if dtype is None else getattr(torch, dtype)
    assert same(tensors_of(tmp_path / "back"), {k: v.to(target) for k, v in tensors_of(tiny_native).items()})
    back = weights_convert.read(tmp_path / "back")
    assert {k: c.architecture for k, c in back.components.items()} == {k: c.architecture for k, c in source.components.items()}


def test_a_guidance_scale_of_the_models_own_stays_in_native_folders_and_is_told_where_it_cannot(tiny_native, tmp_path, capsys):
    model = shutil.copytree(tiny_native, tmp_path / "model")
    assert "sampling" not in json.loads((model / "model.json").read_text())
    edit(model / "model.json", sampling={"guidance_scale": 3})
    assert ldm.load(model).guidance_scale == 3
    for to, name in ("native", "n"), ("diffusers", "d"), ("compvis", "c.safetensors"):
        assert main([str(model), str(tmp_path / name), "--to", to]) == 0
        kept = weights_convert.read(tmp_path / name).sampling.guidance_scale == 3
        told = "left out: guidance_scale 3 (a" in capsys.readouterr().out
        assert (kept, told) == ((True, False) if to == "native" else (False, True))


def test_a_single_file_of_sd_v1_has_the_names_and_shapes_of_the_manifest(tmp_path, monkeypatch):
    """At full size, with weights that take no memory: what reaches the saving library is what the manifest lists."""

    def zeros(kind):
        listed = shapes(FULL[kind], "native")
        return {name: torch.zeros(1).expand(shape) for name, shape in listed.items()}

    components = {kind: Component(kind, FULL[kind], "native", "zeros", zeros(kind)) for kind in single_file.PREFIXES}
    written = {}
    monkeypatch.setattr(writing, "cast", lambda component, dtype: component.tensors)

    def save(tensors, path, strings):
        written.update(tensors)
        assert strings == {}
        path.write_bytes(b"")

    monkeypatch.setattr(writing, "save", save)
    weights_convert.write(Checkpoint(tmp_path, "native", components, architecture.Schedule()), tmp_path / "x.ckpt", "compvis")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == manifest("sd_v1_4_compvis.tsv")
    assert written["cond_stage_model.transformer.text_model.embeddings.position_ids"].dtype == torch.int64


# -- What is met in the wild


@pytest.fixture(scope="module")
def compvis_state(tiny_native, tmp_path_factory) -> dict:
    """A CompVis state dict of the tiny model, and the string that tells its architecture."""
    path = tmp_path_factory.mktemp("compvis") / "tiny.ckpt"
    weights_convert.write(weights_convert.read(tiny_native), path, "compvis")
    return torch.load(path, weights_only=True)


def with_ema(state: dict) -> dict:
    """The state dict as training left it: the average of the UNet beside it, each tensor twice the raw one."""
    prefix = single_file.PREFIXES["unet"]
    unet = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    averages = {"model_ema." + name.removeprefix("model.").replace(".", ""): 2 * tensor for name, tensor in unet.items()}
    return {**state, **averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_every_container_of_torch_save_is_read(tiny_native, compvis_state, tmp_path, options):
    assert same(tensors_of(saved(tmp_path / "a.ckpt", compvis_state, **options)), tensors_of(tiny_native))


def test_a_bare_state_dict_and_text_names_without_their_level_are_read(tiny_native, compvis_state, tmp_path):
    bare = {k.replace("transformer.text_model.", "transformer."): v for k, v in compvis_state["state_dict"].items()}
    path = saved(tmp_path / "a.ckpt", {**bare, "ldm.architecture": compvis_state["ldm.architecture"]})
    assert same(tensors_of(path), tensors_of(tiny_native))


def test_what_lightning_leaves_in_a_checkpoint_is_passed_over(tiny_native, compvis_state, tmp_path):
    """Training state around the weights, with classes that are not installed here."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__, "__qualname__": "ModelCheckpoint"})
    sys.modules.update({"pytorch_lightning": type(sys)("pytorch_lightning"), module.__name__: module})
    try:
        extra = {"epoch": 3, "callbacks": {module.ModelCheckpoint: module.ModelCheckpoint()}, "lr_schedulers": [{"a": None}]}
        path = saved(tmp_path / "a.ckpt", {**compvis_state, **extra})
    finally:
        del sys.modules[module.__name__], sys.modules["pytorch_lightning"]
    assert same(tensors_of(path), tensors_of(tiny_native))


def test_channels_last_weights_keep_their_values(tiny_native, compvis_state, tmp_path):
    last = torch.channels_last
    state = {k: v.contiguous(memory_format=last) if v.ndim == 4 else v for k, v in compvis_state["state_dict"].items()}
    path = saved(tmp_path / "a.ckpt", {**compvis_state, "state_dict": state})
    assert same(tensors_of(path), tensors_of(tiny_native))


def test_either_of_ema_and_raw_weights_is_chosen(tiny_native, compvis_state, tmp_path):
    path = saved(tmp_path / "full.ckpt", {**compvis_state, "state_dict": with_ema(compvis_state["state_dict"])})
    raw = tensors_of(tiny_native)
    averaged = {name: 2 * tensor if name.startswith("unet/") else tensor for name, tensor in raw.items()}
    assert same(tensors_of(path, weights="raw"), raw)
    assert same(tensors_of(path, weights="ema"), averaged)
    assert same(tensors_of(path), averaged)
    assert "EMA" in ldm.load(path).sources["unet"] and "EMA" not in ldm.load(path, weights="raw").sources["unet"]
    with pytest.raises(weights_convert.CheckpointError, match="has no EMA weights"):
        weights_convert.read(saved(tmp_path / "raw.ckpt", compvis_state), weights="ema")


def test_a_half_precision_file_loads_in_full_precision(tiny_native, tmp_path):
    weights_convert.write(weights_convert.read(tiny_native), tmp_path / "h.safetensors", "compvis", "float16")
    components, truth = ldm.load(tmp_path / "h.safetensors"), ldm.load(tiny_native)
    for name, tensor in components.unet.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, truth.unet.state_dict()[name].half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_schedule_is_read_off_the_buffers(compvis_state, tmp_path, dtype):
    linear = architecture.Schedule(beta_schedule="linear", beta_start=1e-3, beta_end=0.02)
    for schedule in (architecture.Schedule(), architecture.Schedule(beta_schedule="cosine"), linear):
        buffers = {name: tensor.to(dtype) for name, tensor in schedule_buffers.tensors(schedule).items()}
        state = {name: v for name, v in compvis_state["state_dict"].items() if not name.startswith("cond_stage")}
        path = saved(tmp_path / "a.ckpt", {"state_dict": {**state, **buffers}})
        read = weights_convert.read(path).schedule
        if schedule != linear:
            assert read == schedule
        else:
            assert read.beta_schedule == "linear" and abs(read.beta_end - 0.02) < 2e-5


def test_a_file_of_one_component_is_read_by_its_names(tmp_path):
    for kind, naming in NAMINGS:
        if naming == "native" or (kind, naming) == ("safety", "transformers"):
            continue
        native = {name: seeded.weight(name, shape) for name, shape in shapes(SMALL[kind], "native").items()}
        path = tmp_path / f"{kind}-{naming}.safetensors"
        save_file(to_foreign(SMALL[kind], naming, native), path)
        read = weights_convert.read(path).components[kind]
        assert read.naming == naming and same(dict(read.tensors), native), (kind, naming)


def test_openais_whole_clip_is_read_as_its_two_towers(tmp_path):
    state = {}
    for kind, prefix in (("image_encoder", "visual."), ("text_encoder", "")):
        native = {name: seeded.weight(name, shape) for name, shape in shapes(SMALL[kind], "native").items()}
        state |= {prefix + name: tensor for name, tensor in to_foreign(SMALL[kind], "openai", native).items()}
    state |= {"logit_scale": torch.tensor(4.6), "text_projection": torch.zeros(16, 12)}
    read = weights_convert.read(saved(tmp_path / "clip.pt", state))
    assert set(read.components) == {"image_encoder", "text_encoder"}
    weight = read.components["image_encoder"].tensors["layers.1.attention.key.weight"]
    assert torch.equal(weight, seeded.weight("layers.1.attention.key.weight", (16, 16)))


def test_an_inpainting_checkpoint_is_recognised(tmp_path):
    unet = dataclasses.replace(SMALL["unet"], in_channels=9)
    native = {name: torch.zeros(shape) for name, shape in shapes(unet, "native").items()}
    path = saved(tmp_path / "u.pt", to_foreign(unet, "compvis", native))
    assert weights_convert.read(path).components["unet"].architecture == unet


def test_a_vocabulary_of_its_own_travels_with_the_model(tiny_native, tmp_path):
    clip = clip_vocabulary()
    words = {**clip.tokens, "hello</w>": clip.tokens["<|startoftext|>"], "<|startoftext|>": clip.tokens["hello</w>"]}
    folder = tmp_path / "own"
    weights_convert.write(weights_convert.read(tiny_native), folder, "native")
    write_vocabulary(folder, type(clip)(words, clip.merges))
    weights_convert.write(weights_convert.read(folder), tmp_path / "d", "diffusers")
    assert read_vocabulary(tmp_path / "d" / "tokenizer").tokens == words
    assert ldm.load(tmp_path / "d").tokenizer("hello").ids[0, 1] == clip.tokens["<|startoftext|>"]
    config = json.loads((tmp_path / "d" / "text_encoder" / "config.json").read_text())
    assert config["bos_token_id"] == words["<|startoftext|>"] and config["eos_token_id"] == words["<|endoftext|>"]


def test_loaded_weights_can_be_trained_without_touching_the_file(tiny_native):
    """A gradient reaches every parameter, and a step changes the model's own copy of the mapped pages only."""
    before = (tiny_native / "unet.safetensors").read_bytes()
    with torch.inference_mode(False), torch.enable_grad():
        unet = ldm.load(tiny_native).unet
        x, context = seeded.tensor("x", 1, 4, 8, 8), seeded.tensor("context", 1, 77, 32)
        unet(x, 500, context).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())
        torch.optim.SGD(unet.parameters(), lr=1.0).step()
    assert (tiny_native / "unet.safetensors").read_bytes() == before
    assert not torch.equal(unet.conv_in.weight, ldm.load(tiny_native).unet.conv_in.weight)


def test_plain_python_objects_beside_the_weights_are_passed_over(tiny_native, compvis_state, tmp_path):
    """Sets, counters, paths and types, which old pickle protocols spell differently."""
    extra = {"seen": {1, 2}, "counts": collections.defaultdict(int), "path": Path("x"), "dtype": torch.float16}
    for protocol in (2, 4):
        path = saved(tmp_path / f"{protocol}.ckpt", {**compvis_state, **extra}, pickle_protocol=protocol)
        assert same(tensors_of(path), tensors_of(tiny_native))


def test_an_old_file_with_training_state_beside_the_weights_is_read(tiny_native, compvis_state, tmp_path):
    content = {**compvis_state, "optimizer_states": [{"exp_avg": torch.ones(5)}]}
    path = saved(tmp_path / "old.ckpt", content, _use_new_zipfile_serialization=False)
    assert same(tensors_of(path), tensors_of(tiny_native))


def test_ignore_may_be_one_name_and_may_not_be_everything(tiny_native, compvis_state, tmp_path):
    state = {**compvis_state["state_dict"], "embedding_manager.x": torch.ones(1)}
    path = saved(tmp_path / "a.ckpt", {**compvis_state, "state_dict": state})
    assert same(tensors_of(path, ignore="embedding_manager.*"), tensors_of(tiny_native))
    with pytest.raises(weights_convert.CheckpointError, match="would ignore every tensor"):
        weights_convert.read(path, ignore=("*",))


def test_the_tokenizers_style_is_a_choice(tiny_native):
    curly = "don\u2019t"
    assert not torch.equal(
        ldm.load(tiny_native).tokenizer(curly).ids, ldm.load(tiny_native, tokenizer="openai").tokenizer(curly).ids
    )


# -- The command


def test_the_command_converts_and_says_what_it_did(tiny_native, tmp_path):
    target = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "weights_convert", tiny_native, target, "--to", "compvis", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and "unet: " in done.stdout and done.stderr == ""
    assert next(iter(tensors_of(target).values())).dtype == torch.bfloat16
    again = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert again.returncode == 1 and again.stderr.count("\n") == 1 and "exists already" in again.stderr


@pytest.mark.parametrize(("given", "expected"), [(32, 32), ([48, 64], 64), (None, 64)])
def test_the_size_a_model_was_trained_at_is_read(tmp_path, tiny_native, given, expected):
    folder = tmp_path / "d"
    weights_convert.write(weights_convert.read(tiny_native), folder, "diffusers")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": given}))
    assert ldm.load(folder).unet.config.sample_size == expected
