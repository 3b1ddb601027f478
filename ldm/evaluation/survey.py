"""The bundled model, measured whole: what its pictures are like as guidance, steps and sampler are varied, one at a time.

    OUT/pndm-50-guidance-3/seen/00012-12.png    picture of prompt 12 of the split, from seed + 12, as at every other point
    OUT/survey.json                             the figures; `survey_plot.py` draws them

At each point, of the same prompts: composition accuracy on combinations that were trained on and on those that were held out,
by a judge (`composition.py`); the Frechet distance from renders of other scenes of both kinds, and the CLIP score, through the
model's own CLIP, since no other one knows these pictures. And of the autoencoder, which no UNet on it can pass: how well it
remakes renders.

Pictures are made by all processes and resumed where they were stopped, as in `pareto.py`.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm import images
from ldm.checkpoint import Components
from ldm.evaluation import composition, embeddings, frechet
from ldm.evaluation.clip_score import clip_score
from ldm.evaluation.composition import SPLITS, Score
from ldm.evaluation.embeddings import Tell
from ldm.evaluation.features import ClipInstrument
from ldm.evaluation.frechet import Statistics
from ldm.evaluation.reconstruction import Reconstruction, reconstruction
from ldm.evaluation.whole_file import write_whole
from ldm.pipelines import bulk
from ldm.pipelines.agreement import Agreement
from ldm.samplers import all_samplers
from ldm.scenes.judge import Judge, verdicts
from ldm.scenes.render import render
from ldm.scenes.world import draw

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # the model card's of Stable Diffusion, and none
STEPS = (2, 3, 5, 10, 25, 50)
FEW_STEPS = 10  # at which samplers differ
REFERENCE_FROM = 1 << 20  # numbers of the scenes that pictures are held against; prompts are of those from 0
RENDERS, REMADE = 2000, 500  # of them, half of either split; and how many of these the autoencoder remakes
PART = 50  # pictures that are looked at together


@dataclass(frozen=True, kw_only=True)
class Point:
    """How one set of pictures is made."""

    sampler: str = "pndm"
    steps: int = 50
    guidance_scale: float = 3.0

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps}-guidance-{self.guidance_scale:g}"


def axes(guidance_scale: float) -> dict[str, list[Point]]:
    """What is varied, and the points of each; guidance_scale: the model's own, where it is not what is varied."""
    own = {"guidance_scale": guidance_scale}
    return {
        "guidance": [Point(guidance_scale=scale) for scale in SCALES],
        "steps": [Point(steps=steps, **own) for steps in STEPS],
        "sampler": [Point(sampler=name, steps=FEW_STEPS, **own) for name in sorted(all_samplers())],
    }


def survey(
    components: Components,
    judge: Judge,
    clip: ClipInstrument,
    out: Path,
    agreement: Agreement,
    *,
    count: int = 200,
    seed: int = 0,
    tell: Tell = lambda stage, done, count: None,
) -> dict[str, Any]:
    """Measure every point of all axes on `count` prompts of each split, write OUT/survey.json and return the same.

    In processes but the first the figures are left out. Raises ValueError, one line, for what cannot be measured.
    """
    points = axes(components.guidance_scale)
    agreement.first(lambda: out.mkdir(parents=True, exist_ok=True))
    prompts = [case.prompt for split in SPLITS for case in composition.cases(split, count)]
    texts = embeddings.of_prompts(clip, prompts, out, agreement, tell)
    report: dict[str, Any] = {
        "model": components.name,
        "count": {"prompts of each split": count, "renders": RENDERS},
        "seed": seed,
        "clip": {"instrument": clip.name, "resize": clip.resize, "features": clip.width},
        "fid": "Frechet distance on the features of that CLIP; not comparable with the FID, which is of Inception's",
        "autoencoder": {},
        "ceiling": {},
        "points": [],
        "axes": {name: [point.name for point in row] for name, row in points.items()},
    }
    reference = agreement.first(lambda: _reference(components, clip, report, tell))
    agreement.first(lambda: _bounds(components, judge, clip, count, texts, reference, report))
    for point in dict.fromkeys(point for row in points.values() for point in row):
        paths, features = [], []
        for split in SPLITS:
            made = _pictures(components, point, split, count, seed, out, agreement, tell)
            folder = made[0].parent / "features"
            features.append(embeddings.of_pictures(clip, made, folder, agreement, tell, f"{point.name}, {split}"))
            paths.append(made)
        agreement.first(partial(_add, report, point, paths, judge, clip, features, texts, reference, out))
    return report


def _pictures(
    components: Components, point: Point, split: str, count: int, seed: int, out: Path, agreement: Agreement, tell: Tell
) -> list[Path]:
    """Of the split's prompts; where the sampler draws, from each image's own seed."""
    settings = {**dataclasses.asdict(point), "seed": seed, "batch_size": 25}
    order = bulk.Order(prompts=[case.prompt for case in composition.cases(split, count)], settings=settings)
    begun: list[int] = []

    def before(portion: bulk.Portion, portions: int) -> None:
        tell(f"{point.name}, {split}", len(begun), portions)
        begun.append(portion.start)

    return bulk.make(components, order, out / point.name / split, agreement, before=before)


def _reference(components: Components, clip: ClipInstrument, report: dict[str, Any], tell: Tell) -> Statistics:
    """The statistics of renders; beside them, in the report, what the autoencoder makes of renders."""
    features, remade = [], []
    for split in SPLITS:
        for number, scenes in enumerate(_scenes(split, RENDERS // len(SPLITS))):
            tell("renders to compare with", len(features), RENDERS // PART)
            pixels = render(scenes, _side(components))
            features.append(clip.pictures(images.to_images(pixels.float() / 127.5 - 1)))
            if number < REMADE // len(SPLITS) // PART:
                remade.append(reconstruction(components.autoencoder, pixels))
    report["autoencoder"] = dataclasses.asdict(Reconstruction.mean(remade))
    return frechet.statistics(torch.cat(features), clip)


def _bounds(
    components: Components,
    judge: Judge,
    clip: ClipInstrument,
    count: int,
    texts: torch.Tensor,
    reference: Statistics,
    report: dict[str, Any],
) -> None:
    """What perfect pictures would come to: the figures of renders of the prompts' own scenes, and the judge's of these renders
    encoded and decoded too."""
    cases = [case for split in SPLITS for case in composition.cases(split, count)]
    pixels = torch.cat([render([case.scene], _side(components)) for case in cases])
    seen = clip.pictures(images.to_images(pixels.float() / 127.5 - 1))
    for split in SPLITS:
        for name, score in composition.ceiling(components, judge, split, count).items():
            report["ceiling"].setdefault(name, {})[split] = _told(score)
    distance = frechet.distance(frechet.statistics(seen, clip), reference)
    report["ceiling"]["renders"] |= {"fid": distance.value, "clip_score": clip_score(seen, texts).mean}


def _scenes(split: str, count: int) -> Iterator[list[Any]]:
    numbers = range(REFERENCE_FROM, REFERENCE_FROM + count)
    for start in range(0, count, PART):
        part = numbers[start : start + PART]
        yield [draw(composition.SEED, i, split=SPLITS[split], layouts=composition.PAIRS) for i in part]


def _side(components: Components) -> int:
    return components.unet.config.sample_size * components.autoencoder.config.downsampling


def _add(
    report: dict[str, Any],
    point: Point,
    paths: list[list[Path]],
    judge: Judge,
    clip: ClipInstrument,
    features: list[torch.Tensor],
    texts: torch.Tensor,
    reference: Statistics,
    out: Path,
) -> None:
    """The figures of one point; the report so far is written."""
    seen = torch.cat(features)
    score, distance = clip_score(seen, texts), frechet.distance(frechet.statistics(seen, clip), reference)
    found: dict[str, Any] = {"name": point.name, **dataclasses.asdict(point)}
    for split, made in zip(SPLITS, paths, strict=True):
        said = []
        for start in range(0, len(made), PART):
            pictures = [images.read(path) for path in made[start : start + PART]]
            said += verdicts(judge, torch.cat([images.to_tensor(picture, picture.size) for picture in pictures]))
        statements = [case.statement for case in composition.cases(split, len(made))]
        found[split] = _told(composition.score(statements, said))
    found |= {"fid": distance.value, "clip_score": score.mean, "clip_score_error": score.error}
    report["points"].append(found)
    report["warnings"] = list(distance.warnings)
    write_whole(out / "survey.json", (json.dumps(report, indent=1) + "\n").encode())


def _told(score: Score) -> dict[str, Any]:
    return {part: score.accuracy(part) for part in score.right} | {"interval": score.interval()}
