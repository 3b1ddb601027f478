"""A run that many processes share: how it is cut, and that its folder does not tell how many they were."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ldm
from ldm.pipelines import bulk
from ldm.pipelines.agreement import Agreement
from ldm.pipelines.settings import checked
from ldm.processes import Processes
from tests import ranks
from tests.training_runs import ROOT, environment

PROMPTS = [f"a cube and {i} spheres" for i in range(9)]
SETTINGS = {"steps": 2, "seed": 40, "num_images": 2, "batch_size": 4}
SIZE = {"width": 32, "height": 24}
ALONE = Processes(rank=0, count=1, device="cpu")


def words(model: Path, folder: Path) -> list[str]:
    """The command that makes these pictures."""
    file = folder.parent / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    options = {**SETTINGS, **SIZE, "model": model, "out": folder, "device": "cpu", "from_file": file}
    given = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["txt2img", *given, "-q"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tiny_native, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    order = bulk.Order(prompts=PROMPTS, settings=SETTINGS, fields=SIZE)
    paths = bulk.make(ldm.load(tiny_native), order, folder, Agreement(ALONE))
    assert [path.name for path in paths] == [f"{i:05}-{40 + i}.png" for i in range(18)]
    return contents(folder)


# -- The cut


def test_a_run_is_cut_into_batches_of_consecutive_images():
    cut = bulk.portions(PROMPTS[:3], checked({"seed": 5, "num_images": 3, "batch_size": 4}))
    assert [list(portion.indices) for portion in cut] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [portion.prompts for portion in cut][1] == [PROMPTS[1], PROMPTS[1], PROMPTS[2], PROMPTS[2]]
    assert [(portion.seed, portion.num_images) for portion in cut] == [(5, 1), (9, 1), (13, 1)]
    assert [name for portion in cut for name in portion.names] == [f"{i:05}-{5 + i}.png" for i in range(9)]


def test_prompts_that_name_other_loras_are_cut_apart():
    prompts = ["a", "b <lora:x:1>", "c <lora:x:1>", "d withLora(x)", "e"]
    cut = bulk.portions(prompts, checked({"seed": 0}))
    assert [portion.prompts for portion in cut] == [["a"], prompts[1:3], ["d withLora(x)"], ["e"]]


def test_images_of_one_generator_stay_together():
    settings = {"seed": 5, "num_images": 6, "batch_size": 4, "convention": "diffusers"}
    first, second = bulk.portions(["a", "b"], checked(settings))
    assert (first.num_images, first.seed, second.num_images, second.seed) == (6, 5, 6, 11)
    assert second.names == [f"{i:05}-11.png" for i in range(6, 12)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_portion_is_made_by_one_process_and_none_is_left(count, monkeypatch):
    monkeypatch.setattr("torch.distributed.new_group", lambda **_: None)
    cut = bulk.portions(PROMPTS, checked(SETTINGS))
    shares = [Agreement(Processes(rank=rank, count=count, device="cpu")).share(cut) for rank in range(count)]
    assert sorted((p for share in shares for p in share), key=lambda portion: portion.start) == cut
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# -- Many processes


def test_many_processes_make_the_same_bytes_as_one_and_refuse_with_one_voice(tiny_native, tmp_path, undisturbed):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "00000-1.png").touch()
    asked = [(2, words(tiny_native, tmp_path / "two")), (4, words(tiny_native, tmp_path / "four"))]
    *made, refused = ranks.run(*asked, (2, words(tiny_native, tmp_path / "taken")))
    for done, folder in zip(made, (tmp_path / "two", tmp_path / "four"), strict=True):
        assert (done.status, done.err) == (0, "")
        assert done.paths == [folder / f"{i:05}-{40 + i}.png" for i in range(18)]
        assert contents(folder) == undisturbed
    assert (refused.status, refused.out, os.listdir(tmp_path / "taken")) == (1, "", ["00000-1.png"])
    assert re.fullmatch(r"ldm: \S+/taken: holds pictures, and no run.json that says of which run; .*\n", refused.err)


def test_a_killed_process_ends_the_command_and_another_number_of_them_goes_on(tiny_native, tmp_path, undisturbed):
    """Under torchrun itself: its agent sees the death."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ldm"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agent = subprocess.Popen([*command, *words(tiny_native, out)], env=environment(), cwd=ROOT, **pipes)
    while agent.poll() is None and not list(out.glob("*.png")):
        time.sleep(0.002)
    os.kill(_of_rank(1, agent.pid), signal.SIGKILL)
    begun = time.monotonic()
    printed, said = agent.communicate(timeout=60)
    assert (agent.returncode, printed) == (1, "") and time.monotonic() - begun < 20
    assert "Signal 9 (SIGKILL) received by PID" in said
    made = len(list(out.glob("*.png")))
    assert 1 <= made < 18, said
    (out / ".left.partial").touch()
    bulk.make(ldm.load(tiny_native), bulk.Order(prompts=PROMPTS, settings=SETTINGS, fields=SIZE), out, Agreement(ALONE))
    assert contents(out) == undisturbed


def _of_rank(rank: int, agent: int) -> int:
    """The process that torchrun has given this number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0RANK={rank}\0".encode() in b"\0" + (folder / "environ").read_bytes() and _parent(folder) == agent:
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"torchrun has no process of rank {rank}")


def _parent(folder: Path) -> int:
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
