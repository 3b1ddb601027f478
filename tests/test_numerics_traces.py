"""Traces: what is written is read, in order, bounded in memory; what is damaged gets one line; a port without torch."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ldm
from ldm.numerics import traces
from ldm.numerics.compare import arranged, compare, difference
from ldm.numerics.diagnosis import diagnose
from ldm.numerics.runs import trace_txt2img
from ldm.numerics.traces import Key, Trace, TraceError, TraceWriter
from ldm.numerics.tracing import Tracer, names_of
from tests import numpy_port, seeded
from tests.refusal import one_line

RUN = {"prompt": "a red cube", "steps": 3, "width": 64, "height": 64, "seed": 1}


@pytest.fixture(scope="module")
def model():
    return ldm.build("tiny", seed=0)


def write(path, tensors, about=None):
    with TraceWriter(path, about) as writer:
        for name, call, tensor in tensors:
            writer.add(name, tensor, call=call)
    return path


# -- Written and read


def test_what_is_written_is_read_in_order_and_to_the_bit(tmp_path):
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64)
    given = [(f"a.{i}", i % 3 or None, seeded.tensor(f"{i}", 3, 5).to(dtype)) for i, dtype in enumerate(types)]
    given += [("a.0", None, torch.ones(())), ("a.0", None, seeded.tensor("t", 4, 6).t())]
    trace = Trace(write(tmp_path / "a", given, {"x": 1}))
    assert [(key.name, key.call) for key in trace.keys] == [(name, call) for name, call, _ in given]
    assert [key.repeat for key in trace.keys][-2:] == [1, 2] and trace.about == {"x": 1} and trace.calls == 3
    for key, (_, _, tensor) in zip(trace.keys, given, strict=True):
        assert trace[key].dtype == tensor.dtype and torch.equal(trace[key], tensor)


def test_a_tensor_is_kept_as_it_was_when_it_was_noted_down(tmp_path):
    x = torch.zeros(3)
    with TraceWriter(tmp_path / "a") as writer:
        writer.add("x", x)
        x += 1
        writer.add("y", x)
    trace = Trace(tmp_path / "a")
    assert trace[Key("x")].tolist() == [0, 0, 0] and trace[Key("y")].tolist() == [1, 1, 1]


def test_many_tensors_go_into_many_files_and_what_waits_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "SHARD", 4096)
    given = [("x", i, torch.full((256,), float(i))) for i in range(64)]
    trace = Trace(write(tmp_path / "a", given))
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 16
    assert all((trace[Key("x", i)] == i).all() for i in range(64))


def test_nothing_is_there_before_the_end_nor_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), TraceWriter(tmp_path / "a") as writer:
        writer.add("x", torch.ones(2))
        assert not (tmp_path / "a").exists()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(traces, "save_file", full)
    with pytest.raises(TraceError, match="cannot be written") as caught:
        write(tmp_path / "a", [("x", None, torch.ones(2))])
    assert "No space left on device" in one_line(caught.value) and list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_and_a_folder_that_is_not_there_are_refused(tmp_path):
    write(tmp_path / "a", [("x", None, torch.ones(2))])
    for path, expected in ((tmp_path / "a", "exists already"), (tmp_path / "no" / "a", "there is no folder")):
        with pytest.raises(TraceError, match=expected):
            TraceWriter(path)


def damaged(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest, path)
    if (path / "manifest.json").exists() and isinstance(manifest, dict):
        (path / "manifest.json").write_text(json.dumps(manifest))
    return path


DAMAGES = [
    (lambda m, p: m.update(format="other"), 'is not of a trace; expected "format": "ldm trace"'),
    (lambda m, p: m.update(version=2), "is of version 2; expected 1"),
    (lambda m, p: m.update(tensors={}), 'expected "tensors", a list'),
    (lambda m, p: m["tensors"].append(3), "tensor 1: expected an object with name, file, key"),
    (lambda m, p: m["tensors"][0].update(call=-1), "call is -1; expected a whole number from 0"),
    (lambda m, p: m["tensors"][0].update(call=True), "call is True"),
    (lambda m, p: m["tensors"][0].update(file="../b.safetensors"), "expected the name of a file in the trace's own folder"),
    (lambda m, p: m["tensors"][0].update(key="none"), "has no tensor 'none', which the manifest names for x"),
    (lambda m, p: m["tensors"][0].update(file="none.safetensors"), "is missing, though the manifest names it"),
    (lambda m, p: (p / "00000.safetensors").write_bytes(b"\0" * 50), "is no safetensors file, or a damaged one"),
    (lambda m, p: (p / "00000.safetensors").write_bytes((p / "00000.safetensors").read_bytes()[:-4]), "or a damaged one"),
    (lambda m, p: (p / "00000.safetensors").unlink(), "is missing"),
]


@pytest.mark.parametrize(("change", "expected"), DAMAGES)
def test_a_damaged_trace_is_refused_in_one_line(tmp_path, change, expected):
    path = damaged(write(tmp_path / "a", [("x", None, torch.ones(2))]), change)
    with pytest.raises(TraceError) as caught:
        Trace(path)
    assert expected in one_line(caught.value) and str(path) in str(caught.value)


def test_what_is_no_trace_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    for name, expected in (
        ("file", "is a file"),
        ("folder", "has no manifest.json"),
        ("none", "no such folder"),
        ("bad", "no JSON"),
    ):
        with pytest.raises(TraceError) as caught:
            Trace(tmp_path / name)
        assert expected in one_line(caught.value)


# -- Tracing


def test_every_part_of_any_module_is_noted_down_and_the_hooks_are_gone_after_it(tmp_path):
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    x = seeded.tensor("x", 5, 3)
    with TraceWriter(tmp_path / "a") as writer, Tracer(writer, {"mine": module}, only=("mine.0", "mine.2*")):
        out = module(x)
    module(x)
    trace = Trace(tmp_path / "a")
    assert [str(key) for key in trace.keys] == ["mine.0", "mine.2.0", "mine.2"]
    assert torch.equal(trace[Key("mine.2")], out) and torch.equal(trace[Key("mine.0")], module[0](x))


def test_a_trace_tells_of_the_run_and_changes_nothing_in_it(model, tmp_path):
    traced = trace_txt2img(model, path=tmp_path / "a", **RUN)
    plain = ldm.txt2img(model, **RUN)
    trace = Trace(tmp_path / "a")
    assert torch.equal(traced.latents, plain.latents) and trace.about["run"] == json.loads(json.dumps(plain.receipts[0]))
    assert torch.equal(trace[Key("sampler.x", 3)], plain.latents) and trace.calls == 4
    assert trace[Key("picture")].numpy().tobytes() == plain.images[0].tobytes()
    names = {key.name for key in trace.keys}
    assert {"text_encoder.ids", "unet.x", "unet.t", "unet.context", "autoencoder.latents", "sampler.eps"} <= names
    leaves = [path for path, part in model.unet.named_modules() if isinstance(part, nn.Conv2d | nn.GroupNorm | nn.Linear)]
    assert {f"unet.{path}" for path in leaves} <= names


def test_the_same_run_gives_the_same_bytes(model, tmp_path):
    for name in "ab":
        trace_txt2img(model, path=tmp_path / name, **RUN)
    hashes = [
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert hashes[0] == hashes[1] and len(hashes[0]) > 1


def test_compvis_parts_get_our_names():
    """Modules with CompVis's paths and sizes, as its own classes would make them."""
    from weights_convert import architecture
    from weights_convert.naming import shapes

    sizes = shapes(
        architecture.UNet(level_widths=(16, 32, 48), attention_levels=(True, True, False), context_width=32), "compvis"
    )
    root = nn.Module()
    for name, size in sizes.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.register_parameter(last, nn.Parameter(torch.zeros(size)))
    names, ours = names_of("unet", root)
    assert not ours and names["input_blocks.1"] == "down.0" and names["input_blocks.1.1"] == "down.0.attention"
    assert names["output_blocks.2.1.conv"] == "up.2.upsample" and names["middle_block"] == "middle"
    assert names["input_blocks.1.1.transformer_blocks.0.attn2.to_k"] == "down.0.attention.block.cross_attention.key"


# -- Comparing


@pytest.mark.parametrize(
    ("turn", "how"),
    [
        (lambda x: x, ""),
        (lambda x: x.permute(0, 2, 3, 1), "channels last"),
        (lambda x: x.flatten(2).transpose(1, 2), "a row of pixels"),
        (lambda x: x.flatten(2), "a row of pixels, channels first"),
        (lambda x: x.flatten(2)[:, :, :-1], None),
    ],
)
def test_another_arrangement_is_recognised(turn, how):
    x = seeded.tensor("x", 2, 3, 4, 6)
    found = arranged(x.shape, turn(x))
    assert (found is None) == (how is None)
    if found is not None:
        assert found[1] == how and torch.equal(found[0], x)


def test_measures_are_what_they_say():
    a, b = torch.tensor([3.0, -4.0, 1.0]), torch.tensor([3.0, -4.0, 1.0 + 2**-20])
    found = difference(Key("x"), a, b, 1e-6)
    assert (found.largest, found.relative, found.ulp) == (2**-20, 2**-22, 0.0) and not found.past
    assert difference(Key("x"), a, b, 1e-8).past
    assert difference(Key("x"), a, a + 2 * 2**-22, 1).ulp == 2.0 and difference(Key("x"), a, -a, 1).cosine == pytest.approx(-1)
    nan = torch.tensor([3.0, torch.nan, 1.0])
    assert difference(Key("x"), a, nan, 1e-3).past and not difference(Key("x"), nan, nan, 1e-3).past
    assert difference(Key("x"), torch.zeros(2), torch.ones(2), 1e-3).past
    assert difference(Key("x"), torch.zeros(2, 3), torch.ones(5), 1e-3).past


def test_the_first_tensor_past_tolerance_is_told_in_the_order_of_a(tmp_path):
    x = seeded.tensor("x", 4)
    a = Trace(write(tmp_path / "a", [("one", 0, x), ("two", 0, x), ("three", 0, x), ("mine", None, x)]))
    b = Trace(write(tmp_path / "b", [("three", 0, x + 1), ("two", 0, x + 1e-2), ("one", 0, x + 1e-7), ("yours", None, x)]))
    found = compare(a, b)
    assert found.first.key == Key("two", 0) and (found.only_a, found.only_b) == (["mine"], ["yours"])
    assert compare(a, b, tolerance=1.0).first.key == Key("three", 0)


def test_texts_are_matched_by_their_ids(tmp_path):
    ids, states = torch.tensor([[1, 2], [3, 4]]), seeded.tensor("s", 2, 2, 5)
    together = write(tmp_path / "a", [("text_encoder.ids", None, ids), ("text_encoder.x", None, states)])
    apart = [
        (name, None, rows[i : i + 1]) for i in (1, 0) for name, rows in (("text_encoder.ids", ids), ("text_encoder.x", states))
    ]
    found = compare(Trace(together), Trace(write(tmp_path / "b", apart)))
    assert len(found.rows) == 2 and found.first is None and all(row.relative == 0 for row in found.rows)
    alike = [("text_encoder.ids", None, ids[[0, 0]]), ("text_encoder.x", None, states[[0, 0]] + 1)]
    found = compare(Trace(write(tmp_path / "c", alike)), Trace(tmp_path / "b"))
    assert [row.key.name for row in found.rows] == ["text_encoder.ids", "text_encoder.x"]
    assert found.rows[1].largest == pytest.approx(1)


# -- A port without torch


def test_the_port_in_numpy_is_found_right_and_a_fault_in_it_is_found(tiny_native, tmp_path):
    model = ldm.load(tiny_native)
    trace_txt2img(model, path=tmp_path / "ours", **RUN)
    words = (sys.executable, numpy_port.__file__, tiny_native, tmp_path / "ours", tmp_path / "theirs")
    blocked = "import sys; sys.modules['torch'] = sys.modules['ldm'] = None; import runpy; sys.argv = sys.argv[1:]; "
    subprocess.run([sys.executable, "-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')", *words[1:]], check=True)
    ours, theirs = Trace(tmp_path / "ours"), Trace(tmp_path / "theirs")
    found = diagnose(ours, theirs, model)
    assert found.guilty is None and found.comparison.first is None and len(found.comparison.rows) > 250
    assert max(row.relative for row in found.added.values()) < 2e-6

    class Wrong(numpy_port.Port):
        def group_norm(self, name, x, eps=1e-5):
            return super().group_norm(name, x, 1e-5)

    numpy_port.main(tiny_native, tmp_path / "ours", tmp_path / "wrong", Wrong)
    found = diagnose(ours, Trace(tmp_path / "wrong"), model)
    assert found.guilty.key == Key("unet.down.0.attention.norm", 0)
    assert found.known[0].startswith("GroupNorm's eps is 1e-05, where ours is 1e-06")


def test_names_of_the_page_for_writers_of_ports_are_those_of_a_trace(tmp_path):
    """The page names what SD v1 has; so does its architecture, without its weights."""
    import re

    from ldm.models.autoencoder import Autoencoder
    from ldm.models.clip import TextEncoder
    from ldm.models.unet import UNet
    from ldm.presets import preset

    page = (Path(__file__).parents[1] / "docs" / "traces.md").read_text()
    named = set(re.findall(r"`((?:text_encoder|unet|autoencoder)\.[\w.]+)`", page))
    config = preset("sd-v1")
    with torch.device("meta"):
        modules = {"text_encoder": TextEncoder(config.text_encoder), "unet": UNet(config.unet)}
        modules["autoencoder"] = Autoencoder(config.autoencoder)
    known = {f"{kind}.{path}" for kind, module in modules.items() for path, _ in module.named_modules()}
    known |= {"text_encoder.ids", "unet.x", "unet.t", "unet.context", "autoencoder.latents"}
    assert len(named) > 15 and named <= known


def test_files_of_a_trace_are_plain_safetensors(tmp_path):
    path = write(tmp_path / "a", [("x", 0, torch.ones(2))])
    (entry,) = json.loads((path / "manifest.json").read_text())["tensors"]
    assert torch.equal(load_file(path / entry["file"])[entry["key"]], torch.ones(2))
    save_file({"k": torch.ones(2)}, path / "more.safetensors")
    manifest = {"format": "ldm trace", "version": 1, "tensors": [{"name": "x", "file": "more.safetensors", "key": "k"}]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert Trace(path).keys == [Key("x")]
