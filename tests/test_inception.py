"""Inception v3 as torch-fidelity has it, on seeded weights: the published ones are not at hand here."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from ldm.evaluation import features, inception
from tests import seeded
from tests.instruments import HAS_TORCH_FIDELITY, error, pictures, torch_fidelity_module
from tests.refusal import one_line
from weights_convert import CheckpointError


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
@pytest.mark.skipif(not HAS_TORCH_FIDELITY, reason="needs torch-fidelity on the path, as in .ci/run")
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
