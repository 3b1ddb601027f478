"""Data past one machine: shards are read in an order that depends on seed and step alone, what is not kept is counted by name,
and what frozen networks make of the data is the same whoever makes it and wherever they were stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.cli import run
from ldm.processes import Processes
from ldm.training import shard_index
from ldm.training.cache import Contexts, Latents
from ldm.training.data import DataConfig, Folder, Shards, batch_of, keep
from ldm.training.encode import _Maker, encode
from ldm.training.filters import FilterConfig
from ldm.training.order import ShardOrder
from ldm.training.recipe import make
from tests.training_runs import ROOT, environment, largest_difference

ALONE = Processes(rank=0, count=1, device=torch.device("cpu"))
SCORES = {"AESTHETIC_SCORE": 6.0, "pwatermark": 0.1, "WIDTH": 600, "HEIGHT": 800}


@pytest.fixture(autouse=True)
def _gradients(_inference):
    with torch.inference_mode(False), torch.enable_grad():
        yield


def picture(number: int) -> bytes:
    """A small PNG whose colour is its number."""
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), (number % 256, number // 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(path, samples):
    """samples: key -> suffix -> bytes, text or JSON."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, data in parts.items():
                data = json.dumps(data) if isinstance(data, dict) else data
                data = data.encode() if isinstance(data, str) else data
                about = tarfile.TarInfo(f"{key}.{suffix}")
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return path


def write_shards(folder, counts):
    """Shards of so many samples, numbered through."""
    first = 0
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        write_shard(
            folder / f"{shard:05}.tar",
            {f"{n:06}": {"png": picture(n), "txt": f"number {n}\n", "json": {**SCORES, "n": n}} for n in numbers},
        )
        first += count
    return sorted(folder.glob("*.tar"))


@dataclass(frozen=True, kw_only=True)
class Together(Processes):
    """One of several threads that play processes."""

    barrier: threading.Barrier

    def wait(self):
        self.barrier.wait()


def together(count, work):
    """What work(processes) returns to each of `count` processes; raises what one of them raised."""
    barrier, found, raised = threading.Barrier(count), [None] * count, []

    def one(rank):
        try:
            found[rank] = work(Together(rank=rank, count=count, device=torch.device("cpu"), barrier=barrier))
        except BaseException as error:
            raised.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise next((e for e in raised if not isinstance(e, threading.BrokenBarrierError)), raised[0])
    return found


# -- The order -----------------------------------------------------------------------------------------------------------

SHAPES = [((5,), 1), ((4, 4, 4), 1), ((7, 1, 0, 3, 12, 2), 2), ((7, 1, 0, 3, 12, 2), 4), ((0, 0, 3, 0), 1), ((9, 8, 7), 5)]


@pytest.mark.parametrize(("counts", "window"), SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_pass_sees_every_sample_exactly_once(counts, window, batch):
    order, total = ShardOrder(counts, window), sum(counts)
    seen = [i for step in range(-(-3 * total // batch)) for i in order.batch(5, step, batch)]
    for turn in range(3):
        assert sorted(seen[turn * total : (turn + 1) * total]) == list(range(total))
    if total > 4:
        assert seen[:total] != seen[total : 2 * total]
        assert seen[:batch] == ShardOrder(counts, window).batch(5, 0, batch)
        assert [ShardOrder(counts, window).batch(6, step, batch) for step in range(4)] != [
            order.batch(5, step, batch) for step in range(4)
        ]


@pytest.mark.parametrize(("counts", "window"), SHAPES, ids=str)
def test_the_batches_are_the_same_from_the_middle_and_in_any_size(counts, window):
    total = sum(counts)
    one_by_one = [ShardOrder(counts, window).batch(2, step, 1)[0] for step in range(2 * total)]
    order = ShardOrder(counts, window)
    for step in (3, 1, 0, 2):
        size = total // 2 or 1
        assert order.batch(2, step, size) == one_by_one[step * size : (step + 1) * size]


def test_within_a_pass_a_window_of_shards_is_finished_before_the_next_is_begun():
    counts = [6] * 12
    order = ShardOrder(counts, 3)
    turns = []
    for turn in range(2):
        shards = [i // 6 for i in order.batch(0, turn, 72)]
        windows = [frozenset(shards[at : at + 18]) for at in range(0, 72, 18)]
        assert all(len(window) == 3 for window in windows) and len(frozenset.union(*windows)) == 12
        assert all(len(set(shards[at : at + 6])) > 1 for at in range(0, 72, 18))  # mixed, not one after the other
        turns.append(windows)
    assert turns[0] != turns[1]


def test_where_one_window_holds_all_shards_the_order_is_that_of_a_folder():
    order = ShardOrder([3, 9, 2], 3)
    assert [order.batch(4, step, 5) for step in range(9)] == [batch_of(4, step, 5, 14) for step in range(9)]


# -- Reading -------------------------------------------------------------------------------------------------------------


def names_of(folder, how):
    """The same three shards, named in different ways."""
    if how == "folder":
        return str(folder)
    if how == "pattern":
        return str(folder / "{00000..00002}.tar")
    lists = {
        "lines": ("list.txt", "00000.tar\n# a comment\n\n{00001..00002}.tar\n"),
        "names": ("list.json", json.dumps([f"{i:05}.tar" for i in range(3)])),
        "index": ("index.json", json.dumps({"shardlist": [{"url": f"{i:05}.tar", "nsamples": 0} for i in range(3)]})),
    }
    file, text = lists[how]
    (folder / file).write_text(text)
    return str(folder / file)


@pytest.mark.parametrize("how", ["folder", "pattern", "lines", "names", "index"])
def test_shards_give_pictures_with_their_captions(tmp_path, how):
    write_shards(tmp_path, (3, 1, 4))
    data = DataConfig(source=names_of(tmp_path, how), size=8).open(tmp_path / "cache", ALONE)
    assert len(data) == 8
    indices = [6, 0, 3, 6]
    assert data.captions(indices) == [f"number {i}" for i in indices]
    images = data.images(indices)
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert images[:, :, 4, 4].tolist() == [[i, 0, 7] for i in indices]
    assert data.metadata(3)["n"] == 3 and data.name(3) == "00001.tar: 000003"


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_sees_the_same_data(tmp_path, count):
    paths = write_shards(tmp_path, (3, 1, 0, 4, 2))
    alone = Shards(paths, 8, window=2, cache=tmp_path / "alone")
    several = together(count, lambda p: Shards(paths, 8, window=2, cache=tmp_path / "several", processes=p))
    for data in several:
        assert data.identity == alone.identity and data.drops == alone.drops
        assert [data.batch(1, step, 4) for step in range(6)] == [alone.batch(1, step, 4) for step in range(6)]
    files = {folder: sorted(p.name for p in (tmp_path / folder / "shards").iterdir()) for folder in ("alone", "several")}
    assert files["alone"] == files["several"] and len(files["alone"]) == 6


def test_shards_are_walked_through_once(tmp_path, monkeypatch):
    paths = write_shards(tmp_path, (3, 2))
    first = Shards(paths, 8, cache=tmp_path / "cache")
    monkeypatch.setattr(shard_index, "read_index", None)
    again = Shards(paths, 8, cache=tmp_path / "cache")
    assert again.captions(range(5)) == first.captions(range(5))


def test_no_more_shards_are_open_than_twice_the_window(tmp_path):
    data = Shards(write_shards(tmp_path, (2,) * 14), 8, window=2, cache=tmp_path / "cache")

    def opened():
        return sum(str(tmp_path) in target(name) for name in os.listdir("/proc/self/fd"))

    def target(name):
        try:
            return os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # closed meanwhile by another thread that looks
            return ""

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("open files can be counted where there is /proc")
    most = 0

    def look(shard, row):
        nonlocal most
        most = max(most, opened())
        return shard.index.keys[row]

    everywhere = list(range(27, -1, -1)) * 2
    assert [int(key) for key in data._each(everywhere, look)] == everywhere
    assert 2 <= most <= 4
    for step in range(7):
        data.images(data.batch(0, step, 4))
        assert opened() <= 4


def test_a_limit_reads_no_more_shards_than_it_needs(tmp_path):
    write_shards(tmp_path, (3, 3, 3, 3))
    several = []
    for count in (1, 2):
        config = DataConfig(source=str(tmp_path), size=8, limit=5)
        several += together(count, lambda p, c=config, n=count: c.open(tmp_path / f"cache{n}", p, quiet=True))
        assert len(list((tmp_path / f"cache{count}" / "shards").glob("*.npz"))) == 2
    assert [len(data) for data in several] == [5, 5, 5]
    assert several[0].drops.counts == {"beyond the limit": 1} and several[0].drops == several[2].drops
    assert len(DataConfig(source=str(tmp_path), size=8).open_unseen(4)) == 4
    assert len(DataConfig(count=100, limit=7, size=16).open(tmp_path / "scenes", ALONE)) == 7


def test_webdatasets_absence_is_told_with_the_extra_that_has_it(tmp_path, monkeypatch):
    paths = write_shards(tmp_path, (1,))
    shard_index.webdataset.cache_clear()
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"install the extra: pip install 'ldm\[train\]'"):
        Shards(paths, 8)


# -- What is not kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{00000..00004}.tar", "00002.tar: there is no such shard, nor are 2 others of"),
        ("{00000..00001.tar", "is no pattern of shards"),
        ("odd.json", 'expected a list of shards, or {"shardlist": [{"url": ...}, ...]}'),
        ("empty.txt", "names no shards"),
        ("none", "there is no such folder of pictures"),
    ],
)
def test_shards_that_are_not_there_are_refused_in_one_line(tmp_path, source, complaint):
    write_shards(tmp_path, (1, 1))
    (tmp_path / "odd.json").write_text('{"shards": []}')
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError) as raised:
        DataConfig(source=str(tmp_path / source)).open(tmp_path / "cache", ALONE)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)


def damaged(path, how):
    data = path.read_bytes()
    if how == "cut within a member":
        return data[:700]
    if how == "cut between members":
        return data[:1024]
    if how == "a head overwritten":
        return data[:1024] + b"x" * 512 + data[1536:]
    return b"this is no tar file"


@pytest.mark.parametrize("how", ["cut within a member", "cut between members", "a head overwritten", "no tar"])
def test_a_broken_shard_is_refused_or_counted_by_name(tmp_path, how):
    paths = write_shards(tmp_path, (2, 2, 2))
    paths[1].write_bytes(damaged(paths[1], how))
    with pytest.raises(ValueError, match=r"00001\.tar: (is cut off or damaged at byte|cannot be read as a tar file)") as raised:
        Shards(paths, 8, cache=tmp_path / "cache")
    assert "\n" not in str(raised.value)
    data = Shards(paths, 8, cache=tmp_path / "cache", filters=FilterConfig(unreadable="drop"))
    assert data.captions(range(len(data))) == ["number 0", "number 1", "number 4", "number 5"]
    assert data.drops.broken == [str(paths[1])] and "1 broken shards (" in data.drops.summary()


def test_samples_that_are_not_whole_are_counted_by_name(tmp_path, capsys):
    whole = {"png": picture(1), "txt": "a caption"}
    samples = {
        "a": whole,
        "b": {"png": picture(2)},
        "c": {"png": picture(3), "txt": ""},
        "d": {"txt": "x"},
        "e": whole,
        "f": {"png": picture(4), "txt": " \n"},
    }
    path = write_shard(tmp_path / "0.tar", samples)
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("e.txt"))
    data = DataConfig(source=str(path), size=8).open(tmp_path / "cache", ALONE)
    assert data.captions(range(len(data))) == ["a caption"]
    told = json.loads((tmp_path / "cache" / f"drops-{data.identity}.json").read_text())
    assert told["seen"] == 6 and told["kept"] == 1
    assert told["dropped"] == {
        "no picture": {"count": 1, "first": ["0.tar: d"]},
        "no caption": {"count": 3, "first": ["0.tar: b", "0.tar: c", "0.tar: f"]},
        "a member twice": {"count": 1, "first": ["0.tar: e"]},
    }
    assert "kept 1 of 6 samples; dropped: 1 no picture (0.tar: d), 3 no caption (0.tar: b, ...)" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_refused_or_counted_by_name(tmp_path):
    samples = {str(n): {"jpg": picture(n) if n != 1 else b"no picture", "txt": f"number {n}"} for n in range(3)}
    path = write_shard(tmp_path / "0.tar", samples)
    data = Shards([path], 8)
    assert data.images([0, 2]).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"0\.tar: 1: cannot be read as PNG, JPEG or WebP"):
        data.images([0, 1])
    dropping = Shards([path], 8, filters=FilterConfig(unreadable="drop"))
    assert dropping.captions(range(len(dropping))) == ["number 0", "number 2"]
    assert dropping.drops.names == {"unreadable picture": ["0.tar: 1"]}


CARD = {"min_side": 512, "aesthetic_above": 5.0, "watermark_below": 0.5}
CASES = {  # what each differs in from one that is kept -> why it is dropped
    "kept": ({}, None),
    "just large enough": ({"WIDTH": 512, "HEIGHT": 512.0}, None),
    "as found, not as scaled": ({"original_width": 700, "original_height": 512, "WIDTH": 5}, None),
    "narrow": ({"WIDTH": 511}, "side too small"),
    "low, and marked too": ({"HEIGHT": 100, "pwatermark": 0.9}, "side too small"),
    "of no size but its own": ({"WIDTH": None}, "side too small"),
    "just not beautiful enough": ({"AESTHETIC_SCORE": 5.0}, "aesthetics score too low"),
    "of no score": ({"AESTHETIC_SCORE": None}, "aesthetics score missing"),
    "of a score that is none": ({"AESTHETIC_SCORE": float("nan")}, "aesthetics score missing"),
    "of a score by another name": ({"AESTHETIC_SCORE": None, "aesthetic": "5.5"}, None),
    "perhaps marked": ({"pwatermark": 0.5}, "watermark probability too high"),
    "nobody knows if marked": ({"pwatermark": None}, "watermark probability missing"),
    "unsafe, which was not asked": ({"punsafe": 1.0}, None),
}


@pytest.mark.parametrize("kind", ["shards", "folder", "table"])
def test_the_cards_filters_keep_what_the_card_says_and_count_the_rest(tmp_path, kind):
    about = {name: {**SCORES, **differs} for name, (differs, _) in CASES.items()}
    if kind == "shards":
        write_shard(tmp_path / "0.tar", {name: {"png": picture(0), "txt": name, "json": about[name]} for name in CASES})
    else:
        for name in CASES:
            (tmp_path / f"{name}.png").write_bytes(picture(0))
            if kind == "folder":
                (tmp_path / f"{name}.txt").write_text(name)
                (tmp_path / f"{name}.json").write_text(json.dumps(about[name]))
        if kind == "table":
            lines = [json.dumps({"file_name": f"{name}.png", "text": name, **about[name]}) for name in CASES]
            (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    config = make(DataConfig, {"source": str(tmp_path), "size": 8, "filter": CARD}, "here")
    data = config.open(tmp_path / "cache", ALONE, quiet=True)
    assert sorted(data.captions(range(len(data)))) == sorted(name for name, (_, why) in CASES.items() if why is None)
    expected: dict[str, int] = {}
    for _, why in CASES.values():
        if why:
            expected[why] = expected.get(why, 0) + 1
    assert data.drops.counts == expected and data.drops.seen == len(CASES)
    assert list(data.drops.to_json()["dropped"]) == [
        *("side too small", "aesthetics score missing", "aesthetics score too low"),
        *("watermark probability missing", "watermark probability too high"),
    ]


def test_without_metadata_a_side_is_the_pictures_own(tmp_path):
    for name, size in (("large", (16, 20)), ("flat", (40, 15))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    parts = {name: {s: (tmp_path / f"{name}.{s}").read_bytes() for s in ("png", "txt")} for name in ("large", "flat")}
    shard = write_shard(tmp_path / "0.tar", parts)
    for data in (Folder(tmp_path, 8, filters=FilterConfig(min_side=16)), Shards([shard], 8, filters=FilterConfig(min_side=16))):
        assert data.captions(range(len(data))) == ["large"] and data.drops.counts == {"side too small": 1}


def test_other_filters_are_other_data(tmp_path):
    paths = write_shards(tmp_path, (3,))
    kinds = [FilterConfig(), FilterConfig(aesthetic_above=5.0), FilterConfig(unsafe_below=0.9, unsafe_fields=("pwatermark",))]
    several = [Shards(paths, 8, filters=filters, cache=tmp_path / "cache") for filters in kinds]
    assert len({data.identity for data in several}) == 3
    with pytest.raises(ValueError, match=r"no sample is left; kept 0 of 3 samples; dropped: 3 aesthetics score too low"):
        Shards(paths, 8, filters=FilterConfig(aesthetic_above=9.0))
    with pytest.raises(ValueError, match=r"data\.filter\.unreadable 'skip'; expected refuse or drop"):
        DataConfig(source=str(tmp_path), filter=FilterConfig(unreadable="skip")).open(tmp_path, ALONE)


# -- Arrays that all processes make --------------------------------------------------------------------------------------


def squares(indices):
    return torch.tensor([[i * i, -i] for i in indices], dtype=torch.float64)


def test_many_processes_make_the_file_that_one_does_and_each_its_share(tmp_path):
    keep(tmp_path / "alone.npy", 1000, (2,), squares, np.float64)
    made = [[] for _ in range(3)]

    def work(processes):
        def make(indices):
            made[processes.rank].append(indices[0])
            return squares(indices)

        keep(tmp_path / "three.npy", 1000, (2,), make, np.float64, processes)

    together(3, work)
    assert (tmp_path / "three.npy").read_bytes() == (tmp_path / "alone.npy").read_bytes()
    assert made == [[0, 384, 768], [128, 512, 896], [256, 640]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.npy", "three.npy"]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4)])
def test_portions_that_were_made_before_a_stop_are_not_made_again(tmp_path, before, after):
    keep(tmp_path / "whole.npy", 1000, (2,), squares, np.float64)
    made, again = [], []

    def stopped(indices):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(indices[0])
        return squares(indices)

    with pytest.raises(KeyboardInterrupt):
        together(before, lambda p: keep(tmp_path / "x.npy", 1000, (2,), stopped, np.float64, p))
    assert not (tmp_path / "x.npy").exists()
    with open(tmp_path / f"x.npy.{before - 1}.done", "a") as journal:
        journal.write("8")  # the line that a kill cut short: 896, which nobody has made

    def rest(indices):
        again.append(indices[0])
        return squares(indices)

    together(after, lambda p: keep(tmp_path / "x.npy", 1000, (2,), rest, np.float64, p))
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert len(made) + len(again) == 8 and sorted(made + again) == list(range(0, 1000, 128))


@pytest.mark.parametrize(("count", "dtype"), [(999, np.float64), (1000, np.float32)])
def test_what_was_begun_of_another_kind_is_begun_anew(tmp_path, count, dtype):
    def stopped(indices):
        if indices[0] > 500:
            raise KeyboardInterrupt
        return torch.full((len(indices), 2), 7.0)

    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path / "x.npy", count, (2,), stopped, dtype)
    keep(tmp_path / "x.npy", 1000, (2,), squares, np.float64)
    assert np.array_equal(np.load(tmp_path / "x.npy"), squares(range(1000)).numpy())


# -- Encoding ahead of time ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """25 pictures of noise with captions, and one that is no picture."""
    folder, draw = tmp_path_factory.mktemp("album"), np.random.default_rng(0)
    for i in range(25):
        Image.fromarray(draw.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"noise, number {i}")
    return folder


@pytest.fixture(scope="module")
def small():
    return ldm.build("tiny", seed=3)


def test_encoded_shards_give_what_the_networks_would(tmp_path, album, small):
    config = DataConfig(source=str(album), size=16)
    encode(config, small, tmp_path / "out", ALONE, samples_per_shard=9)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    folder = config.open(tmp_path / "cache", ALONE)
    shards = DataConfig(source=str(tmp_path / "out"), size=16).open(tmp_path / "cache", ALONE)
    indices, draw = [24, 3, 3, 11, 0], torch.Generator().manual_seed(0)
    assert len(shards) == 25 and shards.captions(indices) == folder.captions(indices)
    assert shards.metadata(11) == {"name": "11.png"}

    live, kept = (Latents(data, small.autoencoder, tmp_path / "cache", ALONE) for data in (folder, shards))
    noise = torch.randn(5, *live.shape, generator=draw)
    assert torch.allclose(kept.draw(indices, noise), live.draw(indices, noise), rtol=2e-3, atol=2e-3)
    dropped = torch.tensor([False, True, False, False, False])
    live, kept = (Contexts(data, small.tokenizer, small.text_encoder, tmp_path / "cache", ALONE) for data in (folder, shards))
    assert torch.equal(kept.empty, live.empty)
    assert torch.allclose(kept.rows(indices, dropped), live.rows(indices, dropped), rtol=2e-3, atol=2e-3)


def test_networks_are_not_asked_for_what_is_encoded_and_others_are_refused(tmp_path, album, small):
    encode(DataConfig(source=str(album), size=16, limit=3), small, tmp_path / "out", ALONE)
    data = DataConfig(source=str(tmp_path / "out"), size=16).open(tmp_path / "cache", ALONE)
    for module in (small.autoencoder, small.text_encoder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(module), "forward", None, raising=False)
            patch.setattr(type(small.autoencoder), "encode", None)
            Latents(data, small.autoencoder, tmp_path / "cache", ALONE)
            Contexts(data, small.tokenizer, small.text_encoder, tmp_path / "cache", ALONE)
    other = ldm.build("tiny", seed=4)
    with pytest.raises(ValueError, match="encoded with another autoencoder"):
        Latents(data, other.autoencoder, tmp_path / "cache", ALONE)
    with pytest.raises(ValueError, match="encoded with another text encoder"):
        Contexts(data, small.tokenizer, other.text_encoder, tmp_path / "cache", ALONE)
    with pytest.raises(ValueError, match="encoded with another tokenizer"):
        longer = type(small.tokenizer).clip(small.tokenizer.length + 1)
        Contexts(data, longer, small.text_encoder, tmp_path / "cache", ALONE)
    with pytest.raises(ValueError, match="holds latents and no pictures"):
        data.images([0])
    with pytest.raises(ValueError, match=r"encoded at 16 pixels; expected data\.size 32, or set it to that"):
        DataConfig(source=str(tmp_path / "out"), size=32).open(tmp_path / "cache", ALONE)
    with pytest.raises(ValueError, match="is encoded already"):
        encode(DataConfig(source=str(tmp_path / "out"), size=16), small, tmp_path / "twice", ALONE)


def test_what_cannot_be_encoded_leaves_no_folder(tmp_path, small):
    with pytest.raises(ValueError, match="there is no such folder"):
        encode(DataConfig(source=str(tmp_path / "none"), size=16), small, tmp_path / "out", ALONE)
    assert not (tmp_path / "out").exists()


def test_shards_of_two_encodings_are_not_mixed(tmp_path, album, small):
    for name, seed in (("a", 3), ("b", 4)):
        encode(DataConfig(source=str(album), size=16, limit=2), ldm.build("tiny", seed=seed), tmp_path / name, ALONE)
    (tmp_path / "list.txt").write_text("a/00000.tar\nb/00000.tar\n")
    with pytest.raises(ValueError, match="were not encoded alike"):
        DataConfig(source=str(tmp_path / "list.txt"), size=16).open(tmp_path / "cache", ALONE)
    with pytest.raises(ValueError, match=r"holds shards with .*size 16 and not 32"):
        encode(DataConfig(source=str(album), size=32, limit=2), small, tmp_path / "a", ALONE)
    write_shards(tmp_path, (1,))
    with pytest.raises(ValueError, match="holds shards that were not made here"):
        encode(DataConfig(source=str(album), size=16), small, tmp_path, ALONE)


def test_webdataset_itself_reads_encoded_shards(tmp_path, album, small):
    import webdataset

    encode(DataConfig(source=str(album), size=16, limit=3), small, tmp_path / "out", ALONE)
    files = webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False).decode()
    samples = list(files)
    assert [sample["txt"] for sample in samples] == [f"noise, number {i}" for i in range(3)]
    width = small.autoencoder.config.latent_channels
    assert all(sample["moments.npy"].shape[:2] == (2, width) for sample in samples)


def test_encoding_counts_what_was_dropped_on_the_way_and_before(tmp_path, tiny_native, capsys):
    write_shards(tmp_path, (3, 2))
    bad = {
        "x": {"png": b"no picture", "txt": "x"},
        "y": {"png": picture(9)},
        "z": {"png": picture(8), "txt": "z", "json": SCORES},
    }
    write_shard(tmp_path / "00002.tar", bad)
    command = ["encode", "--data", tmp_path / "{00000..00002}.tar", "--model", tiny_native, "--out", tmp_path / "out"]
    command += ["--size", 16, "--samples-per-shard", 3, "--device", "cpu", "--quiet"]
    for _ in range(2):  # the second time all is there
        assert run([*map(str, command)]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        dropped = "dropped: 1 no caption (00002.tar: y), 1 unreadable picture (00002.tar: x)"
        assert line == f"{tmp_path / 'out'}: kept 6 of 8 samples; {dropped}"
    told = json.loads((tmp_path / "out" / "drops.json").read_text())
    assert told["kept"] == 6 and told["dropped"]["unreadable picture"]["count"] == 1
    data = DataConfig(source=str(tmp_path / "out"), size=16).open(tmp_path / "cache", ALONE)
    assert data.captions(range(6)) == [*(f"number {n}" for n in range(5)), "z"]
    assert run([*map(str, command), "--set", "filter.min_side=16"]) == 1
    assert "holds shards with data" in capsys.readouterr().err


def test_a_unet_trained_on_encoded_shards_is_the_one_trained_on_their_pictures(tmp_path, album, tiny_native):
    model = ["--model", str(tiny_native), "--device", "cpu", "--quiet"]
    out = tmp_path / "encoded"
    assert run(["encode", "--data", str(album), "--out", str(out), "--size", "16", *model]) == 0
    side = 16 // ldm.load(tiny_native).autoencoder.config.downsampling
    settings = ["data.size=16", f"model.sample_size={side}", "steps=4", "batch=6", "optimiser.warm_up=1", "log_every=2"]
    for name, data in (("folder", album), ("shards", out)):
        command = ["train", "unet", "--data", str(data), "--out", str(tmp_path / name), *model]
        assert run([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    one, other = (tmp_path / name / "model" / "unet.safetensors" for name in ("folder", "shards"))
    assert largest_difference(one, other) == 0
    assert largest_difference(one, tiny_native / "unet.safetensors") > 1e-6


def test_the_shards_that_are_left_are_shared_and_nothing_trains_on_them_before(tmp_path, album, small, monkeypatch):
    out, whole = tmp_path / "out", DataConfig(source=str(album), size=16)
    encode(whole, small, out, ALONE, samples_per_shard=3)
    for number in (0, 2, 4, 6):
        (out / f"{number:05}.tar").unlink()
    (out / shard_index.ENDED).unlink()
    with pytest.raises(
        ValueError, match="`ldm encode` was stopped before it had written all shards; give the same command again"
    ):
        DataConfig(source=str(out), size=16).open(tmp_path / "cache", ALONE)
    made = [[], []]

    make = _Maker.make

    def told(self, file, indices):
        made[int(threading.current_thread().name)].append(file.name)
        make(self, file, indices)

    monkeypatch.setattr(_Maker, "make", told)
    together(2, lambda processes: encode(whole, small, out, processes, samples_per_shard=3))
    assert list(map(len, made)) == [2, 2] and sorted(made[0] + made[1]) == [f"{n:05}.tar" for n in (0, 2, 4, 6)]


def test_encoding_that_was_killed_goes_on_with_two_processes_and_ends_with_the_same_bytes(tmp_path, album, tiny_native):
    words = ["-m", "ldm", "encode", "--data", album, "--model", tiny_native, "--size", 64, "--samples-per-shard", 1]
    words += ["--device", "cpu", "--quiet", "--debug", "--out"]

    def command(out, *launch):
        return [sys.executable, *launch, *map(str, words), str(tmp_path / out)]

    process = subprocess.Popen(command("killed"), env=environment(), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if (tmp_path / "killed" / "00003.tar").exists():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()[-2000:]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.tar")}
    assert 4 <= len(made) < 25

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(command("killed", *launch), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run([str(word) for word in [*words[2:], tmp_path / "whole"]]) == 0
    both = [{p.name: p.read_bytes() for p in (tmp_path / out).iterdir() if p.is_file()} for out in ("killed", "whole")]
    assert both[0] == both[1] and sum(name.endswith(".tar") for name in both[0]) == 25
    assert {path: path.stat().st_mtime_ns for path in made} == made
