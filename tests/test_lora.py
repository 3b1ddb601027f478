"""LoRA: every spelling is read as the same factors, attaching is merging, and the model that was given stays as it is."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.adapters import lookup, lora
from ldm.diffusion.guidance import guided
from ldm.output.receipt import fingerprint
from tests import lora_files, seeded
from tests.lora_files import ALPHA, CONVOLUTIONS, LAYERS, RANK, factors
from tests.measure import relative_error
from weights_convert import CheckpointError
from weights_convert.lora import write_lora

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def model(tiny):
    return tiny


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return lora_files.spelled(tmp_path_factory.mktemp("spelled"))


@pytest.fixture(scope="module")
def style(model, files):
    return lora.read(files["kohya"], model)


@pytest.fixture(scope="module")
def convolutions(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("locon") / "locon.safetensors"
    return lora.read(lora_files.kohya(path, LAYERS | CONVOLUTIONS), model)


def outputs(model):
    """Text states and eps, through the seams."""
    states = model.text_encoder(model.tokenizer([PROMPT, ""]).ids)
    x = seeded.tensor("x", 2, 4, 8, 12).double()
    return states, guided(model.unet, states[1:], states[:1], 5.0)(x[:1], 981.0), model.unet(x, 500, states)


def bits(model):
    return {f"{kind} {n}": t.clone() for kind in ("unet", "text_encoder") for n, t in getattr(model, kind).state_dict().items()}


def same_bits(model, before):
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


# -- Reading ---------------------------------------------------------------------------------------------------------------


def test_every_spelling_is_read_as_the_same_lora(model, files):
    for spelling, path in files.items():
        found = lora.read(path, model)
        assert set(found.layers) == {(kind, own) for kind, own, _ in LAYERS.values()}, spelling
        for name, (kind, own, shape) in LAYERS.items():
            held = found.layers[kind, own]
            down, up = factors(name, shape)
            assert torch.equal(held.down, down) and torch.equal(held.up, up) and held.mid is None
            assert held.scale == ALPHA / RANK, (spelling, name)
        assert found.left == () and found.name == path.stem and len(found.sha256) == 64


@pytest.mark.parametrize("kind", ["unet", "text_encoder"])
def test_a_folder_of_pefts_has_its_alphas_beside_it(model, tmp_path, kind):
    found = lora.read(lora_files.peft_folder(tmp_path / "mine", kind), model)
    assert found.name == "mine" and {of for of, _ in found.layers} == {kind}
    expected = ALPHA / RANK if kind == "unet" else 1 / RANK
    assert {held.scale for held in found.layers.values()} == {expected}


def test_without_alpha_it_is_the_rank(model, tmp_path):
    found = lora.read(lora_files.kohya(tmp_path / "x.safetensors", alpha=None), model)
    assert {held.scale for held in found.layers.values()} == {1.0}


def test_compvis_names_and_another_prefix_of_the_text_encoder_are_read_too(model, tmp_path, style):
    tensors = load_file(lora_files.kohya(tmp_path / "x.safetensors"))
    turned = {"down_blocks_0_attentions_0": "input_blocks_1_1", "lora_te_": "lora_te1_"}
    for before, after in turned.items():
        tensors = {name.replace(before, after): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "y.safetensors")
    assert set(lora.read(tmp_path / "y.safetensors", model).layers) == set(style.layers)


def test_a_pickle_is_read_too(model, tmp_path, files, style):
    torch.save(load_file(files["kohya"]), tmp_path / "x.pt")
    found = lora.read(tmp_path / "x.pt", model)
    assert all(torch.equal(found.layers[layer].down, style.layers[layer].down) for layer in style.layers)


def test_what_is_of_no_layer_is_listed(model, tmp_path):
    stray = {"lora_unet_down_blocks_9_attn1_to_q.lora_down.weight": torch.ones(4, 16), "note": torch.ones(1)}
    assert set(lora.read(lora_files.kohya(tmp_path / "x.safetensors", **stray), model).left) == set(stray)


def test_what_we_write_we_read(model, tmp_path, style):
    shapes = {kind: made(**dataclasses.asdict(getattr(model, kind).config)) for kind, made in lora.KINDS.items()}
    written = {layer: (held.down, held.up, ALPHA) for layer, held in style.layers.items()}
    write_lora(tmp_path / "x.safetensors", written, shapes, {"ss_output_name": "x"})
    found = lora.read(tmp_path / "x.safetensors", model)
    assert found.layers.keys() == style.layers.keys()
    for layer, held in found.layers.items():
        assert torch.equal(held.up, style.layers[layer].up) and held.scale == ALPHA / RANK
    assert load_file(tmp_path / "x.safetensors").keys() == load_file(style.path).keys()


# -- What becomes of the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", [-0.5, 0.3, 1.0])
def test_attaching_is_adding_the_product_to_the_weights(model, style, convolutions, coefficient):
    before, plain = bits(model), outputs(model)
    for used in (style, convolutions):
        attached, merged = lora.attach(model, [(used, coefficient)]), lora.merge(model, [(used, coefficient)])
        for found, expected, untouched in zip(outputs(attached), outputs(merged), plain, strict=True):
            assert relative_error(found, expected) < 1e-12
            assert relative_error(found, untouched) > 1e-3
        for kind, path in used.layers:
            weight = getattr(model, kind).get_submodule(path).weight
            held = used.layers[kind, path]
            expected = weight + coefficient * held.scale * lora.product(held, torch.float64, "cpu").reshape(weight.shape)
            assert relative_error(getattr(merged, kind).get_submodule(path).weight, expected) < 1e-15
    assert same_bits(model, before) and all(torch.equal(a, b) for a, b in zip(outputs(model), plain, strict=True))


def test_a_feature_map_as_wide_as_it_has_channels_is_not_taken_for_tokens(model, convolutions):
    """The shortcut has 16 channels, and maps 16 wide from latents of 32."""
    states = model.text_encoder(model.tokenizer([PROMPT]).ids)
    x = seeded.tensor("x", 1, 4, 24, 32).double()
    attached, merged = (change(model, [(convolutions, 0.7)]).unet for change in (lora.attach, lora.merge))
    assert relative_error(attached(x, 500, states), merged(x, 500, states)) < 1e-12


def test_a_convolution_between_two_of_1_x_1_is_the_product_of_three(model, tmp_path):
    name, (kind, own, shape) = "down_blocks.0.downsamplers.0.conv", CONVOLUTIONS["down_blocks.0.downsamplers.0.conv"]
    stem = "lora_unet_" + name.replace(".", "_")
    tensors = {
        f"{stem}.lora_down.weight": seeded.tensor("down", RANK, shape[1], 1, 1),
        f"{stem}.lora_mid.weight": seeded.tensor("mid", RANK, RANK, 3, 3) / 5,
        f"{stem}.lora_up.weight": seeded.tensor("up", shape[0], RANK, 1, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    used = lora.read(tmp_path / "x.safetensors", model)
    assert set(used.layers) == {(kind, own)}
    pairs = zip(
        outputs(lora.attach(model, [(used, 0.7)])), outputs(lora.merge(model, [(used, 0.7)])), outputs(model), strict=True
    )
    for i, (found, expected, plain) in enumerate(pairs):
        assert relative_error(found, expected) < 1e-12 and (i == 0 or relative_error(found, plain) > 1e-3)


def test_several_add_up_each_with_its_coefficient(model, style, tmp_path):
    other = lora.read(lora_files.kohya(tmp_path / "other.safetensors", seed=1), model)
    both = outputs(lora.attach(model, [(style, 0.5), (other, -0.3)]))
    turned = outputs(lora.attach(lora.attach(model, [(other, -0.3)]), [(style, 0.5)]))
    merged = outputs(lora.merge(lora.merge(model, [(style, 0.5)]), [(other, -0.3)]))
    for a, b, c in zip(both, turned, merged, strict=True):
        assert relative_error(a, b) < 1e-12 and relative_error(a, c) < 1e-12


def test_a_coefficient_of_0_leaves_every_bit(model, style):
    for made in (lora.attach(model, [(style, 0.0)]), lora.merge(model, [(style, 0.0)])):
        assert all(torch.equal(a, b) for a, b in zip(outputs(made), outputs(model), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_gives_back_the_very_bits(model, style, convolutions, tmp_path, dtype):
    single = dataclasses.replace(
        model,
        unet=ldm.build("tiny", seed=1, dtype=dtype).unet,
        text_encoder=ldm.build("tiny", seed=1, dtype=dtype).text_encoder,
    )
    before = bits(single)
    merged = lora.merge(lora.merge(single, [(style, 0.8)]), [(convolutions, 2.0)])
    assert not same_bits(merged, before) and same_bits(single, before)
    back = lora.unmerge(dataclasses.replace(merged, name="renamed"))
    assert same_bits(back, before) and back.name == "renamed" and back.adapters == ()
    assert same_bits(lora.unmerge(back), before)
    held = [bytes(t.contiguous().view(torch.uint8).numpy()) for t in bits(back).values()]
    assert held == [bytes(t.contiguous().view(torch.uint8).numpy()) for t in before.values()]


def test_what_does_not_change_is_shared(model, style):
    attached, merged = lora.attach(model, [(style, 1.0)]), lora.merge(model, [(style, 1.0)])
    changed = {f"{path}.weight" for kind, path in style.layers if kind == "unet"}
    for name, weight in model.unet.named_parameters():
        assert attached.unet.get_parameter(name) is weight
        assert (merged.unet.get_parameter(name) is weight) == (name not in changed)


def test_receipts_tell_of_loras_and_the_models_fingerprint_stays(model, style):
    attached = lora.attach(model, [(style, 0.8)])
    told = {"kind": "lora", "name": "kohya", "sha256": style.sha256, "coefficient": 0.8, "left": []}
    assert attached.adapters == (told,) and model.adapters == ()
    assert fingerprint({"unet": attached.unet}) == fingerprint({"unet": model.unet})
    assert lora.merge(model, [(style, 0.8)]).adapters == ({**told, "merged": True},)


# -- In the pipelines ------------------------------------------------------------------------------------------------------

SMALL = {"width": 16, "height": 16, "steps": 2, "seed": 1}


def test_a_tag_a_setting_and_an_attached_lora_make_the_same_picture(model, style, files):
    folder = files["kohya"].parent
    expected = ldm.txt2img(lora.attach(model, [(style, 0.8)]), PROMPT, **SMALL)
    by_path = ldm.txt2img(model, PROMPT, loras=[(files["kohya"], 0.8)], **SMALL)
    by_name = ldm.txt2img(model, PROMPT, loras=[("kohya", 0.8)], adapter_folder=str(folder), **SMALL)
    by_tag = ldm.txt2img(model, f"{PROMPT} <lora:kohya:0.8>", adapter_folder=str(folder), **SMALL)
    for made in (by_path, by_name, by_tag):
        assert torch.equal(made.latents, expected.latents)
        assert made.receipts[0]["adapters"] == [dict(expected.receipts[0]["adapters"][0])]
    plain = ldm.txt2img(model, PROMPT, **SMALL)
    assert not torch.equal(plain.latents, expected.latents) and "adapters" not in plain.receipts[0]


def test_a_receipt_with_loras_is_replayed_and_another_file_is_told(model, files, tmp_path):
    (tmp_path / "style.safetensors").write_bytes(files["kohya"].read_bytes())
    made = ldm.txt2img(model, f"{PROMPT} <lora:style:0.8>", adapter_folder=str(tmp_path), **SMALL)
    receipt = json.loads(json.dumps(made.receipts[0]))
    assert ldm.replay(model, receipt).same
    lora_files.kohya(tmp_path / "style.safetensors", seed=1)
    again = ldm.replay(model, receipt)
    assert not again.same and any("adapters" in change for change in again.changes)
    (tmp_path / "style.safetensors").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="LoRA 'style': there is no such file in"):
        ldm.replay(model, receipt)


def test_a_bare_name_is_a_files_before_it_is_a_folders(files, tmp_path, monkeypatch):
    """What a LoRA learned from may lie beside it under its name; a folder as diffusers and PEFT write it is found too."""
    monkeypatch.chdir(tmp_path)
    for name in ("adapters/style", "adapters/saved", "style", "saved"):
        (tmp_path / name).mkdir(parents=True)
    file = tmp_path / "adapters" / "style.safetensors"
    file.write_bytes(files["kohya"].read_bytes())
    assert lookup.find("style", "adapters", "LoRA") == Path("adapters/style.safetensors")
    assert lookup.find("saved", "adapters", "LoRA") == Path("adapters/saved")
    assert lookup.find("./style", None, "LoRA") == Path("style")
    assert lookup.find(str(tmp_path / "style"), "adapters", "LoRA") == tmp_path / "style"


@pytest.mark.parametrize(
    ("prompt", "settings", "complaint"),
    [
        ("a <lora:none:1>", {}, "LoRA 'none': there is no such file; give its path, or the folder it is in"),
        ("a <lora:none:1>", {"adapter_folder": "/nowhere"}, "LoRA 'none': adapter_folder '/nowhere' is no folder"),
        ("a", {"negative_prompt": "<lora:x:1>"}, "the negative prompt names LoRA 'x'"),
        (["a <lora:x:1>", "b"], {}, "prompts 'a <lora:x:1>' and 'b' name other LoRAs; make them in calls of their own"),
        ("a", {"loras": [("x", float("nan"))]}, "LoRA x, coefficient nan; expected a finite number"),
        ("a", {"loras": 3}, "loras 3; expected a list of files or names"),
        ("a", {"loras": [("x", "1", 2)]}, r"LoRA \('x', '1', 2\); expected a file or a name"),
    ],
)
def test_what_cannot_be_attached_is_refused_in_one_line(model, prompt, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        ldm.txt2img(model, prompt, **SMALL, **settings)


# -- Refusals --------------------------------------------------------------------------------------------------------------


def changed(path, change):
    tensors = load_file(lora_files.kohya(path))
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


STEM = "lora_unet_" + lora_files.UNET.replace(".", "_") + "_attn1_to_q"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t[f"{STEM}.lora_up.weight"].fill_(float("nan")), "holds NaN, infinite values or nothing"),
        (lambda t: t.pop(f"{STEM}.lora_up.weight"), "has no up beside it; half of the pair is missing"),
        (lambda t: t.update({f"{STEM}.lora_up.weight": torch.ones(16, 5)}), r"lora_up.weight is \[16, 5\]; expected \[16, 4\]"),
        (lambda t: t.update({f"{STEM}.lora_down.weight": torch.ones(4, 320)}), r"is \[4, 320\]; expected \[4, 16\];"),
        (lambda t: t.update({f"{STEM}.hada_w1_a": torch.ones(4)}), "holds LoHa .* cannot be used here; expected LoRA"),
        (lambda t: t.update({f"{STEM}.dora_scale": torch.ones(4)}), "holds DoRA"),
        (lambda t: t.update({f"{STEM}.alpha": torch.ones(2)}), "alpha has 2 numbers; expected one"),
        (lambda t: t.update({f"{STEM}.lora_up.weight": torch.ones(16, 4, dtype=torch.int64)}), "is of type int64"),
        (lambda t: t.clear() or t.update({"lora_te2_x.lora_up.weight": torch.ones(1)}), "a LoRA of SDXL"),
        (lambda t: t.clear() or t.update({"lora_other.lora_up.weight": torch.ones(1)}), "no layer of this model is in it"),
        (lambda t: t.clear() or t.update({"conv.weight": torch.ones(1)}), "no LoRA; its tensors are named conv.weight"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_lora_of_this_model_is_refused_in_one_line(model, tmp_path, change, complaint):
    before = bits(model)
    path = changed(tmp_path / "x.safetensors", change)
    with pytest.raises(CheckpointError, match=complaint) as raised:
        lora.read(path, model)
    assert str(raised.value).isprintable() and str(path) in str(raised.value) and same_bits(model, before)


def test_a_lora_of_stable_diffusion_2_is_named_by_its_width(tmp_path):
    full = ldm.build("tiny", seed=0)
    name = f"lora_unet_{lora_files.UNET.replace('.', '_')}_attn2_to_k"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(4, 1024), f"{name}.lora_up.weight": torch.ones(16, 4)},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(CheckpointError, match="it was made for another model, as Stable Diffusion v2"):
        lora.read(tmp_path / "x.safetensors", full)


def test_a_pickle_that_runs_code_does_not_run_it(model, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({f"{STEM}.lora_up.weight": Attack()}, tmp_path / "x.pt")
    (tmp_path / "y.ckpt").write_bytes(pickle.dumps(Attack()))
    for name in ("x.pt", "y.ckpt"):
        with pytest.raises(CheckpointError):
            lora.read(tmp_path / name, model)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"not a file of tensors"])
def test_a_file_of_something_else_is_refused(model, tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        lora.read(tmp_path / "x.safetensors", model)
    assert str(raised.value).isprintable()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no LoRA here; expected pytorch_lora_weights"):
        lora.read(tmp_path / "empty", model)
