"""The checkpoint doctor: every layout told apart, and of what is wrong with a file all of it, without running any of it."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

import weights_convert
from tests.checkpoints import manifest, saved
from tests.refusal import one_line
from tests.test_bad_pickles import contained, programs
from weights_convert import CheckpointError, doctor
from weights_convert.doctor import examine, examine_folder
from weights_convert.known_files import KNOWN, KnownFile


@pytest.fixture(scope="module")
def compvis(tiny_native, tmp_path_factory):
    path = tmp_path_factory.mktemp("compvis") / "tiny.ckpt"
    weights_convert.write(weights_convert.read(tiny_native), path, "compvis")
    return path


def state_of(path):
    return dict(torch.load(path, weights_only=True)["state_dict"])


def test_a_whole_file_is_told_and_nothing_is_wrong_with_it(compvis):
    found = examine(compvis)
    content = compvis.read_bytes()
    assert (found.sha256, found.size, found.container) == (hashlib.sha256(content).hexdigest(), len(content), "pickle")
    assert found.old_hash == hashlib.sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert [(part.kind, part.naming) for part in found.parts] == [
        ("text_encoder", "transformers"),
        ("unet", "compvis"),
        ("autoencoder", "compvis"),
    ]
    assert all(part.names.right for part in found.parts) and not found.strangers and found.trouble is None
    assert found.leftovers["betas"] == 1 and found.known is None and found.other is None
    truth = weights_convert.read(compvis).components["unet"].tensors
    values = torch.cat([truth[name].flatten() for name in truth]).double()
    numbers = found.numbers["unet"]
    assert (numbers.lowest, numbers.highest) == (float(values.min()), float(values.max()))
    assert numbers.deviation == pytest.approx(float(values.square().mean().sqrt()))
    assert (numbers.bad, numbers.beyond_half) == ({}, [])
    assert dict(found.parts[1].otherwise)["context_width"] == (768, 32)
    built, storages = "torch._utils._rebuild_tensor_v2", {"torch.FloatStorage", "torch.LongStorage"}
    assert set(found.pickle.names) == {"collections.OrderedDict", built, *storages}
    assert found.pickle.instructions["BINPERSID"] == len(state_of(compvis)) and found.pickle.instructions["STOP"] == 1


def test_the_published_files_names_are_the_doctors(tmp_path):
    """Of the manifest's sizes, without its numbers: all of SD v1, and nothing else."""
    sizes = {name: [*shape] for name, shape in manifest("sd_v1_4_compvis.tsv").items()}
    path = tmp_path / "sd-v1-4.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "open_tensors", lambda p: _unread(p, sizes))
        found = examine(path, values=False)
    assert [part.otherwise for part in found.parts] == [{}, {}, {}]
    assert all(part.names.right for part in found.parts) and not found.strangers
    assert {part.kind: part.parameters for part in found.parts}["unet"] == 859_520_964
    assert sum(found.leftovers.values()) == 12 + 1  # the schedule, and the positions' numbers


def _unread(path, sizes):
    from weights_convert.containers import Spec, TensorFile

    return TensorFile(path, "safetensors", {name: Spec(tuple(s), "float32") for name, s in sizes.items()}, {}, None)


def test_averages_beside_raw_weights_are_told(compvis, tmp_path):
    state = state_of(compvis)
    raw = [name for name in state if name.startswith("model.diffusion_model.")]
    averages = {"model_ema.diffusion_model" + name[22:].replace(".", ""): state[name].clone() for name in raw}
    full = examine(saved(tmp_path / "full.ckpt", {"state_dict": {**state, **averages, "model_ema.decay": torch.tensor(0.9)}}))
    assert full.ema == "raw UNet weights and their average (EMA)" and full.leftovers["model_ema.*"] == len(raw) + 1
    averages.pop(next(iter(averages)))
    lost = examine(saved(tmp_path / "lost.ckpt", {"state_dict": {**state, **averages}}), values=False)
    assert lost.ema.endswith("of which 1 are missing")
    assert examine(compvis, values=False).ema.startswith("one set of UNet weights")


def test_what_is_wrong_with_the_names_is_all_told(compvis, tmp_path):
    state = state_of(compvis)
    moved = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    state[moved.replace("in_layers", "inlayers")] = state.pop(moved)
    gone = "model.diffusion_model.out.2.bias"
    del state[gone]
    state["first_stage_model.quant_conv.weight"] = torch.zeros(3, 8, 1, 1)
    state["something.else"] = torch.zeros(1)
    found = examine(saved(tmp_path / "a.ckpt", {"state_dict": state}))
    parts = {part.kind: part.names for part in found.parts}
    inner = moved.removeprefix("model.diffusion_model.")
    assert parts["unet"].missing == {inner: inner.replace("in_layers", "inlayers"), "out.2.bias": None}
    assert parts["unet"].unexpected == [inner.replace("in_layers", "inlayers")]
    assert parts["autoencoder"].misshapen == {"quant_conv.weight": ((8, 8, 1, 1), (3, 8, 1, 1))}
    assert found.strangers == ["something.else"] and found.numbers["autoencoder"].zero == [
        "first_stage_model.quant_conv.weight"
    ]
    with pytest.raises(CheckpointError):
        weights_convert.read(tmp_path / "a.ckpt")


def test_nan_and_what_half_precision_does_not_hold_are_told_by_name(compvis, tmp_path):
    state = state_of(compvis)
    state["model.diffusion_model.out.2.bias"] = torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    state["first_stage_model.quant_conv.bias"] = torch.full((8,), 1e5)
    found = examine(saved(tmp_path / "a.ckpt", {"state_dict": state}))
    assert found.numbers["unet"].bad == {"model.diffusion_model.out.2.bias": 2}
    assert found.numbers["autoencoder"].beyond_half == ["first_stage_model.quant_conv.bias"]
    assert found.numbers["autoencoder"].highest == 1e5 and found.numbers["unet"].highest < 1e3


def test_a_published_file_is_known_by_its_hash(compvis, monkeypatch):
    assert {known.version for known in KNOWN.values()} == {"v1-1", "v1-2", "v1-3", "v1-4", "v1-5"}
    assert all(len(sha256) == 64 for sha256 in KNOWN)
    known = KnownFile("sd-v1-4.ckpt", "v1-4", "ema")
    monkeypatch.setitem(KNOWN, hashlib.sha256(compvis.read_bytes()).hexdigest(), known)
    assert examine(compvis, values=False).known is known


def test_another_model_is_named(tmp_path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    found = examine(tmp_path / "a.safetensors")
    assert found.other == "FLUX" and not found.parts


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_listed_unrun(tmp_path, container):
    sentinel = tmp_path / "was run"
    for name, program in programs(sentinel).items():
        found = examine(contained(tmp_path / f"{name}.ckpt", container, program))
        assert "refused, nothing was run" in found.trouble and found.parts == [] and found.container == "pickle"
        assert sum(found.pickle.instructions.values()) > 2
        if "EXT" not in name:
            dangerous = {"os.system", "builtins.eval", "__builtin__.eval", "subprocess.call", "torch.os.system"}
            assert dangerous & set(found.pickle.names), name
    assert not sentinel.exists()


def test_folders_are_examined_file_by_file(tiny_native, tiny_native_safe):
    for folder, kinds in ((tiny_native, 3), (tiny_native_safe, 4)):
        found = examine_folder(folder)
        assert len(found) == kinds and all(one.parts[0].naming == "native" and one.parts[0].names.right for one in found)


@pytest.mark.reference
def test_a_folder_of_diffusers_is_examined(tiny_diffusers):
    found = examine_folder(tiny_diffusers)
    kinds = {part.kind: part for one in found for part in one.parts}
    assert set(kinds) == {"unet", "autoencoder", "text_encoder", "safety"} and all(p.names.right for p in kinds.values())
    assert kinds["unet"].naming == "diffusers" and kinds["autoencoder"].naming == "diffusers"


def test_what_could_hold_no_tensors_is_refused_in_one_line(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "b").write_text("just text, and more of it")
    (tmp_path / "c").mkdir()
    for name, expected in (("a", "the file is empty"), ("b", "neither a safetensors file"), ("none", "cannot be read")):
        with pytest.raises(CheckpointError, match=expected) as caught:
            examine(tmp_path / name)
        assert one_line(caught.value)
    with pytest.raises(CheckpointError, match="a folder without weights") as caught:
        examine_folder(tmp_path / "c")
    assert one_line(caught.value)


def test_a_file_cut_short_is_told_of_with_what_there_is(compvis, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(compvis.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        examine(cut)
    save_file({"a": torch.ones(50)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[:-9])
    found = examine(tmp_path / "x.safetensors")
    assert found.trouble and found.container == "safetensors"
