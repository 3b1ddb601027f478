"""The Frechet distance of two sets of pictures, seen through an instrument: features (n, d) -> one number.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", arXiv:1706.08500, eq. 6: each set is taken for a normal
distribution N(m, C) of features, and |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) is the squared distance of the two (Dowson and
Landau 1982). Through Inception v3 it is the FID; through another instrument it is another number, never to be compared.

The number is biased upwards, more so the fewer pictures there are (Chong and Forsyth 2020, arXiv:1911.07023): distances compare
only at the same count, and from fewer pictures than features the covariance does not even have full rank. `Distance.warnings`
says so.

The formula is computed here, and held against torchmetrics and scipy in the tests. Both take the eigenvalues or the root of the
product C1 C2, which is not symmetric; where a covariance has not full rank, rounding makes small eigenvalues of its zeros, and
their roots add up: of 100 pictures and 256 features both are wrong in the fifth decimal. Here each covariance has its own root,
of no more eigenvalues than its count allows, and the trace is the sum of the singular values of the two roots' product: the
same number, right to the last decimals, and quicker. And torchmetrics rounds the result to the features' float32.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.evaluation.features import Instrument
from ldm.evaluation.whole_file import write_whole

FEWEST = 2  # a covariance needs as many
KIND = "ldm statistics of features, 1"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean (d,) and covariance (d, d) of a set's features, float64; of how many pictures; and what they were seen through."""

    mean: Tensor
    covariance: Tensor
    count: int
    instrument: str
    resize: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The squared Frechet distance, in the features' unit squared, and its two parts: of the means and of the covariances.

    counts: pictures of either set. warnings: in words, what keeps the number from being compared with others.
    """

    value: float
    of_means: float
    of_covariances: float
    counts: tuple[int, int]
    warnings: tuple[str, ...]


def statistics(features: Tensor, instrument: Instrument) -> Statistics:
    """Mean and covariance (divided by n - 1) of features (n, d), in float64, over all rows at once and in their order, so that
    nothing depends on how pictures were batched. Raises ValueError for fewer than 2 pictures and for features that are NaN."""
    if features.ndim != 2 or features.shape[1] != instrument.width:
        raise ValueError(f"features have shape {list(features.shape)}; expected (n, {instrument.width}) of {instrument.name}")
    count = len(features)
    if count < FEWEST:
        raise ValueError(f"{count} pictures; a distance needs {FEWEST} at least, and means something from thousands on")
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"the features of picture {broken[0]} are NaN or infinite, as are those of {len(broken)} in all")
    centred = features.to(torch.float64, copy=True)
    mean = centred.mean(dim=0)
    centred -= mean  # first, since sums of squares would cancel where the mean is large
    return Statistics(
        mean=mean,
        covariance=centred.T @ centred / (count - 1),
        count=count,
        instrument=instrument.name,
        resize=instrument.resize,
        fingerprint=instrument.fingerprint,
    )


def distance(one: Statistics, other: Statistics) -> Distance:
    """Raises ValueError where the two were not seen through the same instrument."""
    if one.fingerprint != other.fingerprint:
        seen = [f"{side.instrument}, resized {side.resize} ({side.fingerprint})" for side in (one, other)]
        raise ValueError(f"one set was seen through {seen[0]}, the other through {seen[1]}; see both through one instrument")
    of_means = (one.mean - other.mean).square().sum()
    roots = _root(one).T @ _root(other)
    together = torch.linalg.svdvals(roots).sum()  # Tr (C1 C2)^(1/2)
    of_covariances = (one.covariance.trace() + other.covariance.trace() - 2 * together).clamp(min=0)  # but for rounding
    value = float(of_means + of_covariances)
    if not torch.isfinite(torch.tensor(value)):
        raise ValueError(f"the distance of these statistics is {value}; expected a finite number; are the features sound?")
    return Distance(
        value=value,
        of_means=float(of_means),
        of_covariances=float(of_covariances),
        counts=(one.count, other.count),
        warnings=tuple(_warnings(one, other)),
    )


def _root(side: Statistics) -> Tensor:
    """R (d, r) with R R^T = C. Of n pictures, at most n - 1 eigenvalues are not zero; what rounding makes of the others, of
    whose roots there may be thousands, is left out."""
    values, vectors = torch.linalg.eigh(side.covariance)  # in ascending order
    rank = min(side.count - 1, len(values))
    return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()


def _warnings(one: Statistics, other: Statistics) -> list[str]:
    width, least = len(one.mean), min(one.count, other.count)
    if least > width:
        return []
    return [
        f"{least:,} pictures for {width:,} features: the covariance has not full rank, and the distance is too large; "
        f"from {width + 1:,} on it has, and distances at the same count compare"
    ]


def write(found: Statistics, path: str | Path) -> None:
    """Keep statistics in a .safetensors file, to be read by `read` instead of looking at the pictures again."""
    words = {name: str(value) for name, value in dataclasses.asdict(found).items() if not isinstance(value, Tensor)}
    tensors = {"mean": found.mean.contiguous(), "covariance": found.covariance.contiguous()}
    write_whole(path, save(tensors, {"kind": KIND, **words}))


def read(path: str | Path) -> Statistics:
    """What `write` kept. Raises ValueError, one line, where the file is something else."""
    try:
        with safe_open(path, "pt") as file:
            words = dict(file.metadata() or {})
            if words.pop("kind", None) != KIND:
                raise ValueError("it is some other file of tensors")
            count = int(words.pop("count"))
            found = Statistics(mean=file.get_tensor("mean"), covariance=file.get_tensor("covariance"), count=count, **words)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: holds no statistics of features that can be read ({reason})") from None
    width = found.mean.numel()
    sound = found.covariance.shape == (width, width) and count >= FEWEST
    if not sound or not all(t.dtype == torch.float64 and t.isfinite().all() for t in (found.mean, found.covariance)):
        raise ValueError(f"{path}: its statistics are damaged; remove the file, and have it made again")
    return found
