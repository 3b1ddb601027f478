"""The bundled model: it ships whole and small, is the default, and its pictures show what their prompts say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ldm
from ldm import images
from ldm.checkpoint import bundled_folder
from ldm.cli import run
from ldm.evaluation import composition
from ldm.scenes import judge
from ldm.scenes.captions import Statement
from ldm.scenes.world import draw
from ldm.training import autoencoder
from ldm.training.data import Scenes, to_unit
from ldm.training.judge import accuracy

CUBE, SPHERE = (None, "red", "cube"), (None, "blue", "sphere")
SENTENCE = "a red cube on top of a blue sphere"


@pytest.fixture(scope="module")
def model():
    return ldm.load("bundled")


@pytest.fixture(scope="module")
def referee():
    return judge.load(bundled_folder() / "judge.safetensors")


def shown(referee, pictures):
    return judge.verdicts(referee, torch.cat([images.to_tensor(picture, picture.size) for picture in pictures]))


def test_it_is_small_and_in_half_precision():
    files = sorted(bundled_folder().iterdir())
    assert sum(file.stat().st_size for file in files) <= 60e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    expected = ["autoencoder", "image_encoder", "judge", "text_encoder", "unet"]
    assert [file.stem for file in weights] == expected
    for file in weights:
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}  # noqa: SIM118


def test_it_has_the_architecture_of_stable_diffusion(model):
    assert model.autoencoder.config.downsampling == 8 and model.autoencoder.config.latent_channels == 4
    assert model.text_encoder.config.context_length == 77
    assert model.schedule == ldm.build("tiny", seed=0).schedule
    assert model.safety is None


def test_its_log_tells_how_it_was_made():
    log = json.loads((bundled_folder() / "training.json").read_text())
    assert set(log["stages"]) == {"judge", "autoencoder", "clip", "unet"}
    for stage in log["stages"].values():
        assert stage["curve"][-1]["step"] == stage["recipe"]["steps"] and stage["seconds"] > 0
    assert log["gate"]["psnr"] >= 30 and log["gate"]["judge_on_renders"] - log["gate"]["judge_on_reconstructions"] <= 0.03
    assert log["emissions"]["kg"] > 0
    assert (bundled_folder().parent / "MODEL_CARD.md").stat().st_size > 1000


def test_the_command_line_makes_a_picture_with_it_by_default(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LDM_MODEL", raising=False)
    assert run(["txt2img", SENTENCE, "--seed", "1", "--out", str(tmp_path), "--quiet"]) == 0
    (path,) = capsys.readouterr().out.split()
    assert ldm.read_receipt(path)["model"]["name"] == "bundled"
    assert images.read(path).size == (64, 64)


def test_the_judge_is_right_on_fresh_renders(referee):
    fresh = Scenes(12345, 400, 64, split="any")
    pictures = to_unit(fresh.images(range(len(fresh))))
    assert accuracy(referee, pictures, [fresh.scene(i) for i in range(len(fresh))]) >= 0.99


def test_the_autoencoder_keeps_what_the_judge_sees(model, referee):
    fresh = Scenes(12346, 120, 64, split="any")
    scenes, pictures = [fresh.scene(i) for i in range(len(fresh))], to_unit(fresh.images(range(len(fresh))))
    remade, latents = autoencoder.reconstruct(model.autoencoder, pictures)
    assert autoencoder.psnr(remade, pictures).mean() >= 30
    assert accuracy(referee, remade, scenes) >= accuracy(referee, pictures, scenes) - 0.03
    spread = (latents * model.autoencoder.config.scaling_factor).std((0, 2, 3))
    assert 0.9 < (latents * model.autoencoder.config.scaling_factor).std() < 1.1
    assert spread.min() > 0.4  # no channel is dead


def test_eight_seeds_of_the_model_cards_sentence_show_it(model, referee):
    made = ldm.txt2img(model, SENTENCE, seed=1, num_images=8, batch_size=8)
    assert shown(referee, made.images) == 8 * [("stacked", (SPHERE, CUBE))]


def test_the_order_of_the_words_decides(model, referee):
    made = ldm.txt2img(model, "a blue sphere on top of a red cube", seed=1, num_images=8, batch_size=8)
    assert shown(referee, made.images).count(("stacked", (CUBE, SPHERE))) >= 7


def test_its_compositions_are_right(model, referee):
    """The full figures, of 500 prompts a split, are in the model card; this is what a minute can show of them."""
    assert composition.evaluate(model, referee, "seen", 40).accuracy() > 0.9
    assert composition.evaluate(model, referee, "held_out", 40).accuracy() > 0.9


def test_image_to_image_keeps_the_more_the_weaker_it_is(model):
    fresh = Scenes(12347, 1, 64)
    (source,) = images.to_images(to_unit(fresh.images([0])))
    pixels = images.to_tensor(source, source.size)
    apart = []
    for strength in (0.3, 0.6, 0.9):
        made = ldm.img2img(model, SENTENCE, source, strength=strength, seed=1).images[0]
        apart.append((images.to_tensor(made, made.size) - pixels).square().mean().item())
    assert apart == sorted(apart) and apart[0] < apart[2] / 3


# -- The measure itself --------------------------------------------------------------------------------------------------


def test_a_score_counts_each_part():
    said = Statement(nouns=(CUBE, SPHERE), relations=((0, "on top of", 1),))
    verdicts = {
        ("stacked", (SPHERE, CUBE)): ("number", "colours", "shapes", "relation", "all"),
        ("stacked", (CUBE, SPHERE)): ("number", "colours", "shapes"),
        ("side by side", (SPHERE, CUBE)): ("number", "colours", "shapes"),
        ("stacked", ((None, "red", "sphere"), (None, "blue", "cube"))): ("number", "colours", "shapes", "relation"),
        ("stacked", ((None, "blue", "sphere"), (None, "red", "cone"))): ("number", "colours", "relation"),
        ("alone", (CUBE,)): (),
    }
    for verdict, right in verdicts.items():
        score = composition.score([said], [verdict])
        assert {part for part, count in score.right.items() if count} == set(right), verdict


def test_wilsons_interval():
    score = composition.Score(count=10, right={"all": 8})
    assert score.interval() == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Newcombe 1998, table I's method
    low, high = composition.Score(count=500, right={"all": 500}).interval()
    assert high == pytest.approx(1) and low > 0.99


def test_the_cases_of_a_split_are_of_it():
    for split in composition.SPLITS:
        asked = composition.cases(split, 30)
        assert len({case.prompt for case in asked}) > 25
        assert all(
            case.scene == draw(composition.SEED, i, split=composition.SPLITS[split], layouts=composition.PAIRS)
            for i, case in enumerate(asked)
        )
    with pytest.raises(ValueError, match="split 'all'; expected one of seen, held_out"):
        composition.cases("all", 1)


def test_a_file_that_is_no_judge_is_refused(tmp_path):
    for path in (tmp_path / "none.safetensors", Path(__file__), bundled_folder() / "unet.safetensors"):
        with pytest.raises(ValueError, match="holds no judge that can be read") as raised:
            judge.load(path)
        assert "\n" not in str(raised.value)
