"""The guidance Pareto: what it reads, that its figures are right, and that they depend neither on processes nor on stops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm import images
from ldm.checkpoint import Components
from ldm.cli import run as command
from ldm.evaluation import caption_file, embeddings, features, frechet, pareto, plot
from ldm.pipelines.agreement import Agreement
from ldm.presets import preset
from ldm.processes import Processes
from ldm.scenes.render import render
from ldm.scenes.world import draw
from tests import ranks
from tests.conftest import write_native
from tests.refusal import one_line

COUNT = 36  # more than are embedded at once
SCALES = (1.5, 4.0)
SETTINGS = {"steps": 2, "seed": 3, "batch_size": 18, "safety": "off"}
ALONE = Processes(rank=0, count=1, device="cpu")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """The tiny model, whose pictures are 32 x 32 where nothing else is asked for."""
    unet = {**vars(preset("tiny").unet), "sample_size": 4}
    return write_native(tmp_path_factory.mktemp("native") / "tiny", unet=unet)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with captions, and with pictures of several sizes and kinds in folders."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "captions.txt").write_text("".join(f"a cube and {i} spheres\n" for i in range(COUNT + 2)))
    (folder / "reference" / "more").mkdir(parents=True)
    for i, pixels in enumerate(render([draw(5, i) for i in range(COUNT)], 64)):
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        name = f"more/{i:02}.JPG" if i % 3 else f"{i:02}.png"
        picture.resize((64 + i % 2, 64)).save(folder / "reference" / name)
    (folder / "reference" / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def words(given, small_model):
    """The command, but for --out."""
    options = {"captions": given / "captions.txt", "reference": given / "reference", "guidance-scale": "1.5,4", "count": COUNT}
    options |= {"steps": 2, "seed": 3, "batch-size": 18, "model": small_model, "clip": "bundled", "resize": "bicubic"}
    options |= {"device": "cpu"}
    return ["evaluate", "-q", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def instrument():
    return features.clip("bundled", resize="bicubic")


@pytest.fixture(scope="module")
def measured(given, small_model, instrument, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("measured") / "out"
    torch.set_num_threads(1)
    measure(given, ldm.load(small_model), instrument, out)
    return out


def measure(given: Path, model: Components, instrument, out: Path, tell=lambda stage, done, count: None) -> dict:
    captions = caption_file.read(given / "captions.txt", COUNT)
    plan = pareto.Plan(captions=captions, reference=given / "reference", out=out, scales=SCALES, settings=SETTINGS)
    return pareto.measure(model, plan, Agreement(ALONE), clip=instrument, instrument=instrument, tell=tell)


def figures(out: Path) -> dict:
    """All that the report says, but for the time."""
    report = json.loads((out / "pareto.json").read_text())
    for point in report["points"]:
        assert set(point.pop("seconds")) == {"pictures", "features"}
    return report


# -- Figures


def test_the_figures_are_those_of_the_pictures_in_the_folder(measured, given, instrument):
    """Read again, one after the other, and looked at in one go."""
    captions = [f"a cube and {i} spheres" for i in range(COUNT)]
    paths = sorted(p for p in (given / "reference").rglob("*") if p.suffix != ".txt" and p.is_file())
    reference = frechet.statistics(instrument.pictures([images.read(path) for path in paths]), instrument)
    report = figures(measured)
    assert [point["guidance_scale"] for point in report["points"]] == list(SCALES)
    for point in report["points"]:
        folder = measured / f"guidance-{point['guidance_scale']:g}"
        seen = instrument.pictures([images.read(folder / f"{i:05}-{3 + i}.png") for i in range(COUNT)])
        distance = frechet.distance(frechet.statistics(seen, instrument), reference).value
        a, b = seen.double().numpy(), instrument.texts(captions).double().numpy()
        cosines = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
        assert point["fid"] == pytest.approx(distance, rel=1e-5)
        assert point["clip_score"] == pytest.approx(cosines.mean(), rel=1e-5)
        assert point["clip_score_error"] == pytest.approx(cosines.std(ddof=1) / 6, rel=1e-4)
    assert report["points"][0]["fid"] != report["points"][1]["fid"]


def test_the_report_says_what_was_measured_and_how(measured, instrument):
    report = figures(measured)
    assert (report["count"], report["seed"], report["model"]["name"], report["captions"]["file"]) == (
        36,
        3,
        "tiny",
        "captions.txt",
    )
    assert report["fid"]["label"] == "FID on CLIP features" and "not comparable" in report["fid"]["note"]
    assert report["fid"]["resize"] == report["clip_score"]["resize"] == instrument.resize
    assert report["settings"]["steps"] == 2 and report["settings"]["sampler"] == "pndm"
    assert report["reference"] == {"folder": "reference", "count": COUNT}
    (warning,) = report["warnings"]
    assert "36 pictures for 256 features" in warning
    receipt = ldm.read_receipt(measured / "guidance-1.5" / "00007-10.png")
    assert (receipt["seed"], receipt["guidance_scale"], receipt["prompt"]) == (10, 1.5, "a cube and 7 spheres")


def test_two_processes_find_the_same_figures_to_the_last_bit(measured, words, tmp_path):
    done = ranks.run((2, [*words, "--out", str(tmp_path / "two")]))[0]
    assert done.status == 0 and done.err.count("\n") == 1 and "not full rank" in done.err, done
    assert figures(tmp_path / "two") == figures(measured)
    assert done.out.count("\n") == 7 and "FID on CLIP features" in done.out and "bicubic" in done.out


def test_what_is_missing_is_made_again_and_the_figures_are_the_same(measured, words, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(measured, out)
    before = figures(out)
    (embedded,) = (out / "guidance-4" / "features").glob("*/*/00001.npy")
    embedded.write_bytes(embedded.read_bytes()[:-100])
    for path in (out / "guidance-4" / "00003-6.png", out / "pareto.json", *out.glob("reference-*.safetensors")):
        path.unlink()
    kept = {path: path.stat().st_ino for path in out.rglob("*.png")}
    assert command([*words, "--out", str(out), "--json", str(tmp_path / "figures.json")]) == 0
    assert figures(out) == before
    assert {path: path.stat().st_ino for path in kept} == kept
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads((out / "pareto.json").read_text())
    assert images.read(out / "pareto.png").size == (960, 600)
    assert capsys.readouterr().out.endswith(f"{out / 'pareto.png'}\n")


def test_a_run_that_is_stopped_at_every_portion_comes_to_the_same(measured, given, small_model, instrument, tmp_path):
    stops, model = [], ldm.load(small_model)
    for _ in range(40):
        told = []

        def tell(stage, done, count, told=told):
            told.append(stage)
            if len(told) == 2:
                raise KeyboardInterrupt

        try:
            measure(given, model, instrument, tmp_path / "out", tell)
            break
        except KeyboardInterrupt:
            stops.append(told[1])
    assert set(stops) >= {"reference", "guidance 1.5, pictures", "guidance 1.5, features", "guidance 4, features"}
    assert figures(tmp_path / "out") == figures(measured)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_reference_is_looked_at_once(measured, given, small_model, instrument, monkeypatch):
    monkeypatch.setattr(embeddings, "of_pictures", lambda *_: pytest.fail("pictures were looked at"))
    paths = embeddings.pictures_below(given / "reference")
    kept = embeddings.of_reference(instrument, given / "reference", paths, measured, Agreement(ALONE), lambda *_: None)
    assert kept.count == COUNT and kept.fingerprint == instrument.fingerprint
    with pytest.raises(pytest.fail.Exception):  # of fewer pictures, other statistics
        embeddings.of_reference(instrument, given / "reference", paths[1:], measured, Agreement(ALONE), lambda *_: None)


def test_fids_through_inception_are_called_so(given, small_model, instrument, tmp_path, monkeypatch):
    """Weights of chance: what is shown is which instrument sees what."""
    from ldm.evaluation.inception import Inception

    torch.manual_seed(0)
    network = Inception().eval()
    monkeypatch.setattr("ldm.evaluation.inception.load", lambda file, device: network)
    inception = features.inception(tmp_path / "weights.pth", resize="clean")
    captions = caption_file.read(given / "captions.txt", 2)
    plan = pareto.Plan(captions=captions, reference=given / "reference", out=tmp_path / "out", scales=(2.0,), settings=SETTINGS)
    paths = embeddings.pictures_below(given / "reference")[:2]
    monkeypatch.setattr(embeddings, "pictures_below", lambda folder: paths)
    report = pareto.measure(ldm.load(small_model), plan, Agreement(ALONE), clip=instrument, instrument=inception)
    assert (report["fid"]["label"], report["fid"]["note"], report["fid"]["features"]) == ("FID", None, 2048)
    assert report["fid"]["resize"] != report["clip_score"]["resize"]
    assert len(list((tmp_path / "out" / "guidance-2" / "features").glob("*/*"))) == 2
    kept = frechet.read(next((tmp_path / "out").glob("reference-*.safetensors")))
    assert (len(kept.mean), kept.count) == (2048, 2)


def test_counts_that_differ_much_are_warned_of():
    def counted(*counts):
        return frechet.Distance(value=1.0, of_means=1.0, of_covariances=0.0, counts=counts, warnings=())

    assert pareto._warnings(counted(300, 600)) == []
    (said,) = pareto._warnings(counted(300, 5000))
    assert "300 pictures against 5,000 of the reference" in said


def test_without_matplotlib_a_note_says_so(measured, words, tmp_path, capsys, monkeypatch):
    shutil.copytree(measured, tmp_path / "out")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert command([*words, "--out", str(tmp_path / "out")]) == 0
    assert "no plot without matplotlib; install it with: pip install 'ldm[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "pareto.png").exists()


# -- Refusals


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--count", "0"), "count 0; expected 1 or more"),
        (("--count", "1"), "1 caption; a distance needs 2 pictures at least"),
        (("--count", "99"), "captions.txt: holds 38 captions; 99 were asked for"),
        (("--guidance-scale", "1,x"), "guidance scale '1,x'; expected a number, or several with commas"),
        (("--guidance-scale", "1,-2"), "guidance_scale -2.0; expected a finite number, 0 or more"),
        (("--guidance-scale", "3,3.0"), "guidance scales 3, 3; expected each of them once"),
        (("--reference", "/no"), "/no: is no folder; expected one with pictures to compare with"),
        (("--reference", "/dev/shm"), "/dev/shm: holds 0 pictures"),
        (("--resize", "nearest"), "resize 'nearest'; expected one of none, bicubic"),
        (("--resize", "clean"), "resize 'clean'; expected one of none, bicubic"),
        (("--resize", "none"), "CLIP of bundled takes 64 x 64; resize it"),
        (("--inception", "/no.pth"), "/no.pth"),
        (("--clip", "/no"), "/no: no CLIP here"),
        (("--cache", "/no"), "/no: is no folder; create it first"),
        (("--json", "/no/a.json"), "there is no folder /no; create it first"),
        (("--judge", "a"), "--judge is for --composition; leave it out"),
        (("--steps", "0"), "steps 0; expected a whole number from 1"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused_in_one_line_before_anything_is_made(words, tmp_path, capsys, more, expected):
    out = tmp_path / "out"
    status = command([*words, "--out", str(out), *more])
    printed = capsys.readouterr()
    assert (status, printed.out, out.exists()) == (1, "", False), printed.err
    assert expected in one_line(printed.err.removesuffix("\n")) and printed.err.count("\n") == 1


def test_other_settings_in_the_same_folder_are_refused(measured, words, tmp_path, capsys):
    shutil.copytree(measured, tmp_path / "out")
    assert command([*words, "--out", str(tmp_path / "out"), "--seed", "4"]) == 1
    assert "guidance-1.5: holds a run with seed 3 and not 4; go on with those" in capsys.readouterr().err
    assert figures(tmp_path / "out") == figures(measured)


def test_a_model_without_a_clip_asks_for_one(words, tmp_path, capsys):
    without = [word for word in words if word not in ("--clip", "bundled", "--resize", "bicubic")]
    assert command([*without, "--out", str(tmp_path / "out")]) == 1
    assert one_line(capsys.readouterr().err[:-1]).endswith("name a CLIP to measure with: --clip SOURCE")


def test_options_of_one_kind_are_not_passed_over_in_the_other(capsys):
    assert command(["evaluate", "--composition", "--clip", "bundled"]) == 1
    assert "--clip is for --captions; leave it out" in capsys.readouterr().err
    assert command(["evaluate", "--captions", "/no", "--out", "/no"]) == 1
    assert "--captions needs --reference DIR too" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command(["evaluate"])
    assert stop.value.code == 2
