"""The verdict on two traces: of every planted fault the guilty tensor and what it looks like, of a clean pair nothing."""

import pytest

import ldm
from ldm.numerics.diagnosis import diagnose
from ldm.numerics.runs import trace_txt2img
from ldm.numerics.traces import Trace
from tests.numerics_faults import FAULTS, planted

RUN = {"prompt": "a red cube", "sampler": "ddim", "steps": 2, "width": 64, "height": 64, "seed": 1}


@pytest.fixture(scope="module")
def model():
    return ldm.build("tiny", seed=0)


@pytest.fixture(scope="module")
def right(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "right.trace"
    trace_txt2img(model, path=path, **RUN)
    return Trace(path)


def traced(model, path, fault=None):
    with planted(fault, model) as copied:
        trace_txt2img(copied, path=path, **RUN)
    return Trace(path)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_and_known(model, right, tmp_path, fault):
    found = diagnose(right, traced(model, tmp_path / "b.trace", fault), model)
    print(f"{fault.name}: {found.guilty.key} {found.guilty.relative:.1e}; {'; '.join(found.known[:2])}")
    assert found.guilty.key.name == fault.guilty
    assert any(fault.known in known for known in found.known[:2]), found.known


def test_of_a_clean_pair_nothing_is_found(model, right, tmp_path):
    found = diagnose(right, traced(model, tmp_path / "b.trace"), model)
    assert found.guilty is None and found.comparison.first is None and not found.known
