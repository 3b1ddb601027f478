"""Many pictures, by one process or by many: a run cut into portions, each made by whoever's turn it is.

The cut depends on the prompts and `batch_size` alone. Image i of the run has seed + i, a name of its own, and its place in its
portion, so its pixels, its receipt and its file are the same, byte for byte, however many processes share the run and however
often it is stopped, as long as the arithmetic is the same: device, number of threads, versions (receipts tell). A portion
of which some pictures are there and some are not is computed whole, since rounding depends on what is computed together;
what is there is left alone.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

from ldm.checkpoint import REQUIRED, Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.output import files, receipt
from ldm.output.run_folder import RunFolder
from ldm.pipelines.agreement import Agreement
from ldm.pipelines.conditioning import read
from ldm.pipelines.habits import HABITS
from ldm.pipelines.replay import TASKS
from ldm.pipelines.settings import SEEDS_BELOW, Settings, checked
from ldm.pipelines.sources import source_hash

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be made. settings: of `Settings`, as given; where no seed is among them, one is drawn. fields: what the task
    takes beside prompts and settings: width, height, image, mask, strength ..."""

    task: str = "txt2img"
    prompts: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Portion:
    """Pictures that are made in one call: of each prompt `num_images`, the first of them picture `start` of the run."""

    start: int
    prompts: list[str]
    num_images: int
    seed: int
    one_generator: bool  # that draws for all of them, from the portion's seed

    @property
    def indices(self) -> range:
        return range(self.start, self.start + len(self.prompts) * self.num_images)

    @property
    def names(self) -> list[str]:
        """Of the files, a picture each."""
        return [f"{i:05}-{self.seed + (0 if self.one_generator else i - self.start)}.png" for i in self.indices]


def portions(prompts: Sequence[str], settings: Settings) -> list[Portion]:
    """The whole run in order: `batch_size` images each, or fewer where the next prompt names other LoRAs; all of a prompt's
    where the convention has one generator for them. Raises ValueError where there are not so many seeds."""
    count, total = settings.num_images, len(prompts) * settings.num_images
    if settings.seed + total > SEEDS_BELOW:
        raise ValueError(f"seed {settings.seed} for {total} images; expected at most {SEEDS_BELOW - total}")
    if HABITS[settings.convention].one_generator:
        return [
            Portion(start=i * count, prompts=[text], num_images=count, seed=settings.seed + i * count, one_generator=True)
            for i, text in enumerate(prompts)
        ]
    cut, start = [], 0
    while start < total:
        alike = lora_names(prompts[start // count])
        texts = (prompts[i // count] for i in range(start, min(start + settings.batch_size, total)))
        texts = list(itertools.takewhile(lambda text, alike=alike: lora_names(text) == alike, texts))
        cut.append(Portion(start=start, prompts=texts, num_images=1, seed=settings.seed + start, one_generator=False))
        start += len(texts)
    return cut


def lora_names(prompt: str) -> list[str]:
    """What a prompt says of LoRAs, in whatever syntax: prompts that say another thing are made in another call."""
    return re.findall(r"<lora:[^<>]*>|(?:use|with)Lora\([^()]*\)", prompt, re.IGNORECASE)


def make(
    components: Components,
    order: Order,
    folder: str | Path,
    agreement: Agreement,
    *,
    before: Callable[[Portion, int], None] = lambda portion, count: None,
    after_step: AfterStep = keep,
) -> list[Path]:
    """Make what is not there yet of the order's pictures; the paths of all, in order, when all are there.

    Every process calls this with the same order and the same folder, which they share. before: told of each portion that this
    process makes, and how many they are. What it or `after_step` raises ends the run; the same call goes on with it later.
    Raises ValueError, one line, where the folder is of another run, where another run is at work in it, or where pictures are
    missing at the end.
    """
    settings, now = agreement.each(lambda: _recorded(components, order))
    with RunFolder(folder) as there:
        begun = agreement.first(lambda: there.begin(now, seed_given=order.settings.get("seed") is not None))
        agreement.each(lambda: _check_same(begun, now))
        settings = dataclasses.replace(settings, seed=begun["seed"])
        cut = agreement.each(lambda: portions(order.prompts, settings))
        names = [name for portion in cut for name in portion.names]
        missing = set(agreement.first(lambda: there.missing(names, listed=True)))
        mine = agreement.share([portion for portion in cut if not missing.isdisjoint(portion.indices)])
        for portion in mine:
            before(portion, len(mine))
            own = {**order.settings, "num_images": portion.num_images, "seed": portion.seed}
            result = TASKS[order.task](components, portion.prompts, **order.fields, **own, after_step=after_step)
            for i, name, picture, told in zip(portion.indices, portion.names, result.images, result.receipts, strict=True):
                if i in missing:
                    files.save_as(picture, told, there.path / name)
        agreement.first(lambda: _check_whole(there, names))
    return [there.path / name for name in names]


def _recorded(components: Components, order: Order) -> tuple[Settings, dict[str, Any]]:
    """The settings spelled out, and all that the pictures depend on, as it stands in the folder."""
    settings = checked({"guidance_scale": components.guidance_scale, **order.settings})
    said = dataclasses.asdict(settings)
    del said["decode"]
    for name, value in order.fields.items():
        is_value = isinstance(value, str | int | float | None)
        said |= {name: value} if is_value else {f"{name}_sha256": source_hash(value)}
    modules = {kind: getattr(components, kind) for kind in REQUIRED}
    return settings, {
        "format": FORMAT,
        "task": order.task,
        "total": len(order.prompts) * settings.num_images,
        "prompts_sha256": sha256(dumps(list(order.prompts)).encode()).hexdigest(),
        "fingerprint": components.fingerprint or receipt.fingerprint(modules),
        "tokenizer": components.tokenizer.style,
        "dtype": str(components.unet.conv_in.weight.dtype).removeprefix("torch."),
        "acceleration": components.acceleration and dict(components.acceleration),
        "safety_checker": components.safety is not None,
        "adapters": _adapters(components, order.prompts, settings),
        **said,
    }


def _adapters(components: Components, prompts: Sequence[str], settings: Settings) -> list[str]:
    """Hashes of the files of all LoRAs and embeddings that settings or prompts name."""
    examples = {tuple(lora_names(prompt)): prompt for prompt in prompts}
    if not settings.loras and not settings.embeddings and not any(examples):
        return []
    told = [adapter for text in examples.values() for adapter in read(components, [text], settings).components.adapters]
    return sorted({adapter["sha256"] for adapter in told})


def _check_same(begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Each process has loaded and read for itself, from disks that may differ."""
    for name in ("prompts_sha256", "fingerprint", "adapters", "image_sha256", "mask_sha256"):
        if begun.get(name) != now.get(name):
            raise ValueError(f"has another {name} than the first process; give all of them the same files")


def _check_whole(folder: RunFolder, names: Sequence[str]) -> None:
    if missing := folder.missing(names, listed=False):
        first = f"{names[missing[0]]}{', ...' if len(missing) > 1 else ''}"
        raise ValueError(
            f"{folder.path}: {len(missing)} of {len(names)} pictures are missing or damaged ({first}); the same command goes on"
        )
