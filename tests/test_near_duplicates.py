"""The search for memorised pictures: planted copies are found, the search is exact, and what is kept on disk is right."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageEnhance

from ldm import images
from ldm.cli import run
from ldm.evaluation import features, folder_features, near_duplicates
from ldm.evaluation.folder_features import look
from ldm.evaluation.near_duplicates import nearest, report
from ldm.output import files
from ldm.scenes.render import render
from ldm.scenes.world import draw
from tests import seeded
from tests.refusal import one_line

COPIES = ("brighter.png", "cropped.png", "exact.png", "recoded.jpg", "shifted.png")


def renders(seed, count):
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in render([draw(seed, i) for i in range(count)], 64, rays=1)]


def noise(seed, count):
    values = seeded.values("noise", (count, 16, 16, 3), seed).view(np.uint32) % 256
    return [Image.fromarray(x) for x in values.astype(np.uint8)]


def save(pictures, folder):
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def clip():
    return features.clip("bundled", resize="bicubic")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Renders as a training set; others, with five copies of the first among them."""
    top = tmp_path_factory.mktemp("duplicates")
    training, made = renders(5, 52), renders(6, 16)
    save(training, top / "training")
    folder = save(made, top / "made")
    ImageEnhance.Brightness(training[10]).enhance(1.1).save(folder / COPIES[0])
    training[20].crop((1, 1, 63, 63)).resize((64, 64), Image.Resampling.BICUBIC).save(folder / COPIES[1])
    training[30].save(folder / COPIES[2])
    training[40].save(folder / COPIES[3], quality=85)
    ImageChops.offset(training[50], 1, 0).save(folder / COPIES[4])
    return top


@pytest.fixture(scope="module")
def looked_at(folders, clip):
    """Both folders' features."""
    return [look(folders / name, clip, cache=folders / "cache") for name in ("made", "training")]


class Counting:
    """An instrument of a few numbers, each a picture's mean colour and brightness; counts what it was shown."""

    name, resize, width, fingerprint = "colours", "none", 4, "colours"

    def __init__(self):
        self.shown = 0

    def pictures(self, given):
        import torch

        self.shown += len(given)
        means = [np.array(picture, dtype=np.float32).mean(axis=(0, 1)) for picture in given]
        return torch.tensor(np.array([[*mean, mean.sum() + 1] for mean in means]), dtype=torch.float32)


def in_memory(tmp_path, name, rows):
    """Features of pictures that nobody needs to see."""
    names = [f"{i:05}.png" for i in range(len(rows))]
    places = np.stack([np.zeros(len(rows), dtype=int), np.arange(len(rows))], axis=1)
    return folder_features.FolderFeatures(tmp_path / name, names, places, [np.asarray(rows, dtype=np.float32)])


def test_copies_are_nearest_to_what_they_were_made_from_and_nearer_than_all_others(looked_at):
    told = report(*looked_at)
    copies = {pair.image.name: pair.training.name for (pair,) in told.pairs[: len(COPIES)]}
    assert copies == dict(zip(COPIES, ("010.png", "020.png", "030.png", "040.png", "050.png"), strict=True))
    assert told.found == len(COPIES)
    assert told.threshold == 0.95 and all(pair.similarity < 0.8 for (pair,) in told.pairs[len(COPIES) :])


def test_an_exact_copy_has_similarity_1_and_no_pixel_apart(looked_at):
    (first,) = report(*looked_at).pairs[0]
    assert first.image.name == "exact.png" and first.similarity == pytest.approx(1, abs=2e-7) and first.pixels == 0


def test_percentiles_and_the_baseline_are_those_of_the_similarities(looked_at):
    made, training = looked_at
    told = report(made, training, threshold=0.9)
    best = nearest(made, training)[0][:, 0]
    usual = nearest(training, training)[0][:, 0]
    assert told.percentiles == {p: np.percentile(best, p) for p in near_duplicates.PERCENTILES}
    assert told.baseline == {p: np.percentile(usual, p) for p in near_duplicates.PERCENTILES}
    assert told.baseline_found == (usual >= 0.9).mean() and told.baseline_count == len(training) == told.training_count
    few = report(made, training, baseline=7)
    assert few.baseline_count == 7 and few.baseline[100] <= told.baseline[100]


@pytest.mark.parametrize("top", [1, 5])
def test_the_nearest_are_the_same_for_any_blocks_to_the_last_bit(tmp_path, top):
    queries = in_memory(tmp_path, "a", seeded.values("queries", (41, 24)))
    rows = seeded.values("training", (53, 24))
    rows[[7, 30, 52]] = rows[3]  # the same picture four times
    training = in_memory(tmp_path, "b", rows)
    whole = nearest(queries, training, top)
    for size in (1, 7, 53):
        for found, expected in zip(nearest(queries, training, top, rows=size, columns=size), whole, strict=True):
            assert np.array_equal(found, expected)


def test_the_nearest_are_those_that_brute_force_finds(tmp_path):
    one, other = seeded.values("queries", (80, 32)), seeded.values("training", (300, 32))
    cosines, indices = nearest(in_memory(tmp_path, "a", one), in_memory(tmp_path, "b", other), 4, rows=16, columns=64)
    one, other = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (one, other))
    every = one @ other.T
    assert np.array_equal(indices, np.argsort(-every, axis=1, kind="stable")[:, :4])
    assert np.abs(cosines - np.take_along_axis(every, indices, axis=1)).max() < 1e-7


def test_of_pictures_that_are_as_near_the_first_counts_as_nearer(tmp_path):
    training = in_memory(tmp_path, "b", [[0, 1], [1, 0], [2, 0], [1, 0], [0, -1]])
    for columns in (1, 2, 5):
        cosines, indices = nearest(in_memory(tmp_path, "a", [[3, 0]]), training, 4, columns=columns)
        assert indices.tolist() == [[1, 2, 3, 0]] and cosines.tolist() == [[1, 1, 1, 0]]


def test_a_file_is_not_held_against_itself_and_where_no_other_is_left_there_is_none(tmp_path):
    both = in_memory(tmp_path, "same", seeded.values("rows", (12, 8)))
    _, indices = nearest(both, both, 11, rows=5, columns=3)
    assert all(set(row) == set(range(12)) - {i} for i, row in enumerate(indices.tolist()))
    alone = in_memory(tmp_path, "alone", [[1, 2]])
    assert nearest(alone, alone, 2)[1].tolist() == [[-1, -1]]


def test_a_folder_within_the_training_set_is_held_against_the_rest_of_it(tmp_path, folders):
    parent = tmp_path / "all"
    save(noise(5, 4), parent)
    save(noise(7, 3), parent / "below")
    colours = Counting()
    below, whole = look(parent / "below", colours, cache=tmp_path / "c"), look(parent, colours, cache=tmp_path / "c")
    assert whole.names == [*(f"{i:03}.png" for i in range(4)), *(f"below/{i:03}.png" for i in range(3))]
    _, indices = nearest(below, whole, 6)
    assert all(set(row) == set(range(7)) - {4 + i} for i, row in enumerate(indices.tolist()))


def test_features_are_kept_and_only_what_was_changed_is_looked_at_anew(tmp_path):
    folder, cache = save(noise(5, 6), tmp_path / "training"), tmp_path / "cache"
    first = look(folder, Counting(), cache=cache).rows(0, 6)
    again = Counting()
    assert np.array_equal(look(folder, again, cache=cache).rows(0, 6), first) and again.shown == 0

    Image.new("RGB", (64, 64), "red").save(folder / "002.png")
    after = Counting()
    changed = look(folder, after, cache=cache).rows(0, 6)
    assert after.shown == 1 and (changed != first).any(axis=1).tolist() == [False, False, True, False, False, False]

    facts = (folder / "004.png").stat()
    os.utime(folder / "004.png", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    (folder / "005.png").unlink()
    noise(8, 1)[0].save(folder / "000.jpg")
    last = Counting()
    found = look(folder, last, cache=cache)
    assert last.shown == 2 and found.names == ["000.jpg", *(f"{i:03}.png" for i in range(5))]
    assert np.array_equal(found.rows(1, 6), changed[:5])


def test_another_instrument_does_not_take_what_one_has_kept(tmp_path):
    folder = save(noise(5, 3), tmp_path / "training")
    look(folder, Counting(), cache=tmp_path / "cache")
    other = Counting()
    other.fingerprint = "other"
    look(folder, other, cache=tmp_path / "cache")
    assert other.shown == 3


def test_what_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_features, "ROWS", 2)
    folder = save(noise(5, 6), tmp_path / "training")
    stopped = Counting()

    def stop(done, _):
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder_features, "AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        look(folder, stopped, cache=tmp_path / "cache", progress=stop)
    further = Counting()
    found = look(folder, further, cache=tmp_path / "cache")
    assert (stopped.shown, further.shown) == (5, 2)  # of the third block nothing had been kept
    assert np.array_equal(found.rows(0, 6), look(folder, Counting(), cache=tmp_path / "new").rows(0, 6))


def test_a_damaged_block_is_made_anew(tmp_path):
    folder, cache = save(noise(5, 3), tmp_path / "training"), tmp_path / "cache"
    expected = look(folder, Counting(), cache=cache).rows(0, 3)
    (block,) = cache.glob("*/*.npy")
    block.write_bytes(block.read_bytes()[:100])
    again = Counting()
    assert np.array_equal(look(folder, again, cache=cache).rows(0, 3), expected) and again.shown == 3


@pytest.fixture
def duplicates(folders, capsys):
    """Run `ldm duplicates` on the two folders, or others."""

    def run_(*words, made=folders / "made", training=folders / "training"):
        line = ["duplicates", "--images", made, "--training", training, "--cache", folders / "cache", "-q", *words]
        capsys.readouterr()
        status = run([str(word) for word in line])
        return status, *capsys.readouterr()

    return run_


def test_the_command_tells_writes_and_shows_what_it_found(duplicates, tmp_path):
    status, out, _ = duplicates("--top", 2, "--json", tmp_path / "f.json", "--sheet", tmp_path / "f.png")
    assert status == 0 and all(name in out for name in COPIES)
    assert "5 of 21 pictures (23.8%) have one at 0.95 or above; of 52 training pictures" in out
    assert "CLIP of bundled, resized: bicubic" in out
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["found"] == 5 and len(found["pictures"]) == 21 and all(len(p["nearest"]) == 2 for p in found["pictures"])
    assert found["baseline"]["count"] == 52 and set(found["percentiles"]) == set(map(str, near_duplicates.PERCENTILES))
    sheet = images.read(tmp_path / "f.png")
    assert sheet.width > 4 * 2 * 128 and len(np.unique(np.array(sheet).reshape(-1, 3), axis=0)) > 1000
    assert sorted(os.listdir(tmp_path)) == ["f.json", "f.png"]


def test_a_picture_that_cannot_be_read_is_named_in_one_line_and_nothing_is_written(duplicates, tmp_path):
    folder = save(noise(5, 2), tmp_path / "bad")
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    status, out, err = duplicates("--json", tmp_path / "f.json", training=folder)
    assert (status, out) == (1, "") and str(folder / "001.png") in one_line(err.strip()) and err.count("\n") == 1
    assert os.listdir(tmp_path) == ["bad"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--threshold", 1.5), "threshold 1.5; expected a cosine"),
        (("--top", 0), "top 0"),
        (("--clip", "/nowhere"), "/nowhere: no CLIP here; expected bundled"),
        (("--resize", "squash"), "resize 'squash'; expected none or bicubic"),
        (("--json", "/nowhere/f.json"), "there is no folder /nowhere"),
        (("--device", "abacus"), "device 'abacus' cannot be used here"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(duplicates, words, expected):
    status, out, err = duplicates(*words)
    assert (status, out) == (1, "") and expected in one_line(err.strip())


def test_folders_without_pictures_are_refused(duplicates, tmp_path):
    assert "holds no picture" in duplicates(training=tmp_path)[2]
    assert "there is no such folder" in duplicates(made=tmp_path / "nowhere")[2]


def test_a_sheet_carries_no_receipt(duplicates, tmp_path):
    duplicates("--sheet", tmp_path / "f.png")
    assert files.texts(tmp_path / "f.png") == {}


@pytest.mark.parametrize("command", [["duplicates", "--images", "a", "--training", "b"], ["evaluate", "--composition"]])
def test_work_that_is_not_shared_is_refused_to_many_processes(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="1"):
        run(command)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert run(command) == 1
    assert "is the work of one process; start it without torchrun" in capsys.readouterr().err
