"""Memorisation: has a model put pictures of its training set into what it makes? For every picture, the nearest of a folder.

Carlini et al. 2023, "Extracting Training Data from Diffusion Models", arXiv:2301.13188, and Somepalli et al. 2023, "Diffusion
Art or Digital Forgery?", arXiv:2212.03860. Similarity is the cosine of CLIP embeddings: (n, d), (m, d) -> the k nearest (n, k).

CLIP says that two pictures show the same, which is less than that one is a copy of the other. What similarity is high therefore
depends on the data, and the report has the baseline: how near pictures of the training set are to one another. Beside each pair
stands how far its pixels are apart. What is found is to be looked at; the sheet of pairs is for that.

The search is exact, and the same whatever the blocks: unit vectors are rounded to multiples of 2^-26, so that a product of two
is a multiple of 2^-52 and, no partial sum being larger than 1, every sum of them is exact in float64, in any order (the cosine
is off by less than 1e-7). Of equal similarities, the picture that comes first counts as nearer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm import images
from ldm.evaluation.folder_features import FolderFeatures

GRID = 2.0**26
ROWS, COLUMNS = 256, 4096  # of a block of similarities: 8 MB
PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
BASELINE = 1000  # pictures of the training set that are held against all others of it
THUMBNAIL = 64  # pixels of a side at which two pictures are compared value by value


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture, a picture of the training set, the cosine of their embeddings, and how far their pixels are apart: the root
    mean square difference, 0 to 1, both made THUMBNAIL pixels square; None where nobody looked."""

    image: Path
    training: Path
    similarity: float
    pixels: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """pairs: for every picture its nearest, `top` each, the most similar picture first. found: how many pictures have one at
    the threshold or above; baseline_found: the share of training pictures that have.

    percentiles, baseline: of the similarity to the nearest, by PERCENTILES; the baseline is of `baseline_count` pictures of the
    training set to all others of it, None where there are no others.
    """

    pairs: tuple[tuple[Pair, ...], ...]
    threshold: float
    found: int
    percentiles: dict[int, float]
    baseline: dict[int, float] | None
    baseline_count: int
    baseline_found: float | None
    training_count: int


def nearest(
    queries: FolderFeatures,
    training: FolderFeatures,
    top: int = 1,
    *,
    among: np.ndarray | None = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` nearest of `training` for each of `queries`: cosines, float64, and indices, both (n, top), nearest first.

    among: which of `queries`; all where left out. A file that is in both sets is not held against itself. Where fewer than
    `top` are left, cosines are -inf and indices -1. rows, columns: of a block; the result is the same for any.
    """
    among = np.arange(len(queries)) if among is None else among
    own = _own(queries, training)[among]
    cosines, indices = np.full((len(among), top), -np.inf), np.full((len(among), top), -1)
    for start in range(0, len(among), rows):
        here = slice(start, start + rows)
        units = _units(queries.at(among[here]))
        for first in range(0, len(training), columns):
            found = units @ _units(training.rows(first, first + columns)).T
            there = own[here] - first
            selves = np.flatnonzero((there >= 0) & (there < found.shape[1]))
            found[selves, there[selves]] = -np.inf
            _merge(cosines[here], indices[here], found, first)
        progress(min(start + rows, len(among)))
    return np.minimum(cosines, 1.0), indices


def _units(features: np.ndarray) -> np.ndarray:
    """Features (n, d) as directions, float64, rounded to multiples of 2^-26; see above."""
    features = features.astype(np.float64)
    return np.round(features / np.sqrt((features**2).sum(axis=1, keepdims=True)) * GRID) / GRID


def _own(queries: FolderFeatures, training: FolderFeatures) -> np.ndarray:
    """For each of `queries` where the same file is in `training`, or -1."""
    if queries.folder.resolve() == training.folder.resolve():
        return np.arange(len(queries))
    places = {training.path(i).resolve(): i for i in range(len(training))} if _nested(queries, training) else {}
    return np.array([places.get(queries.path(i).resolve(), -1) if places else -1 for i in range(len(queries))])


def _nested(queries: FolderFeatures, training: FolderFeatures) -> bool:
    one, other = queries.folder.resolve(), training.folder.resolve()
    return one in other.parents or other in one.parents


def _merge(cosines: np.ndarray, indices: np.ndarray, found: np.ndarray, first: int) -> None:
    """Put what a block has found, (r, c), into the best so far, (r, top), in place. Blocks come in order, and argmax says the
    first of several largest, so that of equal ones the first stays."""
    every = np.arange(len(found))
    for _ in range(cosines.shape[1]):
        best = found.argmax(axis=1)
        value = found[every, best]
        better = value > cosines[:, -1]
        if not better.any():
            return
        found[every, best] = -np.inf
        _insert(cosines, indices, np.flatnonzero(better), value, best + first)


def _insert(cosines: np.ndarray, indices: np.ndarray, which: np.ndarray, values: np.ndarray, places: np.ndarray) -> None:
    """Put one more candidate into the rows `which`, behind those that are as near, and let the last go."""
    held = np.concatenate([cosines[which], values[which, None]], axis=1)
    order = np.argsort(-held, axis=1, kind="stable")[:, :-1]
    cosines[which] = np.take_along_axis(held, order, axis=1)
    named = np.concatenate([indices[which], places[which, None]], axis=1)
    indices[which] = np.take_along_axis(named, order, axis=1)


def report(
    pictures: FolderFeatures,
    training: FolderFeatures,
    *,
    threshold: float = 0.95,
    top: int = 1,
    baseline: int = BASELINE,
    looked_at: int = 100,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Hold every picture against the training set, and `baseline` pictures of that, evenly spread, against all others of it.

    looked_at: of how many pictures, the most similar ones, the pixels are compared too. progress: told how many of
    `len(pictures) + min(baseline, len(training))` are done. Raises ValueError for a threshold that is no cosine.
    """
    check(threshold, top, baseline)
    cosines, indices = nearest(pictures, training, top, progress=progress)
    spread = np.unique(np.linspace(0, len(training) - 1, min(baseline, len(training))).round().astype(np.int64))
    usual = np.empty(0)
    if len(training) > 1 and len(spread):
        done = len(pictures)
        usual = nearest(training, training, among=spread, progress=lambda k: progress(done + k))[0][:, 0]
    best = cosines[:, 0][np.isfinite(cosines[:, 0])]
    return Report(
        pairs=tuple(_pairs(pictures, training, cosines, indices, looked_at)),
        threshold=threshold,
        found=int((best >= threshold).sum()),
        percentiles=_percentiles(best),
        baseline=_percentiles(usual) if len(usual) else None,
        baseline_count=len(usual),
        baseline_found=float((usual >= threshold).mean()) if len(usual) else None,
        training_count=len(training),
    )


def check(threshold: float, top: int, baseline: int) -> None:
    """Raises ValueError for what `report` does not take."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold {threshold:g}; expected a cosine, -1 to 1, as 0.95")
    if top < 1 or baseline < 0:
        raise ValueError(f"top {top}, baseline {baseline}; expected 1 or more, and 0 or more")


def _percentiles(values: np.ndarray) -> dict[int, float]:
    return {p: float(np.percentile(values, p)) for p in PERCENTILES} if len(values) else {}


def _pairs(
    pictures: FolderFeatures, training: FolderFeatures, cosines: np.ndarray, indices: np.ndarray, looked_at: int
) -> Iterator[tuple[Pair, ...]]:
    """Each picture's pairs, the most similar picture first."""
    for rank, i in enumerate(np.argsort(-cosines[:, 0], kind="stable")):
        image, found = pictures.path(i), []
        for j, cosine in zip(indices[i], cosines[i], strict=True):
            if j >= 0:
                near = training.path(j)
                pixels = pixel_distance(images.read(image), images.read(near)) if rank < looked_at else None
                found.append(Pair(image=image, training=near, similarity=float(cosine), pixels=pixels))
        yield tuple(found)


def pixel_distance(one: Image.Image, other: Image.Image) -> float:
    """Root mean square difference, 0 to 1, of two pictures made THUMBNAIL pixels square."""
    small = [images.to_tensor(picture, (THUMBNAIL, THUMBNAIL)).double() / 2 for picture in (one, other)]
    return float((small[0] - small[1]).square().mean().sqrt())
