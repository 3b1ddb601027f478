"""LoRA training: nothing but the factors learns, they learn what the pictures show, a run that was killed ends as if it had not
been, and other programs load the file."""

import dataclasses
import json
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ldm
from ldm.adapters import lora
from ldm.cli import run
from ldm.processes import Processes, generator
from ldm.training import denoising
from ldm.training.data import DataConfig
from ldm.training.lora import LoRARecipe, layers_of, train
from ldm.training.optimiser import OptimiserConfig
from tests import ranks, seeded
from tests.measure import relative_error
from tests.training_runs import killed, largest_difference, steps_of

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
SETTINGS = ("steps=8", "batch=4", "rank=2", "data.size=32", "log_every=2", "save_every=2", "sheet_every=4", "text_encoder=true")


@pytest.fixture(autouse=True)
def _gradients(_inference):
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    folder = tmp_path_factory.mktemp("album")
    draw = np.random.default_rng(0)
    for i, word in enumerate(("red", "green", "blue", "dark", "pale")):
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{word}.png")
        (folder / f"{word}.txt").write_text(f"a {word} picture of noise, number {i}")
    return folder


@pytest.fixture
def command(album, tiny_native, tmp_path):
    """The words of `ldm train lora`, with these settings over the usual ones."""

    def words(*settings, out="x.safetensors", data=album, model=tiny_native):
        line = ["train", "lora", "--data", data, "--model", model, "--out", tmp_path / out, "--device", "cpu", "-q"]
        line += [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        return [str(word) for word in line]

    return words


@pytest.fixture
def trained(command, tmp_path):
    def train_(*settings, out="x.safetensors", **options):
        assert run([*command(*settings, out=out, **options), "--debug"]) == 0
        return tmp_path / out

    return train_


# -- Stopped and resumed, on one process and on several ---------------------------------------------------------------------


def test_a_run_that_was_killed_and_resumed_ends_with_the_same_bytes(command, trained, tmp_path):
    undisturbed = trained(out="undisturbed.safetensors")
    metrics = tmp_path / "killed.run" / "metrics.jsonl"
    assert killed([sys.executable, "-m", "ldm", *command(out="killed.safetensors")], metrics, after=4) == -signal.SIGKILL
    assert not (tmp_path / "killed.safetensors").exists()
    assert trained(out="killed.safetensors").read_bytes() == undisturbed.read_bytes()
    assert steps_of(metrics) == [2, 4, 6, 8]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial")]


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(trained):
    whole, parts = trained(out="whole.safetensors"), trained("steps=4", out="parts.safetensors")
    assert largest_difference(whole, parts) > 0
    assert trained(out="parts.safetensors").read_bytes() == whole.read_bytes()


def test_two_processes_train_the_same_bytes_as_one(command, trained, tmp_path):
    (done,) = ranks.run((2, command("batch=2", "accumulation=2", out="two.safetensors")))
    assert done.status == 0, done.err[-3000:]
    one, parts = trained(out="one.safetensors"), trained("batch=2", "accumulation=2", out="parts.safetensors")
    moved = largest_difference(one, trained("seed=1", out="other.safetensors"))
    assert (tmp_path / "two.safetensors").read_bytes() == parts.read_bytes()
    assert largest_difference(one, parts) < moved / 500


# -- What is learned ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_native):
    return ldm.load(tiny_native)


@pytest.mark.parametrize(("layers", "text_encoder", "count"), [("attention", False, 88), ("attention", True, 96)])
def test_a_model_with_new_factors_is_the_model_and_learns_in_them_alone(plain, layers, text_encoder, count):
    recipe = LoRARecipe(layers=layers, text_encoder=text_encoder)
    of = layers_of(recipe, plain)
    assert len(of) == count
    model, pairs = lora.with_pairs(plain, of, 2, 1.0, generator(0, 0))
    ids, x = plain.tokenizer(["a red cube"]).ids, seeded.tensor("x", 1, 4, 8, 8)
    for module in (plain.unet, plain.text_encoder):
        module.requires_grad_(False)
    assert torch.equal(model.text_encoder(ids), plain.text_encoder(ids))
    eps = model.unet(x, 500, model.text_encoder(ids))
    assert torch.equal(eps, plain.unet(x, 500, plain.text_encoder(ids)))
    eps.square().mean().backward()
    assert all(pair.up.grad.abs().max() > 0 for pair in pairs.values())
    assert {name for name, p in model.unet.named_parameters() if p.requires_grad} == {
        f"{path}.lora.{role}" for (kind, path) in pairs if kind == "unet" for role in ("down", "up")
    }
    assert not any("lora" in name for name, _ in plain.unet.named_parameters())


def test_which_layers_are_trained(plain):
    kinds = {
        name: set(layers_of(LoRARecipe(layers=name, text_encoder=True), plain)) for name in ("attention", "transformer", "all")
    }
    assert kinds["attention"] < kinds["transformer"] < kinds["all"]
    paths = {name: {path for _, path in found} for name, found in kinds.items()}
    assert "middle.attention.proj_in" in paths["transformer"] and "conv_in" not in paths["transformer"]
    assert {"conv_in", "down.0.residual.conv1", "middle.attention.proj_in"} < paths["all"]


def test_the_file_is_the_model_that_was_trained_and_the_weights_have_not_moved(plain, album, tmp_path):
    before = {name: p.clone() for name, p in plain.unet.state_dict().items()}
    seen = {}
    keep = lora.with_pairs

    def watched(*arguments):
        seen["model"], seen["pairs"] = keep(*arguments)
        return seen["model"], seen["pairs"]

    recipe = LoRARecipe(
        **{"rank": 3, "alpha": 2.0, "layers": "all", "text_encoder": True, "steps": 6, "batch": 2, "save_every": 6},
        data=DataConfig(source=str(album), size=64),
        optimiser=OptimiserConfig(learning_rate=1e-2, warm_up=0, ema=0.0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "with_pairs", watched)
        train(recipe, plain, tmp_path / "x.safetensors", ALONE, quiet=True)
    assert all(torch.equal(p, before[name]) for name, p in plain.unet.state_dict().items())
    file = lora.read(tmp_path / "x.safetensors", plain)
    assert set(file.layers) == set(layers_of(recipe, plain)) and not file.left
    ids, x = plain.tokenizer(["a red cube"]).ids, seeded.tensor("x", 1, 4, 8, 8)
    assert [layer for layer, pair in seen["pairs"].items() if pair.up.detach().abs().max() == 0] == []
    expected = seen["model"].unet(x, 500, seen["model"].text_encoder(ids)).detach()
    for made in (lora.attach(plain, [(file, 1.0)]), lora.merge(plain, [(file, 1.0)])):
        assert relative_error(made.unet(x, 500, made.text_encoder(ids)), expected) < 1e-5
    assert relative_error(plain.unet(x, 500, plain.text_encoder(ids)), expected) > 1e-3


def test_it_learns_what_the_pictures_show(tmp_path):
    """The bundled model on one picture: the loss of the same draws, before and after."""
    model = ldm.load()
    Image.new("RGB", (64, 64), (10, 40, 200)).save(tmp_path / "blue.png")
    (tmp_path / "blue.txt").write_text("a wall")
    recipe = LoRARecipe(
        **{"rank": 4, "steps": 30, "batch": 4, "sheet_every": 30, "save_every": 30},
        data=DataConfig(source=str(tmp_path), size=64),
        optimiser=OptimiserConfig(learning_rate=2e-3, warm_up=5, ema=0.0, clip=1.0),
    )
    train(recipe, model, tmp_path / "x.safetensors", ALONE, quiet=True)
    data = recipe.data.open(tmp_path, ALONE)
    pixels = data.images([0]).float() / 127.5 - 1
    draws = denoising.Draws(9, 0, slice(0, 16), (4, 8, 8), timesteps=1000, dropout=0.0)
    learned = lora.attach(model, [(lora.read(tmp_path / "x.safetensors", model), 1.0)])
    with torch.no_grad():
        x0 = model.autoencoder.encode(pixels).mean.expand(16, -1, -1, -1) * model.autoencoder.config.scaling_factor
        losses = []
        for one in (model, learned):
            context = one.text_encoder(one.tokenizer(["a wall"] * 16).ids)
            losses.append(denoising.DenoisingLoss(one.unet, model.schedule, 0.0)(x0, draws.t, draws.noise, context).item())
    assert losses[1] < 0.7 * losses[0], losses


def test_what_a_run_leaves_behind(trained, tmp_path):
    path = trained("rank=3", "alpha=6.0")
    folder = tmp_path / "x.run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8] and all(line["loss"] > 0 for line in lines)
    assert sorted(file.name for file in (folder / "loras").iterdir()) == ["0000004.safetensors", "0000008.safetensors"]
    assert load_file(folder / "loras" / "0000008.safetensors").keys() == load_file(path).keys()
    assert Image.open(folder / "sheets" / "0000008.png").size == (5 * 32, 3 * 32)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["ss_network_dim"] == "3" and told["ss_network_alpha"] == "6.0" and told["ss_steps"] == "8"


def test_pictures_are_made_with_it(trained, tiny_native, tmp_path, capsys):
    path = trained("optimiser.learning_rate=1e-2")
    capsys.readouterr()
    made = {}
    for coefficient in ("0", "1"):
        words = ["txt2img", "a red picture", "--lora", f"{path}:{coefficient}", "--model", str(tiny_native), "--seed", "1"]
        assert run([*words, "-W", "32", "-H", "32", "--steps", "2", "-q", "--out", str(tmp_path / coefficient)]) == 0
        made[coefficient] = np.asarray(Image.open(capsys.readouterr().out.strip()))
    assert made["0"].shape == (32, 32, 3) and not np.array_equal(made["0"], made["1"])


def test_pictures_that_were_changed_are_encoded_again(trained, album, tmp_path):
    (tmp_path / "own").mkdir()
    for path in album.iterdir():
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    first = trained("steps=2", data=tmp_path / "own", out="a.safetensors")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "own" / "red.png")
    caches = set((tmp_path / "a.run" / "data").iterdir())
    trained("steps=4", data=tmp_path / "own", out="a.safetensors")
    assert caches < set((tmp_path / "a.run" / "data").iterdir()) and first.exists()


@pytest.mark.reference
@pytest.mark.parametrize("layers", ["attention", "transformer", "all"])
def test_diffusers_loads_what_was_trained(trained, tiny_diffusers, layers):
    from diffusers import StableDiffusionPipeline

    path = trained(f"layers={layers}", "optimiser.learning_rate=1e-2", "alpha=1.0", model=tiny_diffusers)
    ours, theirs = ldm.load(tiny_diffusers), StableDiffusionPipeline.from_pretrained(tiny_diffusers, safety_checker=None)
    with torch.no_grad():
        ids, x = ours.tokenizer(["a red cube"]).ids, seeded.tensor("x", 1, 4, 8, 8)
        plain = ours.unet(x, 500, ours.text_encoder(ids))
        theirs.load_lora_weights(path)
        made = lora.attach(ours, [(lora.read(path, ours), 1.0)])
        states, expected = made.text_encoder(ids), theirs.text_encoder(ids).last_hidden_state
        assert relative_error(states, expected) < 1e-5
        eps, wanted = made.unet(x, 10, states), theirs.unet(x, 10, states).sample
        assert relative_error(eps, wanted) < 1e-5 and relative_error(plain, wanted) > 1e-3


# -- What is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["layers=most"], "layers 'most'; expected attention, transformer, all"),
        (["data.size=40"], "data.size 40; expected a multiple of 32"),
        (["dropout=1.5"], "dropout 1.5; expected 0 to 1"),
        (["rank=0"], "lora: rank is 0; expected 1 or more"),
        (["dtype=float16"], "dtype 'float16'; expected float32 or bfloat16"),
        (["colour=red"], "lora: unknown setting 'colour'"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_in_one_line(command, tmp_path, capsys, settings, complaint):
    assert run(command(*settings)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line and not (tmp_path / "x.safetensors").exists()


def test_a_file_that_is_there_already_is_left_as_it_is(command, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_text("mine")
    assert run(command()) == 1
    assert "exists already, and is of no run that could go on" in capsys.readouterr().err
    assert (tmp_path / "x.safetensors").read_text() == "mine" and not (tmp_path / "x.run").exists()


@pytest.mark.parametrize(
    ("out", "complaint"), [("x.pt", "a LoRA is a .safetensors file"), ("none/x.safetensors", "there is no folder")]
)
def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_trained(command, capsys, out, complaint):
    assert run(command(out=out)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_a_run_on_another_model_is_not_gone_on_with(command, trained, tiny_native, tmp_path, capsys):
    trained("steps=2")
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_native.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tensors = load_file(other / "unet.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, other / "unet.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    assert run(command(model=other)) == 1
    assert "holds a run with model" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_a_lora_needs_pictures(tmp_path, capsys):
    assert run(["train", "lora", "--out", str(tmp_path / "x.safetensors"), "-q"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a LoRA needs --data DIR: pictures with captions" in line


def test_an_inpainting_model_is_refused(album, tmp_path):
    model = ldm.build("tiny", seed=0)
    config = {**vars(model.unet.config), "in_channels": 9}
    inpainting = dataclasses.replace(model, unet=type(model.unet)(type(model.unet.config)(**config)))
    recipe = LoRARecipe(data=DataConfig(source=str(album), size=32))
    with pytest.raises(ValueError, match="the UNet takes 9 channels; expected 4: a LoRA for inpainting is trained on"):
        train(recipe, inpainting, tmp_path / "x.safetensors", ALONE)
