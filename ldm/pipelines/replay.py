"""The same picture again, from its receipt."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm import images
from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.output.receipt import picture_hash
from ldm.pipelines.image_to_image import img2img
from ldm.pipelines.inpaint import inpaint
from ldm.pipelines.settings import Settings
from ldm.pipelines.text_to_image import txt2img

TASKS = {"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint}
OWN_FIELDS = {"txt2img": (), "img2img": ("strength", "posterior"), "inpaint": ("strength", "posterior", "paste")}
COMPARED = ("model", "tokenizer", "dtype", "device", "versions")  # what must be the same for the same bits


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    same: whether its pixels are those of the receipt. changes: what was not as it had been, in words.
    """

    image: Image.Image
    receipt: dict[str, Any]
    same: bool
    changes: list[str]


def replay(
    components: Components,
    receipt: Mapping[str, Any],
    *,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    after_step: AfterStep = keep,
) -> Replay:
    """Make the picture of `receipt` (see `Result.receipts` and `ldm.output.files.read_receipt`) again.

    image, mask: what it was made from, where it was; they must be the same. Raises ValueError where they are not, or where
    the receipt tells of something that no receipt can hold, such as noise given as a tensor.
    """
    task = receipt["task"]
    if task not in TASKS:
        raise ValueError(f"the receipt is of task {task!r}; expected one of {', '.join(TASKS)}")
    if "noise_sha256" in receipt:
        raise ValueError(
            "the picture was made from noise that was given as a tensor; make it again from Python with that noise"
        )
    sources = {}
    for name, picture in (("image", image), ("mask", mask)):
        if f"{name}_sha256" in receipt:
            sources[name] = _same_source(name, picture, receipt[f"{name}_sha256"])
    known = [field.name for field in dataclasses.fields(Settings)]
    fields = {name: receipt[name] for name in (*known, "width", "height", *OWN_FIELDS[task]) if name in receipt}
    prompts = receipt.get("prompts", receipt["prompt"])
    result = TASKS[task](components, prompts, **sources, **fields, after_step=after_step)
    at = receipt["index"] if "prompts" in receipt else 0
    if not isinstance(at, int) or not 0 <= at < len(result.images):
        raise ValueError(f"the receipt is of image {at!r} of {len(result.images)}")
    made = result.receipts[at]
    changes = [f"{name}: {receipt.get(name)} then, {made[name]} now" for name in COMPARED if receipt.get(name) != made[name]]
    return Replay(result.images[at], made, made["pixels_sha256"] == receipt.get("pixels_sha256"), changes)


def _same_source(name: str, picture: Image.Image | None, wanted: str) -> Image.Image:
    if picture is None:
        raise ValueError(f"the picture was made from another; give it as {name}")
    if picture_hash(images.rgb(picture)) != wanted:
        raise ValueError(f"the {name} given is not the one that the picture was made from; its pixels differ")
    return picture
