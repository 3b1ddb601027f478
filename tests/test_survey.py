"""The survey of the bundled model: its figures are those of the pictures in its folder, and it goes on where it was stopped."""

import json

import numpy as np
import pytest
import torch

import ldm
from ldm import images
from ldm.checkpoint import bundled_folder
from ldm.cli import run as command
from ldm.evaluation import composition, features, frechet, survey, survey_plot
from ldm.evaluation.clip_score import clip_score
from ldm.evaluation.reconstruction import Reconstruction, reconstruction
from ldm.pipelines.agreement import Agreement
from ldm.processes import Processes
from ldm.scenes import judge
from ldm.scenes.render import render
from ldm.scenes.world import draw

COUNT = 3
POINTS = {"guidance": [survey.Point(steps=2, guidance_scale=scale) for scale in (1.0, 3.0)]}


@pytest.fixture(scope="module")
def model():
    return ldm.load()


@pytest.fixture(scope="module")
def referee():
    return judge.load(bundled_folder() / "judge.safetensors")


@pytest.fixture
def surveyed(model, referee, tmp_path, monkeypatch):
    """Call it in a folder of the test, on little."""
    monkeypatch.setattr(survey, "axes", lambda scale: POINTS)
    monkeypatch.setattr(survey, "RENDERS", 2 * survey.PART)
    monkeypatch.setattr(survey, "REMADE", 0)
    monkeypatch.setattr(survey.Reconstruction, "mean", lambda parts: Reconstruction(psnr=1.0, ssim=1.0, count=1))
    alone = Agreement(Processes(rank=0, count=1, device=torch.device("cpu")))
    return lambda: survey.survey(model, referee, features.clip("bundled"), tmp_path / "out", alone, count=COUNT)


def test_the_figures_are_those_of_the_pictures_and_a_stopped_survey_goes_on(surveyed, referee, tmp_path):
    report = surveyed()
    assert json.loads((tmp_path / "out" / "survey.json").read_text()) == json.loads(json.dumps(report))
    made = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.png")}
    assert len(made) == 2 * 2 * COUNT
    clip = features.clip("bundled")
    for point in report["points"]:
        pictures, prompts = [], []
        for split in ("seen", "held_out"):
            cases = composition.cases(split, COUNT)
            there = [images.read(tmp_path / "out" / point["name"] / split / f"{i:05}-{i}.png") for i in range(COUNT)]
            said = judge.verdicts(referee, torch.cat([images.to_tensor(picture, picture.size) for picture in there]))
            score = composition.score([case.statement for case in cases], said)
            assert all(point[split][part] == score.accuracy(part) for part in composition.PARTS)
            pictures, prompts = pictures + there, prompts + [case.prompt for case in cases]
        score = clip_score(clip.pictures(pictures), clip.texts(prompts))
        assert point["clip_score"] == pytest.approx(score.mean, rel=1e-6)
        renders = torch.cat([render(list(reference(split)), 64) for split in ("train", "held_out")])
        seen = clip.pictures(images.to_images(renders.float() / 127.5 - 1))
        distance = frechet.distance(*(frechet.statistics(part, clip) for part in (clip.pictures(pictures), seen)))
        assert point["fid"] == pytest.approx(distance.value, rel=1e-6)
    assert report["ceiling"]["renders"]["fid"] < min(point["fid"] for point in report["points"])
    assert report["warnings"]  # six pictures for 256 features
    gone = next(iter(made))
    gone.unlink()
    again = surveyed()
    assert again["points"] == report["points"] and gone.read_bytes() == made[gone]


def reference(split):
    for i in range(survey.PART):
        yield draw(903, survey.REFERENCE_FROM + i, split=split, layouts=composition.PAIRS)


def test_the_axes_vary_one_thing_each():
    axes = survey.axes(3.0)
    assert {(p.sampler, p.steps) for p in axes["guidance"]} == {("pndm", 50)}
    assert {(p.sampler, p.guidance_scale) for p in axes["steps"]} == {("pndm", 3.0)}
    assert {(p.steps, p.guidance_scale) for p in axes["sampler"]} == {(survey.FEW_STEPS, 3.0)}
    assert {"pndm", "ddim", "euler", "dpmpp_2m"} <= {p.sampler for p in axes["sampler"]}
    assert survey.Point() in axes["guidance"] and survey.Point() in axes["steps"]  # measured once


def test_reconstruction_is_measured_as_it_is_seen(model):
    pytest.importorskip("torchmetrics")
    pixels = render([draw(5, i) for i in range(4)], 64)
    found = reconstruction(model.autoencoder, pixels)
    latents = model.autoencoder.encode(pixels.float() / 127.5 - 1).mode()
    remade = images.to_images(model.autoencoder.decode(latents))
    errors = [
        np.mean((np.asarray(one, dtype=float) - there.permute(1, 2, 0).numpy()) ** 2)
        for one, there in zip(remade, pixels, strict=True)
    ]
    assert found.psnr == pytest.approx(np.mean([10 * np.log10(255**2 / error) for error in errors]), abs=0.02)
    assert 0.9 < found.ssim < 1 and found.count == 4
    noisy = (pixels + torch.randint(0, 40, pixels.shape, dtype=torch.uint8)).to(torch.uint8)
    assert reconstruction(model.autoencoder, noisy).ssim < found.ssim


def test_parts_are_averaged_by_their_counts():
    parts = [Reconstruction(psnr=30.0, ssim=0.9, count=3), Reconstruction(psnr=40.0, ssim=1.0, count=1)]
    whole = Reconstruction.mean(parts)
    assert (whole.psnr, whole.ssim, whole.count) == (pytest.approx(32.5), pytest.approx(0.925), 4)


def test_a_report_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    right = {"all": 0.9, "interval": [0.8, 0.95]}
    figures = {"seen": right, "held_out": right, "fid": 3.0, "clip_score": 0.8}
    rows = survey.axes(3.0)
    points = {point.name: {"name": point.name, **vars(point), **figures} for row in rows.values() for point in row}
    report = {"model": "bundled", "count": {"prompts of each split": 3, "renders": 9}, "points": list(points.values())}
    report["ceiling"] = {"renders": figures}
    survey_plot.plot({**report, "axes": {name: [p.name for p in row] for name, row in rows.items()}}, tmp_path / "survey.png")
    picture = np.asarray(images.read(tmp_path / "survey.png").convert("L"))
    assert picture.shape[1] > 1000 and (picture < 128).mean() > 0.005


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "--survey needs --out DIR too"),
        (["--out", "x", "--count", "1"], "count 1; expected 2 or more"),
        (["--out", "x", "--guidance-scale", "2"], "--guidance-scale is for --composition and --captions"),
        (["--out", "x", "--reference", "y"], "--reference is for --captions"),
        (["--out", "x", "--json", "no/where.json"], "there is no folder"),
    ],
)
def test_what_cannot_be_surveyed_is_refused_in_one_line(tmp_path, capsys, monkeypatch, more, expected):
    monkeypatch.chdir(tmp_path)
    assert command(["evaluate", "--survey", *more]) == 1
    assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())
