"""The instruments and the two distances: each against the implementation that its numbers are usually got from."""

import dataclasses
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.evaluation import features, frechet, inception
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
from tests.refusal import one_line
from weights_convert import CheckpointError

PROMPTS = ["a red cube", "", "An astronaut, riding a horse.", "café " * 90]
SIZES = [(64, 64), (50, 33), (33, 50), (28, 28), (61, 300)]


HAS_TORCH_FIDELITY = importlib.util.find_spec("torch_fidelity") is not None


def torch_fidelity_module():
    """torch-fidelity's Inception. The package imports torchvision for other things; where that is absent, a stand-in will do,
    and it does for torchmetrics, which imports torch-fidelity where it finds it."""
    names = ["torchvision", *(f"torchvision.{part}" for part in ("datasets", "transforms", "transforms.functional"))]
    absent = importlib.util.find_spec("torchvision") is None
    for name in names if absent else ():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(dict.fromkeys(("CIFAR10", "STL10", "CIFAR100"), object))
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    finally:
        for name in names if absent else ():
            del sys.modules[name]
    return feature_extractor_inceptionv3


def pictures(sizes=tuple(SIZES)):
    values = [seeded.values(f"picture {i}", (h, w, 3)).view(np.uint32) % 256 for i, (w, h) in enumerate(sizes)]
    return [Image.fromarray(x.astype(np.uint8)) for x in values]


def correlated(name, count, width, mean=0.0):
    """Features whose covariance is not diagonal, float32."""
    mixing = seeded.values("mixing", (width, width)) / width**0.5
    return torch.from_numpy(seeded.values(name, (count, width)) @ mixing + np.float32(mean))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """An instrument whose features are made up."""

    width: int
    name: str = "numbers"
    resize: str = "none"
    fingerprint: str = "numbers"


def distance(one, other):
    instrument = Numbers(one.shape[1])
    return frechet.distance(frechet.statistics(one, instrument), frechet.statistics(other, instrument))


# -- CLIP --------------------------------------------------------------------------------------------------------------


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


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


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


# -- Inception v3 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_weights():
    """Seeded weights, in the published naming, that keep the size of what passes through them."""
    with torch.device("meta"):
        names = inception.Inception().state_dict()
    found = {"fc.weight": seeded.weight("fc.weight", (1008, 2048)), "fc.bias": seeded.weight("fc.bias", (1008,))}
    for name, held in names.items():
        value = seeded.weight(name, tuple(held.shape)) if held.is_floating_point() else torch.tensor(0)
        if name.endswith("running_var"):
            value = value.abs() + 0.9
        found[name] = value * 2**0.5 if value.ndim == 4 else value  # ReLU lets half of it pass
    return found


@pytest.fixture(scope="module")
def inception_file(inception_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(inception_weights, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.reference
@pytest.mark.skipif(not HAS_TORCH_FIDELITY, reason="needs torch-fidelity: pip install --no-deps torch-fidelity")
def test_inception_is_that_of_torch_fidelity(inception_file):
    given = pictures([(64, 64), (50, 70), (310, 299)])
    torch_fidelity = torch_fidelity_module()
    theirs = torch_fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=inception_file)
    expected = torch.cat([theirs(torch.from_numpy(np.array(p)).permute(2, 0, 1)[None])[0] for p in given])
    found = features.inception(inception_file).pictures(given)
    assert found.shape == (3, 2048) and 0.1 < expected.mean() < 10 and expected.std(dim=0).mean() > 0.01
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize(("block", "pool"), [("Mixed_7c", "average"), ("Mixed_7b", "maximum"), (None, "counting")])
def test_each_of_the_graphs_quirks_shows_in_the_features(inception_file, monkeypatch, block, pool):
    """So that the comparison with torch-fidelity would notice one that is missing."""
    network = inception.load(inception_file)
    pixels = inception.legacy(pictures([(64, 64)]))
    expected = network(pixels)
    if block:
        getattr(network, block).pool = getattr(inception, pool)
    else:
        monkeypatch.setattr(inception, "average", lambda x: F.avg_pool2d(x, 3, stride=1, padding=1))
    assert error(network(pixels), expected) > 1e-3


@pytest.mark.parametrize("size", [(64, 40), (299, 299), (512, 333), (1, 1)])
def test_legacy_resizing_is_tensorflow_1s_bilinear(size):
    """Pixel i lies at i h / 299: no half pixel, no antialiasing; written out in numpy."""
    (picture,) = pictures([size])
    x = np.array(picture).astype(np.float64)
    for axis in (0, 1):
        place = np.arange(299, dtype=np.float32) * np.float32(x.shape[axis] / 299)  # in float32, as there
        low = np.minimum(np.floor(place).astype(int), x.shape[axis] - 1)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        share = np.expand_dims(place - low, [k for k in range(3) if k != axis])
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    found = inception.legacy([picture])[0].permute(1, 2, 0)
    assert found.shape == (299, 299, 3) and np.abs(found.numpy() - x).max() < 1e-4


def test_clean_resizing_keeps_fractions_antialiases_and_stays_within_0_and_255():
    (noise,) = pictures([(598, 598)])
    found = inception.clean([noise])[0]
    assert found.shape == (3, 299, 299) and (found % 1 != 0).float().mean() > 0.9
    assert found.std() < 0.7 * inception.legacy([noise])[0].std()
    edge = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8), 2, axis=0))
    sharp = inception.clean([edge])
    assert (sharp.min(), sharp.max()) == (0, 255)


def test_ways_of_resizing_have_names_and_fingerprints_of_their_own(inception_file):
    legacy, clean = (features.inception(inception_file, resize=name) for name in ("legacy", "clean"))
    assert (legacy.name, legacy.resize) == ("Inception v3 (pt_inception.pth)", "bilinear as TensorFlow 1 (legacy FID)")
    assert clean.resize == "bicubic antialiased (clean-fid)" and clean.fingerprint != legacy.fingerprint
    with pytest.raises(ValueError, match="resize 'lanczos'; expected legacy or clean"):
        features.inception(inception_file, resize="lanczos")


def test_inception_reads_safetensors_and_files_without_counters_or_classifier(inception_weights, inception_file, tmp_path):
    left = {n: t for n, t in inception_weights.items() if not n.startswith("fc.") and not n.endswith("tracked")}
    save_file(left, tmp_path / "inception.safetensors")
    same = features.inception(tmp_path / "inception.safetensors")
    assert same.fingerprint == features.inception(inception_file).fingerprint


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"Mixed_6b.branch1x1.bn.running_mean": None}, "missing 1: Mixed_6b.branch1x1.bn.running_mean"),
        ({"AuxLogits.fc.weight": torch.zeros(3)}, "unexpected 1: AuxLogits.fc.weight"),
        ({"Mixed_7c.branch_pool.conv.weight": torch.zeros(3)}, "misshapen 1: Mixed_7c.branch_pool.conv.weight"),
        ({"Mixed_7c.branch_pool.bn.bias": torch.full((192,), torch.nan)}, "holds numbers that are NaN or infinite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_file_that_is_not_that_inception_is_refused_in_one_line(inception_weights, tmp_path, change, expected):
    tensors = {name: tensor for name, tensor in (inception_weights | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        features.inception(tmp_path / "x.safetensors")
    assert expected in one_line(refusal.value)


# -- Frechet distance --------------------------------------------------------------------------------------------------


class Through(nn.Module):
    """What torchmetrics takes for a network: features pass through."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, x):
        return x


def torchmetrics_distance(one, other):
    if HAS_TORCH_FIDELITY:
        torch_fidelity_module()
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Through(one.shape[1])).set_dtype(torch.float64)
    metric.update(one.double(), real=True)  # the result has the features' type, and is computed in float64 in any case
    metric.update(other.double(), real=False)
    return metric.compute().item()


def scipy_distance(one, other):
    one, other = one.double().numpy(), other.double().numpy()
    root = scipy.linalg.sqrtm(np.cov(one.T) @ np.cov(other.T))
    means = ((one.mean(0) - other.mean(0)) ** 2).sum()
    return means + np.trace(np.cov(one.T) + np.cov(other.T) - 2 * root.real)


@pytest.mark.parametrize("reference", [torchmetrics_distance, scipy_distance])
@pytest.mark.parametrize(
    ("counts", "mean", "tolerance"),
    [((500, 300), 0.1, 1e-10), ((500, 300), 30.0, 1e-8), ((20, 300), 0.1, 1e-6), ((20, 12), 0.1, 1e-6)],
)
def test_the_distance_is_that_of_torchmetrics_and_of_scipy(reference, counts, mean, tolerance):
    """Where a covariance has not full rank, or the mean is large, theirs are the less exact; see the next test."""
    one, other = correlated("one", counts[0], 48), 1.1 * correlated("other", counts[1], 48, mean)
    assert distance(one, other).value == pytest.approx(reference(one, other), rel=tolerance)


def test_from_fewer_pictures_than_features_the_distance_is_exact_where_the_others_are_not():
    """Against the sum of singular values of the centred features themselves, which no small eigenvalue disturbs."""
    one, other = correlated("one", 100, 160), 1.1 * correlated("other", 90, 160, 0.1)
    centred = [(x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (one, other)]
    together = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    means = (one.double().mean(0) - other.double().mean(0)).square().sum()
    exact = (means + sum(x.square().sum() for x in centred) - 2 * together).item()
    found = distance(one, other)
    assert found.value == pytest.approx(exact, rel=1e-12)
    assert abs(torchmetrics_distance(one, other) - exact) > 1e3 * abs(found.value - exact)
    assert found.warnings and "90 pictures for 160 features: the covariance has not full rank" in found.warnings[0]


def test_a_known_distance():
    """Of normal distributions with diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * (3 / 4) ** 0.5  # variance 1 each
    found = distance(corners * torch.tensor([2.0, 5]), corners * torch.tensor([3.0, 1]) + torch.tensor([10.0, 0]))
    assert found.of_means == pytest.approx(100) and found.of_covariances == pytest.approx(1 + 16)
    assert found.value == pytest.approx(117) and found.counts == (4, 4) and found.warnings == ()
    assert distance(corners, corners).value == pytest.approx(0, abs=1e-12)


def test_the_mean_and_covariance_are_those_of_numpy_in_float64():
    x = correlated("x", 70, 9, 1000.0)
    found = frechet.statistics(x, Numbers(9))
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert np.allclose(found.covariance, np.cov(x.double().numpy().T), rtol=1e-12, atol=1e-12)
    assert np.allclose(found.mean, x.double().numpy().mean(0), rtol=1e-15)


def test_statistics_are_kept_whole_and_read_back_to_the_last_bit(tmp_path):
    one, other = (frechet.statistics(correlated(name, 40, 6), Numbers(6)) for name in ("one", "other"))
    frechet.write(one, tmp_path / "reference.safetensors")
    frechet.write(one, tmp_path / "reference.safetensors")
    again = frechet.read(tmp_path / "reference.safetensors")
    assert torch.equal(again.mean, one.mean) and torch.equal(again.covariance, one.covariance)
    assert frechet.distance(again, other) == frechet.distance(one, other)
    assert dataclasses.replace(again, mean=one.mean, covariance=one.covariance) == one
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]


def test_a_file_that_holds_no_statistics_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for content in (b"", b"not tensors"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="holds no statistics of features that can be read"):
            frechet.read(file)
    save_file({"mean": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="some other file of tensors"):
        frechet.read(file)
    found = frechet.statistics(correlated("one", 4, 3), Numbers(3))
    frechet.write(dataclasses.replace(found, mean=found.mean * torch.nan), file)
    with pytest.raises(ValueError, match="its statistics are damaged"):
        frechet.read(file)


def test_what_no_distance_can_be_told_of_is_refused():
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"{count} pictures; a distance needs 2 at least"):
            frechet.statistics(torch.ones(count, 3), Numbers(3))
    broken = torch.ones(4, 3)
    broken[2, 1] = torch.inf
    with pytest.raises(ValueError, match="the features of picture 2 are NaN or infinite"):
        frechet.statistics(broken, Numbers(3))
    with pytest.raises(ValueError, match=r"features have shape \[4, 3\]; expected \(n, 5\)"):
        frechet.statistics(torch.ones(4, 3), Numbers(5))
    one = frechet.statistics(torch.ones(4, 3), Numbers(3))
    other = frechet.statistics(torch.ones(4, 3), Numbers(3, resize="bicubic", fingerprint="another"))
    with pytest.raises(ValueError, match=r"one set was seen through numbers, resized none .* see both through one instrument"):
        frechet.distance(one, other)
