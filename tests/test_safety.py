"""The safety checker: what is flagged, what is done about it, and that diffusers decides alike."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.models.safety import SafetyChecker
from ldm.output.safety import ACTIONS, act, check, prepared
from tests import golden_inputs, seeded

SIZES = [(64, 64), (50, 33), (33, 50), (28, 28), (29, 40), (9, 300)]


def picture(number, size=(40, 32)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def checker():
    """The small one, with thresholds that nothing passes."""
    made = seeded.fill(SafetyChecker(golden_inputs.SAFETY))
    made.concept_thresholds.fill_(2.0)
    made.special_care_thresholds.fill_(2.0)
    return made


def set_margins(checker, image, concepts=(), special=()):
    """Thresholds at which the image has these margins, by concept's number."""
    (verdict,) = check(checker, [image])
    for i, margin in dict(concepts).items():
        checker.concept_thresholds[i] = verdict.cosines[i] - margin
    for i, margin in dict(special).items():
        checker.special_care_thresholds[i] = verdict.special_care_cosines[i] - margin


@pytest.mark.parametrize(("margin", "flagged"), [(0.1, True), (0.0006, True), (0.0004, False), (-0.0004, False), (-0.1, False)])
def test_a_concept_is_hit_where_its_margin_rounds_to_more_than_0(checker, margin, flagged):
    set_margins(checker, picture(0), concepts={3: margin})
    (verdict,) = check(checker, [picture(0)])
    assert verdict.flagged == flagged and verdict.concepts == ((3,) if flagged else ())
    assert verdict.margins[3] == round(margin, 3) and len(verdict.margins) == 17 and len(verdict.special_care_margins) == 3


def test_special_care_makes_everything_after_it_stricter_and_flags_nothing(checker):
    set_margins(checker, picture(0), concepts={3: -0.005}, special={0: -0.005, 1: 0.1, 2: -0.005})
    (verdict,) = check(checker, [picture(0)])
    assert verdict.special_care == (1, 2) and verdict.special_care_margins == (-0.005, 0.1, 0.005)
    assert verdict.concepts == (3,) and verdict.margins[3] == 0.005
    set_margins(checker, picture(0), concepts={3: -0.5})
    assert not check(checker, [picture(0)])[0].flagged


def test_a_picture_is_judged_whatever_is_beside_it(checker):
    pictures = [picture(i, size) for i, size in enumerate(SIZES * 2)]
    together = check(checker, pictures)
    for image, verdict in zip(pictures, together, strict=True):
        (alone,) = check(checker, [image])
        assert alone.margins == verdict.margins and np.allclose(alone.cosines, verdict.cosines, atol=1e-6)


def test_what_is_done_about_it(checker):
    set_margins(checker, picture(0), concepts={3: 0.1})
    (hit,) = check(checker, [picture(0)])
    passed = dataclasses.replace(hit, flagged=False)
    black, blurred, flagged, off = (act(picture(0), hit, action) for action in ACTIONS)
    assert not np.asarray(black).any() and black.size == (40, 32)
    assert np.asarray(blurred).std() < np.asarray(picture(0)).std() / 5
    assert flagged == off == picture(0)
    assert all(act(picture(0), verdict, action) == picture(0) for action in ACTIONS for verdict in (passed, None))


# -- In the pipelines ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(checker):
    components = ldm.build("tiny", seed=0)
    for module in (components.text_encoder, components.unet, components.autoencoder):
        seeded.fill(module)
    return dataclasses.replace(components, safety=checker)


SMALL = {"width": 32, "height": 32, "steps": 1, "seed": 1}


def test_a_flagged_picture_is_blacked_unless_asked_otherwise(model):
    plain = ldm.txt2img(model, "a", safety="off", **SMALL)
    assert plain.safety == [None] and "verdict" not in plain.receipts[0]
    set_margins(model.safety, plain.images[0], concepts={5: 0.2})
    made = {action: ldm.txt2img(model, "a", safety=action, **SMALL) for action in ("black", "blur", "flag")}
    assert not np.asarray(made["black"].images[0]).any() and made["flag"].images[0] == plain.images[0]
    assert made["blur"].images[0] not in (plain.images[0], made["black"].images[0])
    assert ldm.txt2img(model, "a", **SMALL).images[0] == made["black"].images[0]
    for result in made.values():
        assert result.safety[0].concepts == (5,) and result.receipts[0]["verdict"]["margins"][5] == pytest.approx(0.2, abs=1e-3)
        assert ldm.replay(model, json.loads(json.dumps(result.receipts[0]))).same


def test_a_model_can_be_loaded_without_its_checker(tiny_native_safe):
    assert isinstance(ldm.load(tiny_native_safe).safety, SafetyChecker)
    without = ldm.load(tiny_native_safe, safety=False)
    assert without.safety is None and "safety" not in without.sources
    assert ldm.txt2img(without, "a", **SMALL).safety == [None]


def test_another_action_is_refused(model):
    with pytest.raises(ValueError, match="safety 'pixelate'; expected one of black, blur, flag, off"):
        ldm.txt2img(model, "a", safety="pixelate", **SMALL)


# -- Against diffusers -----------------------------------------------------------------------------------------------------


def decisions(peer, processor, pictures):
    """Cosines, scores rounded to three places, and flags, as diffusers' pipeline makes them: its forward keeps the former to
    itself, so they are read on the way."""
    from unittest import mock

    from diffusers.pipelines.stable_diffusion import safety_checker as peers_module

    cosines, rounded = [], []

    def measured(a, b, real=peers_module.cosine_distance):
        cosines.append(real(a, b))
        return cosines[-1]

    def noted(value, digits=None, real=round):
        rounded.append(real(value, digits))
        return rounded[-1]

    pixels = processor(pictures, return_tensors="pt").pixel_values
    with (
        mock.patch.object(peers_module, "cosine_distance", measured),
        mock.patch.object(peers_module, "round", noted, create=True),
    ):
        _, flags = peer(images=[np.ones((2, 2, 3)) for _ in pictures], clip_input=pixels)
    return torch.cat(cosines, dim=1), np.array(rounded, dtype=float).reshape(len(pictures), -1), flags


def compare(config, count):
    from transformers import CLIPImageProcessor

    from tests import peers

    peer = seeded.fill(peers.safety_checker(config))
    processor = CLIPImageProcessor(size=config.image_size, crop_size=config.image_size)
    ours = SafetyChecker(config).eval()
    pictures = [picture(i, SIZES[i % len(SIZES)]) for i in range(count)]
    ours.load_state_dict(native_of(peer, config))
    first = check(ours, pictures)
    # One concept of each kind is hit by half of the pictures, the others by none.
    for name, held in (("concept", "cosines"), ("special_care", "special_care_cosines")):
        cosines = torch.tensor([getattr(v, held) for v in first])
        thresholds = cosines.amax(dim=0) + 0.02
        thresholds[1] = cosines[:, 1].quantile(0.5)
        getattr(ours, f"{name}_thresholds").copy_(thresholds)
        getattr(peer, f"{name}_embeds_weights").copy_(thresholds)
    verdicts = check(ours, pictures)
    cosines, scores, flags = decisions(peer, processor, pictures)
    apart = float((torch.tensor([[*v.special_care_cosines, *v.cosines] for v in verdicts]) - cosines).abs().max())
    found = np.array([[*v.special_care_margins, *v.margins] for v in verdicts])
    assert [v.flagged for v in verdicts] == flags and 0 < sum(flags) < count
    assert any(v.special_care for v in verdicts) and np.abs(found - scores).max() < 1e-5 and apart < 1e-5
    return apart


def native_of(peer, config):
    from weights_convert import architecture
    from weights_convert.naming import bijection, to_native

    shape = architecture.SafetyChecker(**dataclasses.asdict(config))
    states = peer.state_dict()
    naming = "transformers-5" if any(name.startswith("vision_model.embeddings") for name in states) else "transformers"
    return {entry.native: to_native(entry, states[entry.foreign]) for entry in bijection(shape, naming)}


@pytest.mark.reference
def test_decisions_and_scores_are_diffusers():
    compare(golden_inputs.SAFETY, 24)


@pytest.mark.reference
@pytest.mark.slow
def test_decisions_and_scores_are_diffusers_at_full_size():
    from ldm.models.safety import SafetyConfig

    print("largest difference of a cosine:", compare(SafetyConfig(), 12))


@pytest.mark.reference
@pytest.mark.parametrize("size", [*SIZES, (500, 333), (224, 400)])
@pytest.mark.parametrize("side", [28, 224])
def test_a_picture_is_prepared_to_the_last_bit_as_transformers_does(size, side):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size=side, crop_size=side)
    image = picture(1, size)
    assert torch.equal(prepared(image, side), processor(image, return_tensors="pt").pixel_values[0])
