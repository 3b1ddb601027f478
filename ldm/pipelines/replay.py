"""The same picture again, from its receipt."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.pipelines.image_to_image import img2img
from ldm.pipelines.inpaint import inpaint
from ldm.pipelines.settings import Settings, check_prompts, checked
from ldm.pipelines.sources import source_hash
from ldm.pipelines.text_to_image import txt2img

TASKS = {"txt2img": txt2img, "img2img": img2img, "inpaint": inpaint}
OWN_FIELDS = {"txt2img": (), "img2img": ("strength", "posterior"), "inpaint": ("strength", "posterior", "paste")}


@dataclass(frozen=True)
class Replay:
    """A picture made again.

    same: whether its pixels are those of the receipt, to the last bit. Made in another batch, with another number of threads or
    from weights that lie elsewhere in memory, they can differ by what rounding leaves. changes: what of the model, the
    precision or the software was not as it had been, in words.
    """

    image: Image.Image
    receipt: dict[str, Any]
    same: bool
    changes: list[str]


def replay(
    components: Components,
    receipt: Mapping[str, Any],
    *,
    image: Image.Image | Tensor | None = None,
    mask: Image.Image | None = None,
    adapter_folder: str | Path | None = None,
    after_step: AfterStep = keep,
) -> Replay:
    """Make the picture of `receipt` (see `Result.receipts` and `ldm.output.files.read_receipt`) again.

    image, mask: what it was made from, where it was; they must be the same (of latents, that image's own row).
    adapter_folder: where its LoRAs and embeddings are, if no longer where the receipt says. Raises
    ValueError where any of them is another, or where the receipt tells of something that no receipt can hold, such as noise
    given as a tensor.
    """
    if not isinstance(receipt, Mapping):
        raise ValueError(f"receipt is a {type(receipt).__name__}; expected what ldm.read_receipt returns")
    task = receipt.get("task")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"the receipt is of task {task!r}; expected one of {', '.join(TASKS)}")
    if "noise_sha256" in receipt:
        raise ValueError(
            "the picture was made from noise that was given as a tensor; make it again from Python with that noise"
        )
    sources = {}
    for name, source in (("image", image), ("mask", mask)):
        if f"{name}_sha256" in receipt:
            sources[name] = _same_source(name, source, receipt[f"{name}_sha256"])
        elif source is not None:
            raise ValueError(f"the picture was made without any {name}; leave it out")
    known = [field.name for field in dataclasses.fields(Settings) if field.name not in ("decode", "batch_size")]
    fields = {name: receipt[name] for name in known if name in receipt}
    if adapter_folder is not None:
        fields["adapter_folder"] = adapter_folder
    settings = checked(fields)
    fields |= {name: receipt[name] for name in ("width", "height", *OWN_FIELDS[task]) if name in receipt}
    together = check_prompts(receipt.get("prompts", receipt.get("prompt")))
    count = len(together) * settings.num_images
    at = receipt.get("index") if "prompts" in receipt else 0
    if type(at) is not int or not 0 <= at < count:
        raise ValueError(f"the receipt is of image {at!r} of {count}")
    result = TASKS[task](components, together, **sources, **fields, after_step=after_step)
    made = result.receipts[at]
    proof = "pixels_sha256" if "pixels_sha256" in receipt else "latents_sha256"  # latents alone, where none was decoded
    then, now = _circumstances(receipt), _circumstances(made)
    changes = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
    return Replay(result.images[at], made, made[proof] == receipt.get(proof), changes)


def _circumstances(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for the same bits. The model may have got another name."""
    named = {name: receipt.get(name) for name in ("tokenizer", "dtype", "device", "batch", "acceleration")}
    named["the files of its adapters"] = [adapter.get("sha256") for adapter in receipt.get("adapters", ())]
    return {"the model's fingerprint": receipt["model"].get("fingerprint"), **named, **receipt["versions"]}


def _same_source(name: str, source: Image.Image | Tensor | None, wanted: str) -> Image.Image | Tensor:
    if source is None:
        raise ValueError(f"the picture was made with {'an image' if name == 'image' else 'a mask'}; give that as {name} too")
    if source_hash(source) != wanted:
        raise ValueError(f"the {name} given is not the one that the picture was made from; its values differ")
    return source
