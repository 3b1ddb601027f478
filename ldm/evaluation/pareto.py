"""The guidance Pareto: at which guidance scale pictures are most like real ones, and at which most like their prompts.

The model card of Stable Diffusion v1-4 draws it from 10,000 random captions of COCO2017's validation set, 50 PLMS steps and
scales 1.5 to 8: FID against CLIP score. Ho and Salimans 2022, arXiv:2207.12598, on why the one is traded for the other.

    OUT/guidance-3/00012-12.png        picture of caption 12, from seed + 12, the same seeds at each scale
    OUT/guidance-3/features/           of these pictures, by the instruments' fingerprints
    OUT/guidance-3/seconds.json        time spent on it, by all runs that worked on it
    OUT/reference-....safetensors      statistics of the pictures to compare with
    OUT/pareto.json, pareto.png        the figures

Every stage is shared by all processes and resumed where it was stopped; figures do not depend on either.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.checkpoint import REQUIRED, Components
from ldm.evaluation import embeddings, frechet
from ldm.evaluation.caption_file import Captions
from ldm.evaluation.clip_score import clip_score
from ldm.evaluation.embeddings import Tell
from ldm.evaluation.features import ClipInstrument, Instrument
from ldm.evaluation.frechet import Distance, Statistics
from ldm.evaluation.whole_file import write_whole
from ldm.output import receipt
from ldm.output.run_folder import RECORD
from ldm.pipelines import bulk
from ldm.pipelines.agreement import Agreement
from ldm.pipelines.settings import checked

SCALES = (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # of the model card
STEPS = 50
APART = 2  # counts that differ by more than this factor are warned of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. settings: of pictures (`ldm.Settings`), a seed among them, but for the guidance scale. cache: where the
    reference's statistics are kept; `out` where left out."""

    captions: Captions
    reference: Path
    out: Path
    scales: tuple[float, ...] = SCALES
    settings: Mapping[str, Any] = field(default_factory=lambda: {"steps": STEPS, "seed": 0})
    cache: Path | None = None


def measure(
    components: Components,
    plan: Plan,
    agreement: Agreement,
    *,
    clip: ClipInstrument,
    instrument: Instrument,
    tell: Tell = lambda stage, done, count: None,
) -> dict[str, Any]:
    """Make the pictures, look at them, and write OUT/pareto.json; the same as a dict, in the first process (in others without
    figures). instrument: what the FID is seen through. tell: hears of each portion that this process is about to begin.

    Raises ValueError, one line, for fewer than 2 captions or pictures, and for what `bulk.make` refuses.
    """
    report = agreement.each(lambda: _begun(components, plan, clip, instrument))
    references = agreement.each(lambda: embeddings.pictures_below(plan.reference))
    report["reference"] = {"folder": plan.reference.name, "count": len(references)}
    agreement.first(lambda: plan.out.mkdir(parents=True, exist_ok=True))
    prompts = embeddings.of_prompts(clip, plan.captions.texts, plan.out, agreement, tell)
    cache = plan.cache or plan.out
    reference = embeddings.of_reference(instrument, plan.reference, references, cache, agreement, tell)
    measures = _Measures(clip=clip, instrument=instrument, prompts=prompts, reference=reference)
    for scale in plan.scales:
        folder = plan.out / f"guidance-{scale:g}"
        with _timed(folder, "pictures", agreement):
            paths = _pictures(components, plan, scale, folder, agreement, tell)
        with _timed(folder, "features", agreement):
            seen = _features((clip, instrument), paths, folder, agreement, tell)
        agreement.first(partial(_add_point, report, measures, scale, seen, folder))
    return report


def _begun(components: Components, plan: Plan, clip: ClipInstrument, instrument: Instrument) -> dict[str, Any]:
    """The report without its points. What cannot be measured is refused before it is made."""
    if len(plan.captions.texts) < frechet.FEWEST:
        raise ValueError(f"{len(plan.captions.texts)} caption; a distance needs {frechet.FEWEST} pictures at least")
    if len({f"{scale:g}" for scale in plan.scales}) < len(plan.scales):
        raise ValueError(f"guidance scales {', '.join(f'{scale:g}' for scale in plan.scales)}; expected each of them once")
    side = components.unet.config.sample_size * components.autoencoder.config.downsampling
    for each in (clip, instrument):
        each.pictures([Image.new("RGB", (side, side))])
    settings = dataclasses.asdict(checked(dict(plan.settings)))
    del settings["guidance_scale"], settings["decode"], settings["num_images"]
    of_clip = isinstance(instrument, ClipInstrument)
    modules = {kind: getattr(components, kind) for kind in REQUIRED}
    return {
        "model": {"name": components.name, "fingerprint": components.fingerprint or receipt.fingerprint(modules)},
        "captions": {"file": plan.captions.name, "sha256": plan.captions.sha256},
        "count": len(plan.captions.texts),
        "seed": settings.pop("seed"),
        "settings": settings,
        "fid": {
            "label": "FID on CLIP features" if of_clip else "FID",
            "note": "not comparable with the FID, which is of Inception's features" if of_clip else None,
            **_about(instrument),
        },
        "clip_score": {"label": "mean cosine", **_about(clip)},
        "warnings": [],
        "points": [],
    }


def _about(instrument: Instrument) -> dict[str, Any]:
    return {
        "instrument": instrument.name,
        "resize": instrument.resize,
        "features": instrument.width,
        "fingerprint": instrument.fingerprint,
    }


def _pictures(components: Components, plan: Plan, scale: float, folder: Path, agreement: Agreement, tell: Tell) -> list[Path]:
    order = bulk.Order(prompts=plan.captions.texts, settings={**plan.settings, "guidance_scale": scale, "num_images": 1})
    begun: list[int] = []

    def before(portion: bulk.Portion, count: int) -> None:
        tell(f"guidance {scale:g}, pictures", len(begun), count)
        begun.append(portion.start)

    return bulk.make(components, order, folder, agreement, before=before)


def _features(
    instruments: Sequence[Instrument], paths: list[Path], folder: Path, agreement: Agreement, tell: Tell
) -> dict[str, Tensor]:
    """Of the pictures of one scale, by the instrument's fingerprint; two names of one instrument look once."""
    mark = agreement.first(lambda: sha256((folder / RECORD).read_bytes()).hexdigest()[:16])  # of the run that made them
    stage = f"{folder.name.replace('-', ' ')}, features"
    return {
        fingerprint: embeddings.of_pictures(instrument, paths, folder / "features" / mark, agreement, tell, stage)
        for fingerprint, instrument in {each.fingerprint: each for each in instruments}.items()
    }


@dataclass(frozen=True, kw_only=True)
class _Measures:
    """What every scale's pictures are held against. prompts: (n, width), by `clip`. reference: through `instrument`."""

    clip: ClipInstrument
    instrument: Instrument
    prompts: Tensor
    reference: Statistics | None  # in the first process


def _add_point(report: dict[str, Any], measures: _Measures, scale: float, seen: dict[str, Tensor], folder: Path) -> None:
    """The figures of one scale, and the seconds that its pictures and features took; the report so far is written."""
    made = frechet.statistics(seen[measures.instrument.fingerprint], measures.instrument)
    distance = frechet.distance(made, measures.reference)
    score = clip_score(seen[measures.clip.fingerprint], measures.prompts)
    figures = {"fid": distance.value, "clip_score": score.mean, "clip_score_error": score.error, "count": score.count}
    report["points"].append({"guidance_scale": scale, **figures, "seconds": _seconds(folder)})
    report["warnings"] = _warnings(distance)
    write_whole(folder.parent / "pareto.json", (json.dumps(report, indent=1) + "\n").encode())


def _warnings(distance: Distance) -> list[str]:
    """What keeps the distances from being compared with others."""
    made, reference = distance.counts
    said = list(distance.warnings)
    if max(distance.counts) > APART * min(distance.counts):
        said.append(
            f"{made:,} pictures against {reference:,} of the reference: a distance depends on both counts, and compares only "
            "with those of the same"
        )
    return said


@contextmanager
def _timed(folder: Path, stage: str, agreement: Agreement) -> Iterator[None]:
    """Add the seconds that a stage takes, also where it is stopped, to those of earlier runs."""
    begun, refused = time.monotonic(), False
    try:
        yield
    except ValueError:
        refused = True
        raise
    finally:
        if agreement.processes.leads and folder.is_dir() and not refused:
            spent = _seconds(folder)
            spent[stage] = round(spent.get(stage, 0.0) + time.monotonic() - begun, 1)
            write_whole(folder / "seconds.json", json.dumps(spent).encode())


def _seconds(folder: Path) -> dict[str, float]:
    try:
        return dict(json.loads((folder / "seconds.json").read_text()))
    except (OSError, ValueError):
        return {}
