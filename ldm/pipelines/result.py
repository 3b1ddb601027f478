"""What a run made: pictures, latents, and for each picture the receipt that tells how."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import images
from ldm.checkpoint import REQUIRED
from ldm.diffusion.grid import Grid
from ldm.output import files, watermark
from ldm.output import receipt as receipts
from ldm.output.safety import Verdict, act, check
from ldm.pipelines import autoencoding
from ldm.pipelines.run import Run


@dataclass(frozen=True)
class Result:
    """What a run made, image by image.

    images: PIL pictures, none where `decode` was off. latents: (n, 4, h, w), as the UNet has them, on its device.
    receipts: for each image everything that made it, to be kept in its file (see `ldm.output`).
    safety: for each picture what the model's safety checker says of it, None where nobody asked or there is none.
    """

    images: list[Image.Image]
    latents: Tensor
    receipts: list[dict[str, Any]]
    safety: list[Verdict | None]

    def save(self, folder: str | Path) -> list[Path]:
        """Write every picture as a PNG with its receipt, under the next free numbers of `folder`; the paths."""
        if not self.images:
            raise ValueError("there are no pictures to save, since decode was off; see ldm.pictures")
        return [files.save(picture, receipt, folder) for picture, receipt in zip(self.images, self.receipts, strict=True)]


def finish(
    run: Run,
    parts: list[Tensor],
    task: str,
    grid: Grid | None,
    noise: Tensor | None,
    finished: Callable[[Image.Image], Image.Image] | None = None,
    **fields: Any,
) -> Result:
    """The latents of all batches -> pictures and receipts.

    grid: what was walked, None for nothing. noise: what the caller gave to begin with. finished: what to make of each decoded
    picture before anybody looks at it. fields: the task's own.
    """
    latents = torch.cat(parts)
    if latents.isnan().any():
        raise ValueError(f"the latents hold NaN; {autoencoding.hint(run.components.unet.conv_in.weight.dtype)}")
    pictures = []
    if run.settings.decode:
        pixels = autoencoding.decode(run.components.autoencoder, latents, run.settings.tile)
        if pixels.isnan().any():
            raise ValueError(f"the decoded picture holds NaN; {autoencoding.hint(run.components.unet.conv_in.weight.dtype)}")
        pictures = list(map(finished or (lambda made: made), images.to_images(pixels, truncate=run.habits.truncate)))
    verdicts = _verdicts(run, pictures)
    pictures = [_shown(run, picture, verdict) for picture, verdict in zip(pictures, verdicts, strict=True)]
    if noise is not None:
        fields["noise_sha256"] = receipts.tensor_hash(noise)
    common = _receipt(run, task, grid, fields)
    receipts_made, batches = [], [len(part) for part in parts for _ in part]
    for i, prompt in enumerate(run.prompts):
        own = {"prompt": prompt, "cut_off": run.cut_off[i], "index": i, "latents_sha256": receipts.tensor_hash(latents[i])}
        own["batch"] = batches[i]
        own["seed"] = run.settings.seed if run.habits.one_generator else run.settings.seed + i
        if pictures:
            own["pixels_sha256"] = receipts.picture_hash(pictures[i])
            own |= {"verdict": dataclasses.asdict(verdicts[i])} if verdicts[i] else {}
        receipts_made.append(copy.deepcopy({**common, **own}))
    return Result(pictures, latents, receipts_made, verdicts)


def _verdicts(run: Run, pictures: list[Image.Image]) -> list[Verdict | None]:
    checker = run.components.safety
    return [None] * len(pictures) if checker is None or run.settings.safety == "off" else [*check(checker, pictures)]


def _shown(run: Run, picture: Image.Image, verdict: Verdict | None) -> Image.Image:
    """The picture as it may be seen."""
    picture = act(picture, verdict, run.settings.safety)
    return watermark.embed(picture) if run.settings.watermark else picture


def _receipt(run: Run, task: str, grid: Grid | None, fields: dict[str, Any]) -> dict[str, Any]:
    """What the receipts of all images of a run have in common."""
    settings = dataclasses.asdict(run.settings)
    del settings["decode"], settings["batch_size"]
    settings |= {name: [list(given) for given in settings[name]] for name in ("loras", "embeddings")}
    if run.habits.one_generator:  # an image depends on all that were made with it
        settings["prompts"] = run.prompts[:: settings["num_images"]]
    else:
        del settings["num_images"]
    weight = run.components.unet.conv_in.weight
    modules = {kind: getattr(run.components, kind) for kind in REQUIRED}
    model = {"name": run.components.name, "fingerprint": run.components.fingerprint or receipts.fingerprint(modules)}
    walked = {
        "calls": run.sampler.calls(grid) if grid else 0,
        "first_t": grid.steps[0].t if grid else None,
        "start_sigma": grid.start_sigma if grid else None,
    }
    return {
        "format": receipts.FORMAT,
        "task": task,
        "width": run.size[0],
        "height": run.size[1],
        **settings,
        "negative_cut_off": run.negative_cut_off,
        **({"acceleration": dict(run.components.acceleration)} if run.components.acceleration else {}),
        **({"adapters": list(map(dict, run.components.adapters))} if run.components.adapters else {}),
        **fields,
        "grid": walked,
        "model": model,
        "tokenizer": run.components.tokenizer.style,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "versions": receipts.versions(),
    }
