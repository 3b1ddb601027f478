"""Many processes train the model that one does: to the last bit, unless torch's own ways to add up are asked for; and when one
of them is killed, another number of them goes on."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from ldm.processes import Processes
from ldm.training.parallel import Together, TreeSum, shares
from tests import ranks
from tests.training_runs import RESULT, ROOT, environment, largest_difference, one_killed, opened, steps_of

LEAVES = ("batch=1", "accumulation=4", "steps=6", "sheet_every=6")


@pytest.fixture(autouse=True)
def _gradients(_inference):
    """Unlike in all other tests."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    torch.set_num_threads(1)  # as in the processes that are started: another number adds up in another order
    return opened(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def alone(workshop):
    """What one process makes of the recipe in four micro-batches."""
    with torch.inference_mode(False), torch.enable_grad():
        return {stage: workshop.train(stage, workshop.folder / "alone" / stage, *LEAVES) for stage in ("autoencoder", "unet")}


def process(rank: int, count: int) -> Processes:
    return Processes(rank=rank, count=count, device=torch.device("cpu"))


# -- Who takes what, and in which order it is added up -----------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (4, 2), (2, 4), (1, 12), (6, 2)])
def test_the_rows_of_all_processes_are_the_batch(batch, accumulation):
    for count in (1, 2, 4):
        if accumulation % count and batch * accumulation % count:
            continue
        rows = [row for rank in range(count) for part in shares(batch, accumulation, process(rank, count)) for row in _of(part)]
        assert rows == list(range(batch * accumulation))
        if accumulation % count == 0:
            assert {part.stop - part.start for part in shares(batch, accumulation, process(0, count))} == {batch}


def _of(part: slice) -> range:
    return range(part.start, part.stop)


@pytest.mark.parametrize(("batch", "accumulation", "count"), [(3, 1, 2), (4, 2, 3), (1, 2, 4)])
def test_a_batch_that_does_not_divide_is_refused(batch, accumulation, count):
    with pytest.raises(ValueError, match=rf"{accumulation} micro-batches of {batch} pictures for {count} processes"):
        shares(batch, accumulation, process(0, count))


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 7, 8, 12, 13])
def test_a_sum_is_the_same_wherever_its_list_is_cut_in_blocks_of_a_power_of_two(leaves):
    values = torch.randn(leaves, 1000, generator=torch.Generator().manual_seed(leaves))
    whole = total(values)
    for block in (1, 2, 4):
        parts = torch.stack([total(part) for part in values.split(block)])
        assert torch.equal(total(parts), whole)
    assert torch.allclose(whole, values.sum(0), atol=1e-5)


def total(values: torch.Tensor) -> torch.Tensor:
    tree = TreeSum()
    for value in values:
        tree.add([value.clone()])
    return tree.total()[0]


def test_the_order_of_the_sum_matters():
    values = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    in_turn = values[0].clone()
    for value in values[1:]:
        in_turn += value
    assert not torch.equal(in_turn, total(values))


# -- Whole runs --------------------------------------------------------------------------------------------------------------


def test_any_number_of_processes_trains_the_same_bytes(workshop, alone, tmp_path):
    runs = {(stage, count): tmp_path / f"{stage}-{count}" for stage, count in (("autoencoder", 2), ("unet", 2), ("unet", 4))}
    several(workshop, [(count, stage, out, LEAVES) for (stage, count), out in runs.items()])
    for (stage, _), out in runs.items():
        assert (out / RESULT[stage]).read_bytes() == alone[stage].read_bytes()
        assert logged(out) == logged(workshop.folder / "alone" / stage)


def several(workshop, runs) -> None:
    """Train what is asked for, (count of processes, stage, folder, settings) each, one after the other."""
    lines = [(count, workshop.command(stage, out, *settings)) for count, stage, out, settings in runs]
    done = ranks.run(*((count, line[line.index("train") :]) for count, line in lines))
    assert not [one.err[-3000:] for one in done if one.status]


def logged(folder) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_torchs_own_ways_and_contrast_are_the_same_to_rounding(workshop, alone, tmp_path):
    plain = ("optimiser.name=adamw", "steps=4", "test_every=4")  # Muon rounds to bfloat16 on its way
    ddp = (2, "unet", tmp_path / "ddp", (*LEAVES, "parallel=ddp"))
    several(workshop, [ddp, (2, "clip", tmp_path / "clip", plain)])
    assert largest_difference(alone["unet"], tmp_path / "ddp" / RESULT["unet"]) < 1e-5
    one, other = (workshop.train("clip", tmp_path / f"{seed}", f"seed={seed}", *plain) for seed in (0, 1))
    apart = largest_difference(one, tmp_path / "clip" / RESULT["clip"])
    assert apart < 1e-5 and apart < largest_difference(one, other) / 500


def test_a_run_that_lost_a_process_goes_on_with_another_number_of_them(workshop, alone, tmp_path):
    command = workshop.command("unet", tmp_path / "run", *LEAVES, processes=2)
    done = one_killed(command, tmp_path / "run" / "metrics.jsonl", after=2)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert not (tmp_path / "run" / RESULT["unet"]).exists()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    several(workshop, [(4, "unet", tmp_path / "again", LEAVES)])
    workshop.train("unet", tmp_path / "run", *LEAVES)
    for name in ("run", "again"):
        assert (tmp_path / name / RESULT["unet"]).read_bytes() == alone["unet"].read_bytes()
        assert steps_of(tmp_path / name / "metrics.jsonl") == [2, 4, 6]


def test_a_sharded_run_that_lost_a_process_goes_on_with_another_number_of_them(workshop, tmp_path):
    few = ("batch=1", "accumulation=4", "steps=3", "sheet_every=3", "log_every=1", "save_every=2")
    few += ("model.level_widths=[16]", "model.attention_levels=[true]")  # a few hundred calls from process to process a step
    exact = workshop.train("unet", tmp_path / "exact", *few)
    settings = (*few, "parallel=fsdp")
    command = workshop.command("unet", tmp_path / "run", *settings, processes=2)
    done = one_killed(command, tmp_path / "run" / "metrics.jsonl", after=3)  # which is said once step 2 is kept
    assert done.returncode != 0 and list((tmp_path / "run").glob("checkpoint-*"))
    several(workshop, [(4, "unet", tmp_path / "run", settings)])
    assert largest_difference(exact, tmp_path / "run" / RESULT["unet"]) < 1e-5
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000003"]
    assert steps_of(tmp_path / "run" / "metrics.jsonl") == [1, 2, 3]


IMPATIENT = """
import os, time
from datetime import timedelta
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "FREE", "WORLD_SIZE": "2"}
import ldm.processes
ldm.processes.PATIENCE = timedelta(seconds=1)
child = os.fork()
os.environ["RANK"] = "1" if child else "0"
with ldm.processes.joined("cpu") as processes:
    time.sleep(3 * processes.rank)
    processes.wait()
assert not child or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_who_has_a_long_share_of_the_work_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as free:
        script = IMPATIENT.replace("FREE", str(free.getsockname()[1]))
    done = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_all_processes_refuse_is_said_once(workshop, tmp_path):
    wrong = ("data.size=60", "batch=3")
    commands = [workshop.command("autoencoder", tmp_path / "run", setting) for setting in wrong]
    words = [[word for word in command[command.index("train") :] if word != "--debug"] for command in commands]
    done = ranks.run(*((2, line) for line in words))
    assert [(one.status, one.out) for one in done] == [(1, ""), (1, "")]
    (size,), (batch,) = (one.err.splitlines() for one in done)
    assert size == "ldm: data.size 60; expected a multiple of 8"
    assert batch.startswith("ldm: 1 micro-batches of 3 pictures for 2 processes")
    assert not (tmp_path / "run").exists()


def test_sharding_on_one_process_is_refused():
    with pytest.raises(ValueError, match="parallel fsdp with one process"):
        Together(torch.nn.Linear(2, 2), "fsdp", process(0, 1), [slice(0, 1)])
