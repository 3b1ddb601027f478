"""The queue: what goes together, what is cancelled, what is forgotten; and many clients at once."""

import base64
import contextlib
import io
import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from PIL import Image

import ldm
from ldm.pipelines import together
from ldm.web import jobs as queue
from ldm.web import runs
from ldm.web.jobs import Jobs
from tests.measure import relative_error
from tests.web.conftest import PROMPT, running

OTHER = "a green cone left of a purple cylinder"


def request(**fields):
    return {"prompt": PROMPT, "steps": 3, "guidance_scale": 3.0, "seed": 1, **fields}


def test_requests_made_together_are_the_pictures_that_each_makes_alone(bundled):
    asked = [request(), request(prompt=OTHER, seed=7, num_images=2), request(negative_prompt="blurry", seed=2**40)]
    results = together.txt2img_together(bundled, asked)
    for fields, result in zip(asked, results, strict=True):
        own = dict(fields)
        alone = ldm.txt2img(bundled, own.pop("prompt"), **own)
        assert relative_error(result.latents, alone.latents) < 1e-4
        for receipt, expected in zip(result.receipts, alone.receipts, strict=True):
            changing = ("batch", "latents_sha256", "pixels_sha256")
            assert {k: v for k, v in receipt.items() if k not in changing} == {
                k: v for k, v in expected.items() if k not in changing
            }
            strangers = {other["prompt"] for other in asked} - {fields["prompt"]}
            assert receipt["batch"] == 4 and not any(prompt in str(receipt) for prompt in strangers)
    with pytest.raises(ValueError, match="differ in more than prompts and seeds"):
        together.txt2img_together(bundled, [request(), request(steps=4)])
    with pytest.raises(ValueError, match="draws for all images of a run at once"):
        together.txt2img_together(bundled, [request(convention="compvis", steps=4)] * 2)


@pytest.fixture
def jobs(bundled):
    found = Jobs(bundled, bound=50)
    yield found
    found.close()


def held(jobs):
    """A job that keeps the thread busy until it is cancelled."""
    job = jobs.submit("txt2img", request(steps=500, num_images=4))
    while job.state == queue.WAITING:
        time.sleep(0.005)
    return job


def test_what_waits_and_is_alike_goes_together_up_to_the_bound(jobs, monkeypatch):
    sizes = []
    real = runs.txt2img_together
    monkeypatch.setattr(runs, "txt2img_together", lambda c, asked, **more: sizes.append(len(asked)) or real(c, asked, **more))
    first = held(jobs)
    alike = [jobs.submit("txt2img", request(seed=i, prompt=OTHER if i % 2 else PROMPT)) for i in range(5)]
    different = jobs.submit("txt2img", request(steps=2))
    picture = Image.new("RGB", (64, 64), "orange")
    from_image = jobs.submit("img2img", {**request(), "image": picture, "strength": 0.5})
    assert [jobs.position(job) for job in alike[:2]] == [1, 2]
    jobs.cancel(first)
    for job in (*alike, different, from_image):
        assert job.over.wait(120) and job.state == queue.DONE, job.error
    assert sizes == [4]
    for i, job in enumerate(alike):
        assert job.result.receipts[0]["seed"] == i
        alone = ldm.txt2img(jobs.components, OTHER if i % 2 else PROMPT, steps=3, guidance_scale=3.0, seed=i)
        assert ldm.images.difference(job.result.images[0], alone.images[0])[0] <= 1
    assert "image" not in from_image.fields and from_image.result.latents is None


def test_one_that_is_refused_spoils_nothing_for_those_it_went_with(jobs):
    first = held(jobs)
    good = [jobs.submit("txt2img", request(seed=i)) for i in range(2)]
    bad = jobs.submit("txt2img", request(prompt="(", prompt_syntax="plain", seed=2**64))
    jobs.cancel(first)
    assert all(job.over.wait(120) for job in (*good, bad))
    assert [job.state for job in (*good, bad)] == [queue.DONE, queue.DONE, queue.FAILED]
    assert "seed" in bad.error and not bad.fault


def test_a_fault_of_ours_is_told_apart_and_the_queue_goes_on(jobs, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("secret detail")

    monkeypatch.setitem(runs.PIPELINES, "txt2img", broken)
    job = jobs.submit("txt2img", request())
    assert job.over.wait(120) and job.state == queue.FAILED and job.fault and "secret" not in job.error
    monkeypatch.undo()
    assert (job := jobs.submit("txt2img", request())).over.wait(120) and job.state == queue.DONE


def test_cancelling_one_of_several_leaves_the_others(jobs):
    first = held(jobs)
    pair = [jobs.submit("txt2img", request(steps=60, seed=i)) for i in range(2)]
    jobs.cancel(first)
    while pair[0].step < 3:
        time.sleep(0.005)
    jobs.cancel(pair[0])
    assert pair[0].over.is_set() and pair[0].state == queue.CANCELLED
    assert pair[1].over.wait(120) and pair[1].state == queue.DONE


def test_finished_jobs_are_forgotten_even_while_nobody_asks_for_anything(bundled):
    jobs = Jobs(bundled, kept=2, seconds=5.0)
    made = [jobs.submit("txt2img", request(steps=1)) for _ in range(3)]
    assert all(job.over.wait(120) for job in made)
    assert jobs.get(made[0].id) is None and jobs.get(made[2].id) is made[2]
    deadline = time.monotonic() + 60
    while jobs.known and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not jobs.known
    jobs.close()
    with pytest.raises(queue.FullError, match="shut down"):
        jobs.submit("txt2img", request())


def test_the_oldest_are_forgotten_where_the_pictures_of_all_take_too_much_room(bundled):
    one = 64 * 64 * 3  # bytes
    jobs = Jobs(bundled, together=1, room=3 * one)
    made = [jobs.submit("txt2img", request(steps=1, num_images=count)) for count in (1, 1, 2)]
    assert all(job.over.wait(120) for job in made)
    assert [jobs.get(job.id) for job in made] == [None, made[1], made[2]]
    large = jobs.submit("txt2img", request(prompt="a red cube", steps=2), views=("attention", "denoising"))
    assert large.over.wait(120) and large.size == (1 + 3 + 2) * one
    assert [jobs.get(job.id) for job in (*made[1:], large)] == [None, None, large]  # the last one stays, whatever its size
    jobs.close()


def abandoned(url: str, asked: dict) -> None:
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/images", json=asked, timeout=httpx.Timeout(10, read=0.05))


def test_many_clients_a_third_of_whom_misbehave(bundled):
    """200 requests from 16 clients: no 5xx, no picture lost or another's, memory flat."""
    torch.manual_seed(0)
    picture = Image.new("RGB", (64, 64), "orange")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    malformed = [
        {"content": b"{not json", "headers": {"Content-Type": "application/json"}},
        {"content": b"\xff\xfe\x00", "headers": {"Content-Type": "application/json"}},
        {"json": {"prompt": PROMPT, "num_inference_steps": "many"}},
        {"json": {"prompt": PROMPT, "width": 63}},
        {"json": {"prompt": PROMPT, "image": "AAAA" * 1000}},
        {"json": {"prompt": "x" * 50_000}},
        {"content": b"x" * (50 << 20), "headers": {"Content-Type": "application/json"}},
        {"json": [[[]]]},
    ]
    with running(bundled, bound=64) as server:
        answering, stop = [], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                start = time.monotonic()
                assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
                answering.append(time.monotonic() - start)
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()

        def ask(i: int) -> tuple[int, int | None]:
            draw = random.Random(i)
            if i % 6 == 0:
                return httpx.post(f"{server.url}/v1/images", timeout=60, **draw.choice(malformed)).status_code, None
            asked = {"prompt": draw.choice((PROMPT, OTHER)), "num_inference_steps": draw.choice((2, 3)), "seed": i}
            if i % 6 == 1:
                abandoned(server.url, asked | {"num_inference_steps": 20})
                return 0, None
            if i % 6 == 2:
                asked["image"] = image
            answer = httpx.post(f"{server.url}/v1/images", json=asked, timeout=120)
            if answer.status_code != 200:
                return answer.status_code, None
            (found,) = answer.json()["images"]
            assert found["seed"] == i and found["receipt"]["prompt"] == asked["prompt"]
            return 200, i

        with ThreadPoolExecutor(16) as pool:
            first = list(pool.map(ask, range(100)))
            middle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            second = list(pool.map(ask, range(100, 200)))
            end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stop.set()
        watcher.join()
        statuses = [status for status, _ in (*first, *second)]
        made = [i for _, i in (*first, *second) if i is not None]
        assert max(statuses) < 500 and set(statuses) <= {0, 200, 400, 413, 422}
        assert made == [i for i in range(200) if i % 6 > 1]
        assert end - middle < 200_000  # kilobytes; the largest body alone is 50 MB
        assert max(answering) < 5 and len(answering) > 5
        deadline = time.monotonic() + 20
        while (server.jobs.waiting or server.jobs.running) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not server.jobs.waiting and not server.jobs.running
        for i in random.Random(0).sample(made, 8):  # as made alone, whoever they were made with
            draw = random.Random(i)
            fields = {"seed": i, "guidance_scale": 7.5}
            prompt, fields["steps"] = draw.choice((PROMPT, OTHER)), draw.choice((2, 3))
            alone = ldm.img2img(bundled, prompt, picture, **fields) if i % 6 == 2 else ldm.txt2img(bundled, prompt, **fields)
            job = next((job for job in server.jobs.known.values() if job.result and job.result.receipts[0]["seed"] == i), None)
            if job is not None:
                assert ldm.images.difference(job.result.images[0], alone.images[0])[0] <= 1
