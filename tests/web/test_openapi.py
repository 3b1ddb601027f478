"""Requests drawn from the API's own description, and from around it: none is answered with a 5xx."""

from collections.abc import Iterator

import pytest

import ldm
from ldm.web import runs
from tests.web.conftest import running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


@pytest.fixture(scope="module")
def operations() -> Iterator[list]:
    """Of a server that makes one small picture of whatever it is asked for: what is tried out is the way to it."""
    patch = pytest.MonkeyPatch()
    for task, real in list(runs.PIPELINES.items()):

        def quick(components, real=real, **fields):
            small = {"steps": min(fields["steps"], 2), "num_images": 1, "width": 64, "height": 64}
            return real(components, **{**fields, **small})

        patch.setitem(runs.PIPELINES, task, quick)
    with running(ldm.build("tiny", seed=0), bound=64) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        yield [found.ok() for found in schema.get_all_operations()]
    patch.undo()


def test_no_request_is_answered_with_a_fault_of_the_server_s(operations):
    asked = []

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.data())
    def ask(data):
        operation = data.draw(st.sampled_from(operations))
        response = data.draw(operation.as_strategy()).call(timeout=60)
        asked.append((operation.label, response.status_code))
        assert response.status_code < 500, (operation.label, response.text)
        if response.status_code == 422:
            assert all({"loc", "msg"} <= set(detail) for detail in response.json()["detail"])

    ask()
    assert {label for label, _ in asked} == {operation.label for operation in operations}
    assert {200, 404, 422} <= {status for _, status in asked}
