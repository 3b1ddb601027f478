"""The protocol of the published answers, proven on random weights: what ours gives is what diffusers gives. (The answers
themselves are of weights that no test has.)"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import ldm
from ldm.numerics import known_answers
from ldm.numerics.known_answers import Recognised, answer, cases, recognise, verify, whole
from tests.measure import relative_error
from weights_convert.known_files import KNOWN, KnownFile

SIZE = 64
CASES = cases()


def test_every_published_case_is_known():
    assert len(CASES) == 8 and {case.version for case in CASES} == {"v1-1", "v1-4"}
    assert [case.sampler for case in CASES] == ["pndm", "pndm", "ddim", "lms", "dpmpp_2m", "pndm", "pndm", "pndm"]
    assert [case.steps for case in CASES] == [3, 3, 3, 3, 3, 25, 3, 3] and all(len(case.values) == 9 for case in CASES)
    assert [case.after_call for case in CASES[-2:]] == [1, 2] and CASES[4].smallest_sigma


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_protocol_gives_what_diffusers_gives(tiny_diffusers, case):
    from tests.test_parity_pipelines import load_pipeline, use

    case = replace(case, dtype=torch.float32)
    options = {"final_sigmas_type": "sigma_min"} if case.smallest_sigma else {}
    peer = use(load_pipeline("StableDiffusionPipeline", tiny_diffusers), case.sampler, **options)
    if case.freeu:
        peer.enable_freeu(**case.freeu)
    stated, seen = known_answers.protocol(), []
    latents = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, SIZE // 8, SIZE // 8))).float()
    made = peer(
        stated["prompt"],
        num_inference_steps=case.steps,
        guidance_scale=stated["guidance_scale"],
        height=SIZE,
        width=SIZE,
        latents=latents,
        output_type="np",
        callback_on_step_end=lambda pipe, i, t, kept: seen.append(kept["latents"]) or kept,
    ).images
    expected = torch.from_numpy(made) if case.after_call is None else seen[case.after_call]
    model = ldm.load(tiny_diffusers)
    found = whole(model, case, size=SIZE)
    print(f"{case.name}: {relative_error(found, expected):.1e}")
    assert relative_error(found, expected) < 1e-4
    assert answer(model, case, size=SIZE) == pytest.approx(expected[0, -3:, -3:, -1].flatten().tolist(), abs=1e-4)
    other = next(one for one in CASES if one.sampler != case.sampler)
    assert relative_error(whole(model, other, size=SIZE), expected) > 1e-2


def test_models_are_told_by_their_hash_or_by_what_they_call_themselves(tmp_path, monkeypatch):
    import hashlib

    (tmp_path / "x.ckpt").write_bytes(b"weights")
    monkeypatch.setitem(KNOWN, hashlib.sha256(b"weights").hexdigest(), KnownFile("sd-v1-3.ckpt", "v1-3", "ema"))
    assert recognise(tmp_path / "x.ckpt") == Recognised("v1-3", True, "its SHA-256 is that of sd-v1-3.ckpt")
    (tmp_path / "sd-v1-4.safetensors").write_bytes(b"others")
    found = recognise(tmp_path / "sd-v1-4.safetensors")
    assert (found.version, found.certain) == ("v1-4", False)
    for file, said, version in (
        ("model_index.json", "CompVis/stable-diffusion-v1-1", "v1-1"),
        ("unet/config.json", "./stable-diffusion-v1-2/unet", "v1-2"),
        ("unet/config.json", "somebody/else-v1-4", None),
        ("unet/config.json", None, None),
    ):
        folder = tmp_path / f"{said}"[:12].replace("/", " ")
        (folder / "unet").mkdir(parents=True)
        (folder / file).write_text(json.dumps({"_name_or_path": said}))
        assert recognise(folder).version == version, said
    assert recognise("bundled").version is None


def test_a_model_passes_by_its_own_answers_and_fails_by_others(monkeypatch):
    model = ldm.build("tiny", seed=0)
    monkeypatch.setattr(known_answers, "protocol", lambda real=known_answers.protocol: real() | {"height": SIZE})
    case = CASES[1]
    right = replace(case, values=tuple(answer(model, case)))
    monkeypatch.setattr(known_answers, "cases", lambda: [right, case, CASES[0], CASES[6]])
    found = list(verify(model, Recognised("v1-4", True, "")))
    assert [one.verdict for one in found] == ["pass", "fail", "not applicable", "not applicable"]
    assert "published for v1-1; this is v1-4" in found[2].why and "--dtype float16" in found[3].why
    assert {one.verdict for one in verify(model, Recognised(None, False, ""))} == {"not applicable"}
