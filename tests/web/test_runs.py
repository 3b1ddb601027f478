"""Jobs on the device: batch after batch, what is kept of those that are given up, and what nobody is told or shown."""

import dataclasses
import json
import time

import pytest

import ldm
from ldm.models.safety import SafetyChecker
from ldm.web import jobs as queue
from ldm.web import runs
from ldm.web.jobs import Jobs
from tests import golden_inputs, lora_files, seeded
from tests.web.test_queue import held, request


@pytest.fixture
def jobs(bundled):
    found = Jobs(bundled)
    yield found
    found.close()


def test_several_batches_are_one_run_whose_progress_never_falls(jobs, monkeypatch):
    seen, real = [], runs._Hook.__call__

    def looked(hook, x, info):
        x = real(hook, x, info)
        seen.append((hook.jobs[0].step, hook.jobs[0].steps, hook.jobs[0].progress))
        return x

    monkeypatch.setattr(runs._Hook, "__call__", looked)
    asked = request(num_images=5, batch_size=2, sampler="ddim")
    job = jobs.submit("txt2img", asked)
    assert job.over.wait(120) and job.state == queue.DONE, job.error
    assert seen == [(step, 9, step / 9) for step in range(1, 10)]
    alone = ldm.txt2img(jobs.components, **asked)
    assert [picture.tobytes() for picture in job.result.images] == [picture.tobytes() for picture in alone.images]
    assert job.result.receipts == alone.receipts and len(job.result.safety) == 5


@pytest.mark.parametrize("keep", [True, False])
def test_of_a_cancelled_job_the_finished_batches_are_kept_where_that_is_asked_for(jobs, keep):
    asked = request(num_images=4, batch_size=1, steps=30)
    job = jobs.submit("txt2img", asked)
    deadline = time.monotonic() + 30
    while job.batch < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    jobs.cancel(job, keep)
    assert job.state == queue.CANCELLED and job.over.is_set()
    if not keep:
        assert job.result is None
        return
    assert len(job.result.images) == 2 and jobs.totals["pictures"] == 2
    alone = ldm.txt2img(jobs.components, **asked | {"num_images": 2})
    assert [picture.tobytes() for picture in job.result.images] == [picture.tobytes() for picture in alone.images]
    assert job.result.receipts == alone.receipts


def test_nothing_is_kept_of_a_job_whose_first_batch_was_under_way(jobs):
    first = held(jobs)
    jobs.cancel(first, keep=True)
    assert first.state == queue.CANCELLED and first.result is None


def test_what_a_safety_checker_may_withhold_is_not_shown_before_it_is_finished(bundled, monkeypatch):
    checker = seeded.fill(SafetyChecker(golden_inputs.SAFETY))
    checker.concept_thresholds.fill_(2.0)
    checker.special_care_thresholds.fill_(2.0)
    previews = []
    monkeypatch.setattr(runs, "PREVIEW_EVERY", 0.0)
    monkeypatch.setattr(runs, "png", lambda picture: previews.append(picture) or b"some PNG")
    jobs = Jobs(dataclasses.replace(bundled, safety=checker))
    for safety, shown in (("black", False), ("blur", False), ("flag", True), ("off", True)):
        busy = held(jobs)
        job = jobs.submit("txt2img", request(safety=safety), views=("denoising",))
        job.watch()
        jobs.cancel(busy)
        assert job.over.wait(120) and job.state == queue.DONE, job.error
        assert (bool(previews), bool(job.denoising), job.withheld is None) == (shown,) * 3, safety
        previews.clear()
    jobs.close()


def test_receipts_and_refusals_tell_no_folder_of_the_server_and_replay_works_with_one_that_is_named(tmp_path):
    tiny = ldm.build("tiny", seed=0)
    lora_files.kohya(tmp_path / "style.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    jobs = Jobs(tiny)
    fields = {"adapter_folder": str(tmp_path), "width": 32, "height": 32}
    good, bad = (jobs.submit("txt2img", request(**fields, prompt=f"a <lora:{name}:1>")) for name in ("style", "broken"))
    assert good.over.wait(120) and bad.over.wait(120)
    (receipt,) = good.result.receipts
    assert str(tmp_path) not in json.dumps(receipt) and receipt["adapters"][0]["name"] == "style"
    assert ldm.replay(tiny, receipt, adapter_folder=tmp_path).same
    assert bad.state == queue.FAILED and "broken.safetensors" in bad.error and str(tmp_path) not in bad.error
    jobs.close()


def test_views_for_those_who_study_the_model(jobs):
    job = jobs.submit("txt2img", request(prompt="a red cube", steps=30), views=("attention", "denoising"))
    assert job.over.wait(120) and job.state == queue.DONE, job.error
    assert [word for word, _ in job.attention] == ["a", "red", "cube"]
    assert all(picture.size == job.result.images[0].size for _, picture in job.attention)
    assert len({picture.tobytes() for _, picture in job.attention}) == 3
    assert 10 <= len(job.denoising) <= 24 and job.denoising[0][1].tobytes() != job.denoising[-1][1].tobytes()
