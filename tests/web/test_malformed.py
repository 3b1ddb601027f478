"""Requests that are not what they should be: each is told what is wrong with it, and none is a fault of the server's."""

import asyncio
import json

import pytest

from ldm.web import refusals
from ldm.web.images_api import invalid
from tests.web.conftest import PROMPT

JSON = {"Content-Type": "application/json"}
MAKING = ("/v1/images", "/sdapi/v1/txt2img")


def details(answer) -> list[dict]:
    assert answer.status_code == 422, answer.text
    found = answer.json()["detail"]
    assert found and all(set(detail) == {"type", "loc", "msg"} for detail in found)
    return found


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_numbers_that_are_none(server, number):
    for path, fields in zip(MAKING, (("guidance_scale", "seed"), ("cfg_scale", "seed")), strict=True):
        for field in fields:
            body = f'{{"prompt": "{PROMPT}", "{field}": {number}}}'
            answer = server.client.post(path, content=body, headers=JSON)
            assert [detail["loc"] for detail in details(answer)] == [["body", field]]


def test_halves_of_letters(server):
    for path in MAKING:
        answer = server.client.post(path, content=r'{"prompt": "\ud800"}', headers=JSON)
        assert [detail["loc"] for detail in details(answer)] == [["body", "prompt"]]
    answer = server.client.post("/v1/images", content=r'{"prompt": "a", "x\udfff": 1}', headers=JSON)
    assert [detail["loc"] for detail in details(answer)] == [["body"]]
    answer = asyncio.run(refusals._refuse(None, invalid("x\udfff", "no \ud800 here")))
    assert json.loads(answer.body)["detail"] == [{"type": "value_error", "loc": ["body", "x?"], "msg": "no ? here"}]


def test_bytes_of_no_stated_kind(server):
    for path in MAKING:
        details(server.client.post(path, content=b"\xff\xfe"))


def test_what_was_sent_is_not_sent_back(server):
    answer = server.client.post("/v1/images", json={"prompt": ["x" * (1 << 20)], "y" * (1 << 20): 1})
    assert {tuple(detail["loc"])[:1] for detail in details(answer)} == {("body",)} and len(answer.content) < 5000
    answer = server.client.post("/v1/images", json={"prompt": "a", **{f"field{i}": i for i in range(10_000)}})
    assert len(details(answer)) == refusals.MOST
    nested = "[" * 200 + "]" * 200
    details(server.client.post("/v1/images", content=f'{{"prompt": {nested}}}', headers=JSON))
