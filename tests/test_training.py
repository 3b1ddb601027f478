"""Training: the losses are those of the papers, and a run that was killed ends as if it had not been. Many processes:
`test_training_processes.py`."""

import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ldm
from ldm.cli import run
from ldm.diffusion.schedule import ScheduleConfig, alpha_bar
from ldm.models.unet import UNet, UNetConfig
from ldm.processes import Processes, generator
from ldm.scenes.judge import Judge
from ldm.training import autoencoder, clip, denoising, judge, recipe, unet
from ldm.training.data import DataConfig, Folder, Scenes, batch_of, drawn, keep
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig, _matrix
from tests.training_runs import RECIPE, RESULT, killed, largest_difference, opened, steps_of
from weights_convert.architecture import Sampling

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
JUDGE = """
[judge]
count = 64
steps = 4
batch = 8
log_every = 2
unseen = 16
"""
GATE = """
[gate]
psnr = 1.0
lost = 1.0
count = 8
"""


@pytest.fixture(autouse=True)
def _gradients(_inference):
    """Unlike in all other tests."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def _one_thread():
    """As in the processes that are started: another number of threads adds up in another order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, _one_thread):
    return opened(tmp_path_factory.mktemp("workshop"))


# -- Stopped and resumed, on one process and on several ---------------------------------------------------------------------


@pytest.mark.parametrize("stage", RESULT)
def test_a_run_that_was_killed_and_resumed_ends_with_the_same_bytes(workshop, tmp_path, stage):
    undisturbed = workshop.train(stage, tmp_path / "undisturbed")
    after = random.Random(stage).choice((2, 4, 6))
    status = killed(workshop.command(stage, tmp_path / "killed"), tmp_path / "killed" / "metrics.jsonl", after)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "killed" / RESULT[stage]).exists()
    resumed = workshop.train(stage, tmp_path / "killed")
    assert resumed.read_bytes() == undisturbed.read_bytes()
    steps = steps_of(tmp_path / "killed" / "metrics.jsonl")
    assert steps == sorted(steps) and steps == steps_of(tmp_path / "undisturbed" / "metrics.jsonl")


def test_accumulating_micro_batches_is_training_on_the_whole_batch(workshop, tmp_path):
    for stage in ("autoencoder", "unet"):
        plain = ("optimiser.name=adamw", "steps=4", "sheet_every=4")
        whole = workshop.train(stage, tmp_path / f"{stage}-whole", "batch=4", *plain)
        parts = workshop.train(stage, tmp_path / f"{stage}-parts", "batch=2", "accumulation=2", *plain)
        assert largest_difference(whole, parts) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["clip", "unet"])
def test_a_compiled_run_trains_the_same_model(workshop, tmp_path, stage):
    plain = workshop.train(stage, tmp_path / "plain", "optimiser.name=adamw")
    compiled = workshop.train(stage, tmp_path / "compiled", "optimiser.name=adamw", "compile=true")
    assert largest_difference(plain, compiled) < 1e-5


def test_what_unet_training_makes_is_a_model_that_makes_pictures(workshop, tmp_path):
    workshop.train("unet", tmp_path / "run")
    model = ldm.load(tmp_path / "run" / "model")
    result = ldm.txt2img(model, "a red cube on top of a blue sphere", steps=2, seed=0)
    assert result.images[0].size == (64, 64)
    assert len(model.tokenizer.vocabulary) == 645
    sheets = sorted((tmp_path / "run" / "sheets").iterdir())
    assert [sheet.name for sheet in sheets] == ["0000005.png", "0000010.png"]
    assert Image.open(sheets[0]).size == (8 * 64, 3 * 64)


def test_a_trained_model_can_be_trained_on(workshop, tmp_path):
    workshop.train("unet", tmp_path / "run")
    command = ["train", "unet", "--model", tmp_path / "run" / "model", "--out", tmp_path / "more", "--device", "cpu", "-q"]
    command += ["--set", "steps=2", "--set", "batch=2", "--set", "data.count=8", "--set", "optimiser.learning_rate=0.0"]
    assert run([*map(str, command)]) == 0
    assert largest_difference(tmp_path / "run" / RESULT["unet"], tmp_path / "more" / RESULT["unet"]) == 0


def test_resuming_with_another_recipe_is_refused(workshop, tmp_path, capsys):
    workshop.train("autoencoder", tmp_path / "run")
    command = workshop.command("autoencoder", tmp_path / "run", "batch=8")
    assert run([part for part in command[command.index("train") :] if part != "--debug"]) == 1
    assert "holds a run with batch x accumulation 4 and not 8" in capsys.readouterr().err.splitlines()[-1]


def test_resuming_with_other_data_or_other_networks_is_refused(workshop, tmp_path, capsys):
    words = ["train", "unet", "--out", tmp_path / "run", "--device", "cpu", "-q", "--recipe", workshop.folder / "recipe.toml"]

    def refusal(text_encoder, *settings):
        models = ("--autoencoder", workshop.folder / "autoencoder" / "model", "--text-encoder", text_encoder)
        status = run([str(word) for word in (*words, *models, "--set", "steps=2", *settings)])
        return capsys.readouterr().err.splitlines()[-1] if status else ""

    own = workshop.folder / "clip" / "model"
    other = workshop.train("clip", tmp_path / "clip", "seed=1", "steps=2").parent
    assert refusal(own) == ""
    assert "holds a run with base " in refusal(other)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(name)
    words[3] = tmp_path / "photo run"
    words += ["--data", photos]
    assert refusal(own) == refusal(own) == ""
    os.utime(photos / "a.png")  # as a copy of the folder has it: the same samples
    assert refusal(own) == ""
    Image.new("RGB", (64, 64)).save(photos / "c.png")
    (photos / "c.txt").write_text("c")
    assert "holds a run with samples 2 pictures, " in refusal(own)


@pytest.mark.parametrize(
    ("stage", "settings", "complaint"),
    [
        ("autoencoder", ["data.size=60"], "data.size 60; expected a multiple of 8"),
        ("clip", ["data.size=32"], "data.size 32 with image.image_size 64; expected the same"),
        ("clip", ["vocabulary=clip"], "text.vocabulary_size 645 for 49408 tokens; expected at least that many"),
        ("clip", ["vocabulary=mine"], "vocabulary 'mine'; expected clip or scenes"),
        ("clip", ["text.width=48"], "image.projection_width 32 with text.width 48; expected the same"),
        ("clip", ["image.width=42"], "image.width 42; expected a multiple of 4, for the waves that places begin as"),
        ("clip", ["accumulation=2"], "accumulation 2; contrasts are within a micro-batch, so it must be 1 here"),
        ("unet", ["data.size=32"], "data.size 32 with model.sample_size 8; expected 8 pixels a latent"),
        ("unet", ["model.context_width=768"], "model.context_width 768 with a text encoder 32 wide; expected the same"),
        ("autoencoder", ["dtype=float16"], "dtype 'float16'; expected float32 or bfloat16"),
        ("autoencoder", ["optimiser.name=sgd"], "optimiser 'sgd'; expected adamw or muon"),
        ("judge", ["stepz=3"], "judge: unknown setting 'stepz'"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused_in_one_line(workshop, tmp_path, capsys, stage, settings, complaint):
    command = workshop.command(stage, tmp_path / "run", *settings)
    if stage == "judge":
        at = command.index("--recipe")
        del command[at : at + 2]
    assert run([part for part in command[command.index("train") :] if part != "--debug"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["autoencoder", "--base", "x"], "--model is for unet and lora, not for autoencoder"),
        (["lora", "--autoencoder", "x"], "--autoencoder is for unet, not for lora"),
        (["unet"], "a UNet needs --model MODEL to go on from, or --autoencoder MODEL and --text-encoder MODEL"),
        (["judge", "--data", "x"], "--data is not for judge, which is made of drawn scenes"),
        (["bundled", "--set", "a=1"], "--set is for one stage; for bundled, write a recipe and name it with --recipe"),
        (["clip", "--recipe", "none.toml"], "none.toml: cannot be read as TOML"),
        (["unet", "--base", "none"], "none: there is no such file or folder"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, options, complaint):
    assert run(["train", *options, "--out", str(tmp_path / "run"), "-q"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line and not (tmp_path / "run").exists()


def test_bundled_training_goes_from_nothing_to_a_model(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE + JUDGE + GATE + "[sampling]\nguidance_scale = 2.5\n")
    command = ["train", "bundled", "--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.toml"), "-q"]
    assert run(command) == 0
    made = tmp_path / "out" / "bundled"
    model = ldm.load(made)
    assert model.guidance_scale == 2.5
    assert ldm.txt2img(model, "a cone", steps=1, seed=0).images[0].size == (64, 64)
    log = json.loads((made / "training.json").read_text())
    assert list(log["stages"]) == ["judge", "autoencoder", "clip", "unet"]
    assert log["seconds"] > 0 and log["gate"]["psnr"] > 1
    assert log["emissions"]["kg"] == pytest.approx(log["seconds"] / 3600 * 0.25 * 0.30, rel=0.01)

    assert log["machine"]["processes"] == 1

    before = {file.name: file.read_bytes() for file in made.iterdir() if file.suffix == ".safetensors"}
    assert run(command) == 0  # all stages are there already
    assert {file.name: file.read_bytes() for file in made.iterdir() if file.suffix == ".safetensors"} == before


def test_no_unet_is_trained_on_a_poor_autoencoder(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE + JUDGE + "[gate]\ncount = 8\n")
    command = ["train", "bundled", "--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.toml"), "-q"]
    assert run(command) == 1
    assert "a UNet needs 30.0 dB and at most 3% lost: train it for longer" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "unet").exists() and not (tmp_path / "out" / "bundled").exists()


# -- The losses ----------------------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """A network that returns what it is told to, whatever it sees."""

    def __init__(self, answer):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 4, 1)
        self.answer, self.seen = answer, None

    def forward(self, x, t, context):
        self.seen = x
        return self.answer


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_the_unets_loss_is_the_weighted_error_of_what_it_predicts(prediction, min_snr):
    schedule = ScheduleConfig(prediction=prediction)
    draw = torch.Generator().manual_seed(0)
    x0, noise, answer = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(3))
    t = torch.tensor([0, 400, 999])
    network = Echo(answer)
    loss = denoising.DenoisingLoss(network, schedule, min_snr)(x0, t, noise, torch.zeros(3, 7, 5))

    remaining = alpha_bar(schedule)[t].float()
    expected = 0.0
    for i, kept in enumerate(remaining.tolist()):
        x = math.sqrt(kept) * x0[i] + math.sqrt(1 - kept) * noise[i]
        assert torch.allclose(network.seen[i], x, atol=1e-6)
        snr = kept / (1 - kept)
        if prediction == "epsilon":  # arXiv:2303.09556, section 3.4
            wanted, weight = noise[i], min(snr, min_snr) / snr if min_snr else 1.0
        else:
            wanted = math.sqrt(kept) * noise[i] - math.sqrt(1 - kept) * x0[i]
            weight = min(snr, min_snr) / (snr + 1) if min_snr else 1.0
        expected += weight * (answer[i] - wanted).square().mean().item() / 3
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_one_caption_in_ten_is_dropped_and_every_timestep_is_drawn():
    draws = [denoising.Draws(0, step, slice(0, 500), (4, 2, 2), timesteps=1000, dropout=0.1) for step in range(40)]
    dropped = torch.cat([d.dropped for d in draws]).float().mean().item()
    assert abs(dropped - 0.1) < 0.01
    t = torch.cat([d.t for d in draws])
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 10
    again = denoising.Draws(0, 7, slice(0, 500), (4, 2, 2), timesteps=1000, dropout=0.1)
    some = denoising.Draws(0, 7, slice(20, 30), (4, 2, 2), timesteps=1000, dropout=0.1)
    for name in ("t", "dropped", "posterior", "noise"):
        assert torch.equal(getattr(some, name), getattr(again, name)[20:30])  # a row's are its own, whoever asks
    assert torch.equal(again.noise, draws[7].noise) and not torch.equal(draws[6].noise, draws[7].noise)
    assert abs(torch.corrcoef(torch.stack([again.noise.flatten(), again.posterior.flatten()]))[0, 1]) < 0.03


def test_what_the_judge_drops_is_a_rows_own():
    """So that it does not depend on how processes divide a batch among them."""
    made = judge.JudgeRecipe()
    all_rows, some = (judge.Draws(made, 3, rows) for rows in (slice(0, 8), slice(5, 7)))
    for name in ("mirrored", "brightness", "blur", "noise", "grain", "kept"):
        assert torch.equal(getattr(some, name), getattr(all_rows, name)[5:7])
    assert all_rows.kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert all_rows.kept.mean() == pytest.approx(1, abs=0.05)
    model, pictures = Judge().train(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first, again, dropped = (model(pictures, kept)[0] for kept in (None, None, some.kept))
    assert torch.equal(first, again) and not torch.equal(first, dropped)


def test_a_new_unet_predicts_nothing_and_learns_everywhere():
    torch.manual_seed(0)
    config = UNetConfig(level_widths=(16, 32), attention_levels=(True, True), heads=2, context_width=8, norm_groups=8)
    model = UNet(config)
    unet.initialise(model)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    assert model(x, torch.tensor([3, 700]), context).abs().max() == 0
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):  # one layer after the other comes alive
        optimiser.zero_grad()
        (model(x, torch.tensor([3, 700]), context) - x).square().mean().backward()
        optimiser.step()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_the_contrastive_loss_is_clips_where_each_text_fits_one_picture():
    draw = torch.Generator().manual_seed(1)
    pictures, texts = (nn.functional.normalize(torch.randn(6, 10, generator=draw), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    loss, right = clip.contrast(pictures, texts, texts[:0], scale, torch.eye(6, dtype=torch.bool))
    logits = 7.0 * pictures @ texts.T  # Radford et al. 2021, figure 3
    truth = torch.arange(6)
    expected = (nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(logits.T, truth)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert right.item() == pytest.approx((logits.argmax(1) == truth).float().mean().item())


def test_texts_that_fit_a_picture_share_it_and_false_ones_take_from_it():
    pictures = torch.eye(3)
    twins = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    shared, _ = clip.contrast(pictures[[0, 0, 2]], twins, twins[:0], torch.tensor(50.0), same)
    assert shared.item() == pytest.approx(math.log(2) * 2 / 3, rel=1e-3)  # evenly between two: the least that can be
    far, _ = clip.contrast(pictures, pictures, -pictures, torch.tensor(50.0), torch.eye(3, dtype=torch.bool))
    near, right = clip.contrast(pictures, pictures, pictures, torch.tensor(50.0), torch.eye(3, dtype=torch.bool))
    assert far < 1e-6 and near.item() == pytest.approx(math.log(2) / 2, rel=1e-3) and right == 1


def test_the_waves_of_places_tell_each_place_from_all_others_and_know_distance():
    """Moving both places by as much leaves their product as it is: what is between them is all that counts."""
    places = clip.waves(8, 64)
    products = (places @ places.T).unflatten(0, (8, 8)).unflatten(2, (8, 8))
    assert places.abs().max() <= 1 and torch.allclose(places.square().sum(1), torch.tensor(32.0))
    assert (places @ places.T).fill_diagonal_(0).max() < 32 * 0.97
    assert torch.allclose(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], atol=1e-4)


def test_texts_that_are_cut_short_have_the_same_embedding():
    torch.manual_seed(2)
    from ldm.models.clip import TextConfig, TextEncoder, pool

    model = TextEncoder(TextConfig(vocabulary_size=50, width=16, layers=2, heads=2, mlp_width=32)).eval()
    ids = torch.full((2, 77), 49)
    ids[0, :6], ids[1, :9] = torch.arange(6), torch.arange(9)
    short = clip._short(ids, 49)
    assert short.shape == (2, 10)
    assert torch.allclose(pool(model(ids), ids, 49), pool(model(short), short, 49), atol=1e-6)


def test_the_reconstruction_error_minds_hue_and_edges():
    grey, image = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    assert autoencoder.reconstruction_error(image, grey)[0] == 0
    bright, red = image + 0.1, image.clone()
    red[:, 0] += 0.1 * math.sqrt(3)  # the same MSE, but of hue
    (a, mse_a), (b, mse_b) = (autoencoder.reconstruction_error(x, grey) for x in (bright, red))
    assert mse_a.item() == pytest.approx(mse_b.item()) == pytest.approx(0.01)
    assert a.item() == pytest.approx(3 * 0.01 + 0.3 * 0.1, rel=1e-5)
    assert b.item() == pytest.approx(3 * 0.01 + 0.3 * 0.1 / math.sqrt(3) + 3 * 0.01 * 2 / 3, rel=1e-5)


def test_psnr_is_in_decibels_of_a_range_of_two():
    image = torch.zeros(2, 3, 4, 4)
    assert autoencoder.psnr(image + torch.tensor([0.2, 0.02])[:, None, None, None], image).tolist() == pytest.approx([20, 40])


# -- Optimisers ----------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_stays_and_falls():
    config = OptimiserConfig(warm_up=10, cool_down=0.25)
    course = Optimiser(nn.Linear(2, 2), config, 100).course
    assert [course(0), course(4), course(9), course(50), course(75)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert [course(80), course(99)] == pytest.approx([0.8, 0.04])
    assert Optimiser(nn.Linear(2, 2), OptimiserConfig(warm_up=4), 10).course(9) == 1


def test_adamw_is_torchs():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    mine = Optimiser(ours, OptimiserConfig(learning_rate=1e-2, warm_up=0), 10)
    other = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    for step in range(5):
        x = torch.randn(6, 4)
        for model in (ours, theirs):
            model(x).square().sum().backward()
        mine.step(step)
        other.step()
        other.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_turns_the_gradient_of_a_convolution_into_an_orthogonal_step(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3), nn.GroupNorm(4, 24)).to(memory_format=layout)
    weight, before = model[0].weight, model[0].weight.detach().clone()
    assert _matrix(weight.detach(), weight).data_ptr() == weight.data_ptr()
    optimiser = Optimiser(model, OptimiserConfig(name="muon", learning_rate=0.01, warm_up=0, weight_decay=0.0), 10)
    model(torch.randn(2, 16, 8, 8).to(memory_format=layout)).square().mean().backward()
    optimiser.step(0)
    moved = torch.linalg.svdvals((weight.detach() - before).flatten(1))
    assert moved.max() / moved.min() < 2.5  # torch's five iterations bring singular values to about 1, not exactly
    assert 0.1 < moved.mean() / (0.01 * 0.2 * math.sqrt(16 * 9)) < 2  # of AdamW's size (arXiv:2502.16982)


def test_an_unknown_optimiser_is_refused():
    with pytest.raises(ValueError, match="optimiser 'sgd'; expected adamw or muon"):
        Optimiser(nn.Linear(2, 2), OptimiserConfig(name="sgd"), 1)


def test_gradients_are_cut_to_the_norm_that_is_allowed():
    model = nn.Linear(2, 1, bias=False)
    optimiser = Optimiser(model, OptimiserConfig(clip=1.0, warm_up=0), 5)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert optimiser.step(0).item() == pytest.approx(5)
    state = optimiser.parts[0].state[model.weight]["exp_avg"]
    assert state.tolist()[0] == pytest.approx([0.06, 0.08])


def test_the_average_follows_quickly_at_first_and_slowly_later():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = MovingAverage(model, 0.99)
    nn.init.ones_(model.weight)
    average.update(0)
    assert average.average["weight"].item() == pytest.approx(0.9)
    average.update(10_000)
    assert average.average["weight"].item() == pytest.approx(0.901)


# -- Data ----------------------------------------------------------------------------------------------------------------


def test_every_pass_sees_every_index_once_in_a_new_order():
    seen = [i for step in range(20) for i in batch_of(3, step, 7, 35)]
    passes = [seen[i : i + 35] for i in range(0, 140, 35)]
    assert all(sorted(one) == list(range(35)) for one in passes)
    assert passes[0] != passes[1] and passes[0] != list(range(35))
    assert batch_of(3, 5, 7, 35) == seen[35:42] and batch_of(4, 5, 7, 35) != seen[35:42]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_of(0, 0, 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_random_numbers_depend_on_seed_step_and_purpose_alone():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 2, 1)]
    draws = {key: torch.randn(4, generator=generator(*key)) for key in keys}
    assert all(torch.equal(draws[key], torch.randn(4, generator=generator(*key))) for key in keys)
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(keys)


def test_scenes_are_the_same_from_the_file_and_drawn_anew(tmp_path):
    cached, fresh = drawn(Scenes(1, 20, 16), tmp_path, ALONE), Scenes(1, 20, 16)
    assert cached.file is not None
    assert torch.equal(cached.images([3, 0, 19]), fresh.images([3, 0, 19]))
    assert cached.captions([3, 4]) == fresh.captions([3, 4])
    assert len(set(fresh.captions(range(20)))) > 15


def test_a_kept_file_that_was_cut_short_is_made_again(tmp_path):
    def fail_at_the_end(indices):
        if max(indices) > 200:
            raise KeyboardInterrupt
        return torch.tensor(indices, dtype=torch.float32)[:, None]

    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "numbers.npy", 300, (1,), fail_at_the_end)
    assert not (tmp_path / "numbers.npy").exists()
    keep(tmp_path / "numbers.npy", 300, (1,), lambda indices: torch.tensor(indices, dtype=torch.float32)[:, None])
    assert np.load(tmp_path / "numbers.npy")[:, 0].tolist() == list(range(300))


@pytest.fixture
def album(tmp_path):
    for i, (name, size) in enumerate((("b.png", (40, 20)), ("a.jpg", (20, 40)), ("c.webp", (16, 16)), ("silent.png", (9, 9)))):
        Image.new("RGB", size, (60 * i, 100, 200)).save(tmp_path / name)
    for name, text in (("b", "a blue square\n"), ("a", "another"), ("c", "größer")):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_folder_gives_pictures_with_the_texts_beside_them(album):
    data = Folder(album, 16)
    assert data.captions(range(len(data))) == ["another", "a blue square", "größer"]
    images = data.images([1, 0, 1])
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8
    assert images[0, :, 8, 8].tolist() == [0, 100, 200] and torch.equal(images[0], images[2])


def test_a_folder_may_bring_a_table_instead(album):
    lines = [{"file_name": "b.png", "text": "first"}, {"file_name": "silent.png", "text": "second"}]
    (album / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = Folder(album, 16)
    assert data.captions([0, 1]) == ["first", "second"]
    assert DataConfig(source=str(album), size=16).open(album, ALONE).images([1])[0, :, 4, 4].tolist() == [180, 100, 200]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"file_name": "b.png"}', 'line 1: expected {"file_name": ..., "text": ...}'),
        ("[1]", 'line 1: expected {"file_name": ..., "text": ...}'),
        ('{"file_name": "none.png", "text": "x"}', "line 1: there is no picture none.png"),
    ],
)
def test_a_table_that_is_wrong_is_told_by_its_line(album, line, complaint):
    (album / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError) as raised:
        Folder(album, 16)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_without_captions_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds no picture with a caption; expected name.txt beside name.png"):
        Folder(tmp_path, 16)
    with pytest.raises(ValueError, match="there is no such folder"):
        Folder(tmp_path / "none", 16)


def test_blank_text_is_no_caption(tmp_path):
    for name, text in (("a", "a cube"), ("b", ""), ("c", " \n")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    data = Folder(tmp_path, 16)
    assert data.captions(range(len(data))) == ["a cube"] and "2 no caption" in data.drops.summary()
    rows = [
        {"file_name": "a.png", "text": " a cube "},
        {"file_name": "b.png", "text": " "},
        {"file_name": "c.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Folder(tmp_path, 16)
    assert data.captions(range(len(data))) == ["a cube"] and "2 no caption" in data.drops.summary()


def test_a_folder_of_ones_own_is_trained_on(workshop, album, tmp_path_factory):
    out = tmp_path_factory.mktemp("own")
    for stage, settings in (("autoencoder", ["data.size=16"]), ("unet", ["data.size=16", "model.sample_size=2"])):
        command = workshop.command(stage, out / stage, *settings)
        assert run([*command[command.index("train") :], "--data", str(album)]) == 0
        assert (out / stage / RESULT[stage]).exists()


# -- Recipes -------------------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_differs_and_the_rest_stays():
    made = recipe.make(clip.CLIPRecipe, {"batch": 4, "optimiser": {"warm_up": 7}, "text": {"width": 64}}, "here")
    assert made.batch == 4 and made.optimiser.warm_up == 7 and made.text.width == 64
    assert made.optimiser.beta2 == clip.CLIPRecipe().optimiser.beta2 == 0.98
    assert made.text.layers == 12


def test_settings_are_put_over_a_recipe():
    table = recipe.with_settings(
        {"batch": 4, "model": {"heads": 2}}, ["batch=8", "model.level_widths=[8, 16]", "dtype=bfloat16"]
    )
    assert table == {"batch": 8, "model": {"heads": 2, "level_widths": [8, 16]}, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"stepz": 3}, "here: unknown setting 'stepz'; known are model, data, optimiser, steps"),
        ({"steps": "many"}, "here: steps is 'many'; expected something like 10000"),
        ({"steps": True}, "here: steps is True; expected something like 10000"),
        ({"batch": 0}, "here: batch is 0; expected 1 or more, and finite"),
        ({"kl_weight": float("nan")}, "here: kl_weight is nan; expected 0 or more, and finite"),
        ({"model": {"level_widths": [8, 0]}}, "here, model: level_widths is 0; expected 1 or more, and finite"),
        ({"model": 3}, "here: model is 3; expected a table of settings"),
        ({"model": {"level_widths": ["a"]}}, "here, model: level_widths is 'a'; expected something like 128"),
    ],
)
def test_a_recipe_that_is_wrong_is_told_by_its_setting(table, complaint):
    with pytest.raises(ValueError) as raised:
        recipe.make(autoencoder.AutoencoderRecipe, table, "here")
    assert str(raised.value).startswith(complaint)


@pytest.mark.parametrize("setting", ["batch", "=3", "batch.size=3"])
def test_a_setting_that_is_none_is_refused(setting):
    with pytest.raises(ValueError, match="setting '"):
        recipe.with_settings({"batch": 4}, [setting])


def test_the_bundled_models_recipe_is_one():
    from ldm.training import bundled, judge

    tables = recipe.read(bundled.RECIPE)
    kinds = {
        "judge": judge.JudgeRecipe,
        "autoencoder": autoencoder.AutoencoderRecipe,
        "clip": clip.CLIPRecipe,
        "unet": unet.UNetRecipe,
        "gate": bundled.GateRecipe,
        "power": bundled.PowerRecipe,
        "sampling": Sampling,
    }
    assert set(tables) <= set(kinds)
    for name, table in tables.items():
        recipe.make(kinds[name], table, name)
