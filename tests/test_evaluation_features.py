"""CLIP as an instrument: embeddings and score are those of transformers, torchmetrics and our own training."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.evaluation import features
from ldm.evaluation.clip_score import clip_score, cosines
from ldm.models.clip import ImageConfig, normalised
from ldm.output.safety import prepared
from ldm.presets import preset
from ldm.scenes import captions
from ldm.scenes.render import render
from ldm.scenes.world import draw
from ldm.text.tokenizer import Tokenizer
from ldm.training.clip import CLIP
from tests import golden_inputs, seeded
from tests.conftest import write_native
from tests.instruments import HAS_TORCH_FIDELITY, error, pictures, torch_fidelity_module
from tests.refusal import one_line
from weights_convert import CheckpointError

PROMPTS = ["a red cube", "", "An astronaut, riding a horse.", "café " * 90]


@pytest.fixture(scope="module")
def peer():
    """transformers' CLIPModel, small, of seeded weights."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    common = {"num_hidden_layers": 2, "projection_dim": 24}
    text = CLIPTextConfig(hidden_size=48, intermediate_size=96, num_attention_heads=3, **common)
    image = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2, image_size=28, patch_size=7, **common)
    made = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=image.to_dict(), projection_dim=24))
    for part in (made.text_model, made.vision_model, made.text_projection, made.visual_projection):
        seeded.fill(part, 1)
    return made.eval()


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    """The same as a folder, as transformers writes it."""
    path = tmp_path_factory.mktemp("clip") / "small"
    peer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ids():
    """PROMPTS as token ids, by what tests/test_tokenizer.py holds against transformers' own."""
    return Tokenizer.clip()(PROMPTS).ids


def embedding(found):
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.reference
def test_embeddings_of_pictures_are_those_of_transformers_from_their_own_preparation(peer, folder):
    from transformers import CLIPImageProcessorPil

    prepare = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = prepare(pictures(), return_tensors="pt").pixel_values
    assert error(torch.stack([prepared(picture, 28) for picture in pictures()]), pixels) < 1e-6
    assert error(features.clip(folder).pictures(pictures()), embedding(peer.get_image_features(pixel_values=pixels))) < 2e-6


@pytest.mark.reference
def test_embeddings_of_prompts_are_those_of_transformers(peer, folder, ids):
    assert error(features.clip(folder).texts(PROMPTS), embedding(peer.get_text_features(input_ids=ids))) < 2e-6


@pytest.mark.reference
def test_the_clip_score_is_that_of_transformers_and_of_torchmetrics(peer, folder, ids):
    if HAS_TORCH_FIDELITY:
        torch_fidelity_module()
    from torchmetrics.functional.multimodal.clip_score import clip_score as theirs

    clip, given = features.clip(folder), pictures()[: len(PROMPTS)]
    found = clip_score(clip.pictures(given), clip.texts(PROMPTS))
    pixels = torch.stack([prepared(picture, 28) for picture in given])
    outputs = peer(input_ids=ids, pixel_values=pixels)
    assert found.mean == pytest.approx((outputs.image_embeds * outputs.text_embeds).sum(1).mean().item(), rel=1e-6)

    def processor(text=None, images=None, **_):
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if images is None else {"pixel_values": pixels}

    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in given]
    score = theirs(tensors, PROMPTS, lambda: (AsTransformers4(peer), processor)).item()
    assert score > 0 and found.hundredfold == pytest.approx(score, rel=1e-6)


class AsTransformers4:
    """A CLIPModel that gives embeddings themselves, as it did up to transformers 4; torchmetrics 1.9 expects that."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def to(self, _):
        return self

    def get_image_features(self, pixels):
        return embedding(self.model.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids, _):
        return embedding(self.model.get_text_features(input_ids=ids))


def test_a_negative_clip_score_is_0_in_torchmetrics_unit_only():
    score = clip_score(torch.tensor([[1.0, 0], [3, 4]]), torch.tensor([[-2.0, 0], [6, 8]]) * torch.tensor([[1], [-1]]))
    assert (score.mean, score.hundredfold, score.count) == (-1, 0, 2)
    assert cosines(torch.tensor([[3.0, 4]]), torch.tensor([[1.0, 0]])).tolist() == [pytest.approx(0.6)]
    with pytest.raises(ValueError, match=r"shapes \[2, 3\] and \[1, 3\]; expected the same"):
        clip_score(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="the cosine of pair 1 is NaN"):
        clip_score(torch.tensor([[1.0], [float("nan")]]), torch.ones(2, 1))


def test_the_bundled_clip_tells_what_a_render_shows():
    scenes = [draw(7, i) for i in range(12)]
    said = [captions.words(captions.state(scene, np.random.default_rng(i))) for i, scene in enumerate(scenes)]
    shown = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in render(scenes, 64)]
    clip = features.clip("bundled")
    embedded, texts = clip.pictures(shown), clip.texts(said)
    assert embedded.shape == texts.shape == (12, clip.width) and embedded.dtype == torch.float32
    assert clip_score(embedded, texts).mean > 0.7 > 0.3 > clip_score(embedded, texts.roll(1, 0)).mean
    assert (clip.name, clip.resize) == ("CLIP of bundled", "none (64 x 64)")
    bicubic = features.clip("bundled", resize="bicubic")
    assert torch.equal(bicubic.pictures(shown), embedded) and bicubic.fingerprint != clip.fingerprint


def test_a_native_folder_embeds_with_its_towers_as_ldm_train_clip_trains_them(tmp_path):
    text = preset("tiny").text_encoder
    fields = ("image_size", "patch_size", "width", "layers", "heads", "mlp_width")
    image = {name: getattr(golden_inputs.SAFETY, name) for name in fields} | {"projection_width": text.width}
    folder = write_native(tmp_path / "model", image_encoder=image)
    towers = CLIP(text, ImageConfig(**image)).eval()
    towers.text.load_state_dict(load_file(folder / "text_encoder.safetensors"))
    towers.image.load_state_dict(load_file(folder / "image_encoder.safetensors"))
    given, tokenizer = pictures([(image["image_size"], image["image_size"])] * 2), Tokenizer.clip(text.context_length)
    pixels = normalised(torch.from_numpy(np.stack([np.array(p) for p in given])).permute(0, 3, 1, 2) / 255)
    embedded, texts, _ = towers(pixels, tokenizer(PROMPTS).ids, tokenizer.end)
    instrument = features.clip(folder)
    assert error(F.normalize(instrument.pictures(given), dim=1), embedded) < 1e-6
    assert error(F.normalize(instrument.texts(PROMPTS), dim=1), texts) < 1e-6


def test_features_do_not_depend_on_what_is_looked_at_beside_them(monkeypatch, tmp_path):
    clip = features.clip("bundled", resize="bicubic")
    together = clip.pictures(pictures())
    monkeypatch.setattr(features, "AT_ONCE", 2)
    assert error(clip.pictures(pictures()), together) < 1e-6
    assert clip.pictures([]).shape == clip.texts([]).shape == (0, clip.width)


@pytest.mark.reference
def test_a_fingerprint_is_of_every_weight_and_of_the_resizing(folder, tmp_path):
    same = [features.clip(folder).fingerprint for _ in range(2)]
    assert same[0] == same[1] != features.clip(folder, resize="none").fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["visual_projection.weight"][3, 3] += 1e-6
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, copy / "model.safetensors")
    assert features.clip(copy).fingerprint != same[0]


def test_a_picture_of_another_size_is_refused_where_none_is_to_be_resized():
    with pytest.raises(ValueError, match="a picture is 50 x 33; CLIP of bundled takes 64 x 64; resize it, or bicubic"):
        features.clip("bundled").pictures(pictures())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "siglip"}, "model_type is 'siglip'; expected clip"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ({"text_config": 3}, "text_config is 3; expected a JSON object"),
        ({"projection_dim": 25}, "visual_projection.weight (expected [25, 32], found [24, 32])"),
        ({"less": "text_projection.weight"}, "text_projection.weight is missing; expected [24, 48]"),
        ({"less": "vision_model.post_layernorm.bias"}, "missing 1: vision_model.post_layernorm.bias"),
        ({"less": "text_model.final_layer_norm.bias"}, "missing 1: text_model.final_layer_norm.bias"),
        ({"more": "text_decoder.weight"}, "1 unexpected tensors (text_decoder.weight)"),
        ({"prepared": {"image_mean": [0.5, 0.5, 0.5]}}, "image_mean is [0.5, 0.5, 0.5]; expected"),
        ({"prepared": {"size": 30}}, "size is 30; expected {'shortest_edge': 28}"),
    ],
    ids=str,
)
@pytest.mark.reference
def test_a_folder_that_is_no_whole_clip_is_refused_in_one_line(folder, tmp_path, change, expected):
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if "less" in change:
        del tensors[change["less"]]
    if "more" in change:
        tensors[change["more"]] = torch.zeros(2)
    for name in change.keys() - {"less", "more", "prepared"}:
        config[name] = {**config[name], **change[name]} if isinstance(change[name], dict) else change[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change.get("prepared", {"size": 28, "resample": 3})))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        features.clip(tmp_path)
    assert expected in one_line(refusal.value)


def test_what_has_no_clip_is_refused(tiny_native, tmp_path):
    with pytest.raises(CheckpointError, match="has no image_encoder; a CLIP has both"):
        features.clip(tiny_native)
    with pytest.raises(CheckpointError, match="no CLIP here; expected bundled, or a folder with"):
        features.clip(tmp_path)
    with pytest.raises(ValueError, match="resize 'squash'; expected none or bicubic"):
        features.clip("bundled", resize="squash")
