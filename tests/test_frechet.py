"""The Frechet distance: what torchmetrics and scipy give, exact where they are not, from statistics that are kept."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.evaluation import frechet
from tests import seeded
from tests.instruments import HAS_TORCH_FIDELITY, torch_fidelity_module


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
