"""Stable Diffusion v1's training on paper: the card's facts, the same course on a smaller scale, and what a run would take."""

import dataclasses
import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import step_costs
from ldm.cli import run
from ldm.models.unet import UNet, UNetConfig
from ldm.processes import Processes
from ldm.training import card
from ldm.training.card import BatchPlan, fit, history, shrunk
from ldm.training.parallel import shares
from ldm.training.plan import COSTS, LATENTS, PARAMETERS, TEXT, WAYS, Assumptions, largest_batch, plan, state
from ldm.training.recipe import make, read
from ldm.training.unet import UNetRecipe
from tests.training_runs import ROOT

TINY = UNetConfig(
    level_widths=(16, 32), attention_levels=(True, False), residual_blocks=1, heads=2, context_width=16, norm_groups=8
)
V1_4 = [pair for pair in history("v1-4") if pair[0] == "v1-4"]


def the_recipe() -> UNetRecipe:
    return make(UNetRecipe, read(card.RECIPE)["unet"], "the card")


# -- The card


def test_the_recipe_is_what_the_card_states():
    recipe = the_recipe()
    assert (recipe.optimiser.name, recipe.optimiser.learning_rate, recipe.optimiser.warm_up) == ("adamw", 1e-4, 10_000)
    assert (recipe.optimiser.cool_down, recipe.optimiser.ema, recipe.dropout, recipe.min_snr) == (0, 0.9999, 0.1, 0)
    assert (recipe.data.size, recipe.model, recipe.steps) == (512, UNetConfig(), 225_000)
    kept = recipe.data.filter
    assert (kept.min_side, kept.aesthetic_above, kept.watermark_below) == (512, 5.0, 0.5)


def test_the_recipes_batch_is_the_cards_32_nodes_of_8_gpus_twice_4():
    recipe = the_recipe()
    assert BatchPlan().total == 32 * 8 * 2 * 4 == 2048 == recipe.batch * recipe.accumulation
    assert (BatchPlan().batch, BatchPlan().micro_batches) == (recipe.batch, recipe.accumulation)


def test_a_checkpoints_history_is_its_own_phases_after_those_of_what_it_was_trained_from():
    assert [(name, phase.steps, phase.size) for name, phase in history("v1-4")] == [
        ("v1-1", 237_000, 256),
        ("v1-1", 194_000, 512),
        ("v1-2", 515_000, 512),
        ("v1-4", 225_000, 512),
    ]
    assert history("v1-3")[:-1] == history("v1-4")[:-1] and history("v1-3")[-1][1].steps == 195_000
    assert [phase.dropout for _, phase in history("v1-4")] == [0, 0, 0, 0.1]


# -- A batch on other GPUs


def test_the_cards_gpus_get_the_cards_batch():
    assert fit(2048, 256, largest_batch=4) == BatchPlan()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 11), st.integers(1, 3000))
def test_any_power_of_two_gpus_make_the_same_whole_batch_with_the_largest_micro_batch_that_divides(power, largest):
    found = fit(2048, 2**power, largest)
    assert found.total == 2048 and found.processes == 2**power and found.gpus <= 8
    assert found.batch <= largest and (2 * found.batch > largest or found.accumulation == 1)


@pytest.mark.parametrize("processes", [1, 8, 64, 256])
def test_what_fits_is_what_the_training_loop_shares_alike(processes):
    """Every GPU gets `accumulation` micro-batches of `batch`, by the loop's own arithmetic."""
    found = fit(2048, processes, largest_batch=24)
    for rank in (0, processes - 1):
        here = Processes(rank=rank, count=processes, device=torch.device("cpu"))
        rows = shares(found.batch, found.micro_batches, here)
        assert [part.stop - part.start for part in rows] == found.accumulation * [found.batch]
    assert rows[-1].stop == 2048


@pytest.mark.parametrize(
    ("given_numbers", "line"),
    [
        ((2048, 7, 4), "2048 pictures do not divide among 7 GPUs; take 4 or 8"),
        ((32, 64, 4), "32 pictures do not divide among 64 GPUs; take 32"),
        ((2048, 8, 0), "a micro-batch of 0 pictures; expected room for 1 or more"),
        ((2048, 0, 4), "2048 pictures on 0 GPUs; expected 1 or more of both"),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(given_numbers, line):
    with pytest.raises(ValueError) as refusal:
        fit(*given_numbers)
    assert str(refusal.value) == line


# -- The same course on a smaller scale


def test_everything_that_counts_steps_or_pictures_shrinks_by_the_same_factor():
    recipe, small = the_recipe(), shrunk(the_recipe(), 100)
    assert (small.steps, small.optimiser.warm_up) == (2250, 100)
    assert 1 - small.optimiser.ema == pytest.approx(100 * (1 - recipe.optimiser.ema))
    assert (small.save_every, small.sheet_every, small.log_every) == (10, 10, 1)
    assert small.batch * small.accumulation == pytest.approx(2048 / 100, rel=0.05)


def test_what_is_no_count_stays():
    recipe, small = the_recipe(), shrunk(the_recipe(), 37.5)
    counts = {"steps", "batch", "accumulation", "log_every", "save_every", "sheet_every", "optimiser"}
    for field in dataclasses.fields(recipe):
        assert field.name in counts or getattr(small, field.name) == getattr(recipe, field.name), field.name
    assert dataclasses.replace(small.optimiser, warm_up=10_000, ema=0.9999) == recipe.optimiser


def test_a_factor_of_one_changes_nothing():
    assert shrunk(the_recipe(), 1) == the_recipe()


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 1e9), st.integers(1, 64), st.integers(1, 700), st.integers(0, 20_000), st.floats(0, 0.99999))
def test_every_shrunk_recipe_is_a_valid_recipe(factor, batch, accumulation, warm_up, ema):
    optimiser = dataclasses.replace(the_recipe().optimiser, warm_up=warm_up, ema=ema)
    recipe = dataclasses.replace(the_recipe(), batch=batch, accumulation=accumulation, optimiser=optimiser)
    small = shrunk(recipe, factor)
    assert make(UNetRecipe, asdict(small), "shrunk") == small
    assert small.batch <= batch and small.accumulation <= accumulation and small.steps >= 1
    assert (small.optimiser.warm_up == 0) == (warm_up == 0) and 0 <= small.optimiser.ema <= ema


@pytest.mark.parametrize("factor", [0.5, 0, -3, float("nan"), float("inf")])
def test_a_factor_below_one_is_refused(factor):
    with pytest.raises(ValueError, match=r"shrinking by .*; expected a number from 1"):
        shrunk(the_recipe(), factor)


# -- What is counted


@pytest.mark.parametrize(("dtype", "checkpointing"), [("bfloat16", False), ("float32", True)])
def test_the_table_of_bytes_is_what_counting_every_operation_gives(dtype, checkpointing):
    with torch.inference_mode(False), torch.enable_grad():
        counted = step_costs.memory(512, 4, dtype, checkpointing=checkpointing)
    expected = COSTS[512, dtype, checkpointing].memory(4)
    assert max(counted.forward, counted.backward) / 1e9 == pytest.approx(expected, abs=0.02)


def test_the_table_of_operations_is_what_counting_them_gives():
    with torch.inference_mode(False), torch.enable_grad():
        flops = step_costs.flops(512, checkpointing=True)
    assert sum(flops.values()) / 1e12 == pytest.approx(COSTS[512, "bfloat16", True].tflop, abs=0.001)


def test_computing_blocks_again_costs_less_than_a_forward_pass():
    for size in (256, 512):
        plain, again = (COSTS[size, "bfloat16", on].tflop for on in (False, True))
        assert plain / 4 < again - plain < plain / 3


def test_the_encoders_cost_what_counting_gives():
    found = step_costs.encoders(512)
    assert found["autoencoder"] / 1e12 == pytest.approx(LATENTS[512], abs=0.001)
    assert found["text encoder"] / 1e12 == pytest.approx(TEXT, abs=0.0001)


def test_the_state_is_of_the_unets_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(UNetConfig()).parameters()) == PARAMETERS


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_counted_without_memory_is_what_a_real_step_on_this_cpu_keeps(checkpointing):
    """With the casts of the CPU's autocast, which leaves norms in bfloat16."""
    with torch.inference_mode(False), torch.enable_grad():
        counted = step_costs.memory(64, 3, "bfloat16", checkpointing=checkpointing, config=TINY, high=set())
        unet = UNet(TINY)
        unet.checkpoint_gradients(checkpointing)
        for weight in unet.parameters():
            weight.grad = torch.zeros_like(weight)
        loss_of = step_costs.DenoisingLoss(unet, step_costs.ScheduleConfig(), 0.0)
        x0, t, context = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.randn(3, step_costs.TOKENS, 16)
        known = [*unet.parameters(), *(p.grad for p in unet.parameters()), *loss_of.buffers(), x0, t, context]
        with step_costs.Alive(known) as alive:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(x0, t, x0, context)
            kept = alive.now
            loss.backward()
    assert kept == pytest.approx(counted.kept, rel=0.01)


# -- The plan


def test_what_a_gpu_holds_grows_with_its_memory_with_sharding_and_with_checkpointing():
    small, large = Assumptions(memory=40), Assumptions(memory=80)
    for way in WAYS:
        assert largest_batch(512, 8, way, small) < largest_batch(512, 8, way, large)
    assert largest_batch(512, 8, "ddp", large) < largest_batch(512, 8, "fsdp", large)
    assert 5 * largest_batch(512, 8, "ddp", large) < largest_batch(512, 8, "ddp, checkpointing", large)
    assert state(8, sharded=True) < state(8, sharded=False) / 5


def test_a_plans_arithmetic_can_be_done_by_hand():
    assumed = Assumptions(tflops=100, utilisation=0.5, memory=80, cached=True)
    row = plan(the_recipe(), V1_4, [64], assumed)[0]
    flop = 225_000 * 2048 * COSTS[512, "bfloat16", False].tflop
    assert row.gpu_hours == pytest.approx(flop / 50 / 3600) and row.hours == pytest.approx(row.gpu_hours / 64)
    assert row.kwh == pytest.approx(row.gpu_hours * 0.25) and row.kg == pytest.approx(row.kwh * 0.30)
    assert row.pictures_per_second * row.hours * 3600 == pytest.approx(225_000 * 2048)
    assert row.batch * row.accumulation * 64 == 2048 and row.seconds_per_step * 225_000 == pytest.approx(row.hours * 3600)


def test_encoding_pictures_in_the_loop_takes_longer_than_having_them_encoded():
    ways = [plan(the_recipe(), V1_4, [8], Assumptions(cached=cached))[0].hours for cached in (True, False)]
    assert ways[1] > 1.3 * ways[0]


def test_a_gpu_too_small_for_the_whole_state_takes_shards_or_is_told_what_it_lacks():
    rows = plan(the_recipe(), V1_4, [1, 8], Assumptions(memory=16))
    assert rows[0].problem.startswith("a picture of 512 px needs ") and rows[1].way.startswith("fsdp")
    with pytest.raises(ValueError, match=r"a picture of 512 px needs .* GB on each of 1 GPUs, with 4"):
        plan(the_recipe(), V1_4, [1], Assumptions(memory=4))


def test_the_command_shows_a_row_for_each_number_of_gpus_and_what_it_rests_on(capsys, tmp_path):
    assert run(["plan", "--gpus", "8,256", "--json", str(tmp_path / "plan.json")]) == 0
    told = capsys.readouterr().out
    assert "225,000 steps of 2,048 pictures (512 x 4)" in told and "assumed: 40% of 312 TFLOP/s" in told
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [row["gpus"] for row in found["rows"]] == [8, 256]
    assert all(f"{row['gpu_hours']:,.0f}" in told for row in found["rows"])
    assert found["rows"][0]["gpu_hours"] == pytest.approx(found["rows"][1]["gpu_hours"])


def test_a_whole_history_is_added_up(capsys, tmp_path):
    assert run(["plan", "--history", "--gpus", "256", "--json", str(tmp_path / "plan.json")]) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert len(found["rows"]) == 4
    assert found["all phases"][0]["kg"] == pytest.approx(sum(row["kg"] for row in found["rows"]))
    assert "256 GPUs, all phases: " in capsys.readouterr().out


def test_a_shrunk_plan_says_which_gpus_are_too_many(capsys):
    assert run(["plan", "--shrink", "64", "--gpus", "8,64"]) == 0
    told = capsys.readouterr().out
    assert "shrunk by 64: 3,516 steps of 32 pictures (8 x 4), warm-up 156 steps" in told
    assert "32 pictures do not divide among 64 GPUs; take 32" in told


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "7"], "2048 pictures do not divide among 7 GPUs; take 4 or 8"),
        (["--gpus", "0"], "GPUs 0; expected 1 or more, as in 1,8,64,256"),
        (["--gpus", "few"], "gpus 'few'; expected a whole number, or several with commas, as in 1,8,64,256"),
        (["--gpu", "abacus"], "gpu 'abacus'; expected one of a100-40gb, a100, "),
        (["--checkpoint", "v2"], "checkpoint 'v2'; expected one of v1-1, v1-2, v1-3, v1-4"),
        (["--memory", "nan"], "memory nan; expected more than 0, and finite"),
        (["--tflops", "0"], "tflops 0; expected more than 0, and finite"),
        (["--utilisation", "40"], "utilisation 40; expected more than 0 and at most 1, as in 0.4"),
        (["--shrink", "0.5"], "shrinking by 0.5; expected a number from 1"),
        (["--kilowatts=-1"], "kilowatts -1; expected 0 or more, and finite"),
        (["--json", "/nowhere/plan.json"], "/nowhere/plan.json: there is no folder /nowhere; create it first"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, words, line):
    assert run(["plan", *words]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(f"ldm: {line}") and told.err.count("\n") == 1


def test_the_page_shows_the_plan_as_it_is():
    page = (ROOT / "docs" / "plan.md").read_text()
    for memory in (40, 80):
        for row in plan(the_recipe(), V1_4, [1, 8, 64, 256], Assumptions(memory=memory)):
            plain, again = ([row.largest.get(way, "-") for way in WAYS if WAYS[way][1] == on] for on in (False, True))
            fits = f"{plain[0]}, {plain[1]}; {again[0]}, {again[1]}"
            speed = f"{row.pictures_per_second:,.0f}" if row.gpus > 1 else "34.7"
            assert any(
                line.startswith(f"| {row.gpus} |") and f"| {fits} |" in line and f"| {speed} |" in line
                for line in page.splitlines()
            )
            assert f"| {row.gpu_hours:,.0f} | {row.kwh:,.0f} | {row.kg:,.0f} |" in page
    for (size, dtype, _), cost in COSTS.items():
        assert f"{cost.backward[1]:.3f}" in page, (size, dtype)
