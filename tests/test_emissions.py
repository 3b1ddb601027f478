"""Emissions: the model card's arithmetic, in one place."""

import json
import math

import pytest

from ldm.cli import run
from ldm.training import bundled
from ldm.training.emissions import PowerRecipe, emissions


def test_the_figure_of_the_model_card():
    assert emissions(150_000).kg == pytest.approx(11_250) and emissions(150_000).kwh == 37_500


def test_the_defaults_are_the_cards_and_the_bundled_models_recipe_has_its_own():
    assert PowerRecipe() == PowerRecipe(kilowatts=0.25, kg_per_kwh=0.30)
    assert bundled.read(bundled.RECIPE)["power"]["kilowatts"] == 0.05


def test_the_bundled_models_record_is_the_same_function(tmp_path):
    for name, seconds in (("judge", 1800.0), ("unet", 5400.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": seconds, "loss": 1.0}) + "\n")
        (tmp_path / name / "recipe.json").write_text("{}")
    power = PowerRecipe(kilowatts=3.0, kg_per_kwh=0.5)
    for count in (1, 8):  # of processes, a GPU each
        log = bundled.log({name: tmp_path / name for name in ("judge", "unet")}, {}, power, count)
        kg = emissions(2.0 * count, power).kg
        assert log["emissions"] == {"hours": 2.0 * count, "kilowatts": 3.0, "kg_per_kwh": 0.5, "kg": kg} and kg == 3.0 * count


@pytest.mark.parametrize("hours", [-1.0, math.nan, math.inf])
def test_hours_that_are_none_are_refused(hours):
    with pytest.raises(ValueError, match=r"hours .*; expected 0 or more, and finite"):
        emissions(hours)


def test_the_command_says_it_in_one_line(capsys):
    assert run(["emissions", "--hours", "150000"]) == 0
    assert capsys.readouterr().out == "150,000 h x 0.25 kW x 0.30 kg/kWh = 37,500 kWh, 11,250 kg CO2 eq.\n"


def test_the_command_writes_json(capsys):
    assert run(["emissions", "--hours", "10", "--kilowatts", "2", "--kg-per-kwh", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"hours": 10.0, "kilowatts": 2.0, "kg_per_kwh": 0.1, "kwh": 20.0, "kg": 2.0}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--hours", "nan"], "hours nan; expected 0 or more, and finite"),
        (["--hours=-3"], "hours -3; expected 0 or more, and finite"),
        (["--hours", "1", "--kilowatts=-0.25"], "kilowatts -0.25; expected 0 or more, and finite"),
        (["--hours", "1", "--kg-per-kwh", "inf"], "kg a kWh inf; expected 0 or more, and finite"),
    ],
)
def test_bad_numbers_are_refused_in_one_line(capsys, words, line):
    assert run(["emissions", *words]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"ldm: {line}\n")


def test_a_word_for_a_number_is_a_fault_of_the_command_line(capsys):
    with pytest.raises(SystemExit) as left:
        run(["emissions", "--hours", "many"])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1
