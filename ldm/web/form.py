"""The form: every field of a request for pictures, its default and its range, for the page and for POST /v1/images.

The fields are those of the demo form of Stable Diffusion's model card, under its names, and some choices of ours beside them.
Ranges that a field has by itself are part of the OpenAPI description; what depends on others, on the model or on the server is
refused by `fields_of`, with the field's name, before anything is put in the queue.
"""

import base64
import binascii
import dataclasses
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ldm import images
from ldm.adapters.lookup import ENDINGS
from ldm.checkpoint import Components
from ldm.diffusion.conventions import from_image, make_grid
from ldm.pipelines.run import sees_mask
from ldm.pipelines.settings import SEEDS_BELOW, Settings, checked
from ldm.text.encoding import parse
from ldm.text.prompt import PromptError

LONGEST_TEXT = 20_000  # letters of a prompt
MOST_IMAGES = 16
MOST_STEPS = 512
MOST_BYTES = 16 << 20  # of an uploaded picture
TASK_FIELDS = ("prompt", "image", "mask", "strength", "posterior", "paste", "width", "height")  # which are no `Settings`
FIELDS = (*TASK_FIELDS, *(field.name for field in dataclasses.fields(Settings)))


class FieldError(ValueError):
    """What is wrong with one field of a request."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class Lora(BaseModel):
    """One LoRA by its name in the server's adapter folder."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=200)]
    coefficient: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 1.0


Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Picture = Annotated[str, Field(max_length=4 * MOST_BYTES // 3 + 100, description="PNG, JPEG or WebP, base64 or a data: URL")]
Side = Annotated[int, Field(ge=8, le=8192, multiple_of=8)]


class ImagesRequest(BaseModel):
    """What POST /v1/images takes."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(description='what is to be seen; "" is allowed')
    negative_prompt: Text = ""
    image: Picture | None = Field(None, description="what to start from: image to image; with a mask, inpainting")
    mask: Picture | None = Field(None, description="white where the image is made anew")
    num_images: int = Field(1, ge=1, le=MOST_IMAGES)
    num_inference_steps: int = Field(25, ge=1, le=MOST_STEPS)
    guidance_scale: float = Field(7.5, ge=0, le=1000, allow_inf_nan=False)
    strength: float = Field(0.8, ge=0, le=1, allow_inf_nan=False, description="0 is the image itself, 1 ignores it")
    width: Side | None = Field(None, description="the model's own, or the image's, where left out")
    height: Side | None = None
    seed: int | None = Field(None, ge=0, lt=SEEDS_BELOW, description="drawn where left out")
    use_compel: bool = Field(False, description="weighted prompts: (word)1.3, word++")
    loras: list[Lora] = Field(default_factory=list, max_length=16)
    sampler: Annotated[str, Field(max_length=100)] = "pndm"
    spacing: Annotated[str, Field(max_length=100)] | None = None


@dataclass(frozen=True)
class Limits:
    """What a server lets clients ask for. most_pixels: of a picture that is made; most_image_pixels: of one that is given."""

    most_pixels: int = 1024 * 1024
    most_image_pixels: int = 4096 * 4096
    adapter_folder: Path | None = None


def task_of(request: ImagesRequest) -> str:
    if request.mask is not None and request.image is None:
        raise FieldError("mask", "mask without image; give the image it belongs to")
    return "txt2img" if request.image is None else "img2img" if request.mask is None else "inpaint"


def fields_of(request: ImagesRequest, components: Components, limits: Limits) -> dict[str, Any]:
    """The pipeline's keyword arguments. Raises FieldError."""
    task = task_of(request)
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_images": request.num_images,
        "steps": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),
        "seed": request.seed,
        "sampler": request.sampler,
        "prompt_syntax": "compel" if request.use_compel else "plain",
    }
    if request.spacing is not None:
        fields["spacing"] = request.spacing
    if limits.adapter_folder is not None:
        fields["adapter_folder"] = str(limits.adapter_folder)
    if request.loras:
        fields["loras"] = tuple((lora.name, lora.coefficient) for lora in request.loras)
    if task != "txt2img":
        fields["image"] = picture(request.image, "image", limits.most_image_pixels)
        fields["strength"] = float(request.strength)
    if task == "inpaint":
        fields["mask"] = picture(request.mask, "mask", limits.most_image_pixels)
        if "strength" not in request.model_fields_set:
            fields["strength"] = 1.0
    fields |= sizes(request.width, request.height, fields.get("image"), components, limits)
    return check(fields, components, limits)


def check(fields: dict[str, Any], components: Components, limits: Limits) -> dict[str, Any]:
    """The same with a seed; whatever can be refused before the pictures are made is refused here."""
    try:
        settings = checked({name: value for name, value in fields.items() if name not in TASK_FIELDS})
        grid = make_grid(components.schedule, settings.steps, settings.sampler, spacing=settings.spacing)
    except ValueError as error:
        raise FieldError(field_in(str(error)), str(error)) from None
    if settings.seed + settings.num_images > SEEDS_BELOW:
        raise FieldError("seed", f"seed {settings.seed}; expected at most {SEEDS_BELOW - settings.num_images}")
    for field in ("prompt", "negative_prompt"):
        _check_prompt(field, fields[field], settings.prompt_syntax, components, limits)
    check_loras("loras", [name for name, _ in settings.loras], components, limits)
    if "mask" not in fields and sees_mask(components):
        raise FieldError("mask", "the model is for inpainting; give an image, and a mask that is white where it is made anew")
    if "mask" in fields and from_image(grid, fields["strength"], settings.sampler, steps=settings.steps) is None:
        strength = f"strength {fields['strength']} of {settings.steps} steps"
        raise FieldError("strength", f"{strength} leaves none to run; raise strength or steps")
    return fields | {"seed": settings.seed}


def _check_prompt(field: str, text: str, syntax: str, components: Components, limits: Limits) -> None:
    try:
        prompt = parse(text, syntax)
    except PromptError as error:
        raise FieldError(field, str(error)) from None
    if prompt.swaps:
        raise FieldError(field, "a .swap, which cannot be made here; write the words that are wanted")
    names = [name for name, _ in prompt.loras]
    check_loras(field, names, components, limits)
    if names and field == "negative_prompt":
        raise FieldError(field, f"LoRA {names[0]!r} would change both prompts; name it in the prompt")


def sizes(
    width: int | None, height: int | None, image: Image.Image | None, components: Components, limits: Limits
) -> dict[str, int]:
    """Width and height of what is made; the model's own or the image's where left out."""
    config, factor = components.unet.config, components.autoencoder.config.downsampling
    own = (config.sample_size * factor,) * 2 if image is None else tuple(images.floor_to(side, factor) for side in image.size)
    size = (own[0] if width is None else width, own[1] if height is None else height)
    for name, side in zip(("width", "height"), size, strict=True):
        if side % factor or side < factor:
            below = max(side // factor, 1) * factor
            raise FieldError(name, f"{name} {side}; expected a multiple of {factor}, as {below} or {below + factor}")
    if size[0] * size[1] > limits.most_pixels:
        longest = int(limits.most_pixels**0.5) // factor * factor
        field = "image" if width is None and height is None else "width"
        raise FieldError(
            field, f"{size[0]} x {size[1]} pixels; expected at most {limits.most_pixels}, as {longest} x {longest}"
        )
    return {"width": size[0], "height": size[1]}


def check_loras(field: str, names: list[str], components: Components, limits: Limits) -> None:
    """Only bare names that are in the server's folder, so that none leads out of it."""
    known = adapters(limits)
    for name in names:
        if name not in known:
            listed = f"expected one of {', '.join(known[:10])}" if known else "this server has none"
            raise FieldError(field, f"LoRA {name[:60]!r}; {listed}")
    if names and components.acceleration is not None:
        raise FieldError(field, "this server's model is accelerated, which LoRAs cannot change; leave them out")


def adapters(limits: Limits) -> list[str]:
    """The names in the server's adapter folder."""
    if limits.adapter_folder is None or not limits.adapter_folder.is_dir():
        return []
    return sorted(file.stem for file in limits.adapter_folder.iterdir() if file.suffix in ENDINGS and file.is_file())


DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,", re.IGNORECASE)


def picture(text: str, field: str, most_pixels: int) -> Image.Image:
    """A picture from base64, bounded before it is unpacked. Raises FieldError."""
    return picture_of(decoded(text, field), field, most_pixels)


def decoded(text: str, field: str) -> bytes:
    """The bytes of base64, or of a data: URL. Raises FieldError."""
    found = DATA_URL.match(text)
    try:
        return base64.b64decode("".join(text[found.end() if found else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise FieldError(field, f"{field} is no base64 of a picture; expected PNG, JPEG or WebP") from None


def picture_of(data: bytes, field: str, most_pixels: int) -> Image.Image:
    """The same from the file's bytes."""
    if len(data) > MOST_BYTES:
        raise FieldError(field, f"{field} has {len(data)} bytes; expected at most {MOST_BYTES}")
    try:
        return images.read(io.BytesIO(data), name=field, most_pixels=most_pixels)
    except ValueError as error:
        raise FieldError(field, str(error)) from None


def field_in(message: str) -> str:
    """Which field a pipeline's refusal is about: it begins with the name."""
    first = message.removeprefix("the ").replace("negative prompt", "negative_prompt", 1).split(" ", 1)[0].rstrip(",:")
    first = {"LoRA": "loras"}.get(first, first)
    return first if first in FIELDS else "prompt"
