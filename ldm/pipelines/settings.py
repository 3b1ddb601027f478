"""Every field of a run that is not a picture or the prompt: its default, its range, and what it means.

The fields and defaults are those of the demo form of Stable Diffusion's model card. `checked` refuses whatever is out of
range, with what was received and what is allowed.
"""

import dataclasses
import difflib
import math
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.diffusion.conventions import CONVENTIONS, IN_SIGMA, SPACINGS
from ldm.output.safety import ACTIONS
from ldm.samplers import find, plain
from ldm.text.encoding import SYNTAXES
from ldm.text.windows import LONG_PROMPTS

DRAWN_BELOW = 2**32  # a drawn seed is short enough to be noted down
SEEDS_BELOW = 2**64  # what torch's generators take
LONGEST_SIDE = 2**16  # pixels; longer ones are slips of the keyboard
LOWERED = ("spacing", "convention", "prompt_syntax", "long_prompt", "safety")  # may be spelled in capitals


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is made with.

    negative_prompt: what the prompt is contrasted with.
    steps: of the sampler, 1 to the schedule's 1000 (some conventions have no grid for some of them, and say so).
    guidance_scale: 0 and up. 1 is the prompt alone, 0 the negative prompt alone. A model may have a default of its own.
    guidance_interval: (lowest, highest) timestep at which guidance acts, all of them by default.
    sampler: any spelling that `ldm.samplers.find` knows; "... Karras" and "... Exponential" also set the spacing.
    spacing: one of `SPACINGS` instead of the convention's own.
    eta: share of fresh noise in DDIM, 0 to 1.
    convention: "ldm", or "diffusers", "kdiffusion", "compvis" to do as they do.
    seed: of the first image, 0 and up; image i has seed + i. Drawn where it is None.
    num_images: how many of each prompt, 1 and up. batch_size: how many go through the network together; all of them in the
        conventions whose images have one generator in common.
    tile: side in pixels of the tiles in which the autoencoder takes large pictures, None for all at once.
    prompt_syntax: "plain", "compel" or "a1111": how prompts are weighted; see `ldm.text.encoding`.
    long_prompt: "cut" to what the model reads at once, or in several windows: "windows", "sentences", "commas".
    clip_skip: the text encoder's layer that is used, counted from the end: 1 is the last.
    loras: files, or names in `adapter_folder`, each alone or with its coefficient. Prompts may name more: <lora:name:0.8>.
    embeddings: files or names of textual inversions, each alone or with the placeholder that stands for it in prompts.
    safety: what to do with a picture that the model's safety checker flags: "black", "blur", "flag" it in the result alone, or
        "off", not to ask. Where the model has no checker, nothing is checked.
    watermark: put CompVis's invisible watermark into the pictures (extra `watermark`).
    decode: False leaves out the pictures and returns latents alone.
    """

    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "pndm"
    spacing: str | None = None
    eta: float = 0.0
    convention: str = "ldm"
    seed: int | None = None
    num_images: int = 1
    batch_size: int = 4
    tile: int | None = None
    prompt_syntax: str = "plain"
    long_prompt: str = "cut"
    clip_skip: int = 1
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[tuple[str, str | None], ...] = ()
    adapter_folder: str | None = None
    safety: str = "black"
    watermark: bool = False
    decode: bool = True


def checked(fields: dict[str, Any]) -> Settings:
    """The settings of these fields, spelled out: the sampler by its NAME, a seed drawn. Raises ValueError in one line."""
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name.removeprefix("num_inference_"), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            raise ValueError(f"unknown setting {name!r}; {hint}")
    asked = Settings(**{name: _lower(value) if name in LOWERED else value for name, value in fields.items()})
    _check_text("negative_prompt", asked.negative_prompt)
    _check_whole("steps", asked.steps, 1)
    _check_number("guidance_scale", asked.guidance_scale, 0, math.inf)
    _check_number("eta", asked.eta, 0, 1)
    _check_whole("num_images", asked.num_images, 1)
    _check_whole("batch_size", asked.batch_size, 1)
    if asked.tile is not None:
        _check_whole("tile", asked.tile, 64)
        check_side("tile", asked.tile, 8)
    for name in ("watermark", "decode"):
        if not isinstance(getattr(asked, name), bool):
            raise ValueError(f"{name} {getattr(asked, name)!r}; expected True or False")
    _check_choice("safety", asked.safety, ACTIONS)
    if asked.adapter_folder is not None:
        _check_path("adapter_folder", asked.adapter_folder)
    _check_choice("prompt_syntax", asked.prompt_syntax, tuple(SYNTAXES))
    _check_choice("long_prompt", asked.long_prompt, LONG_PROMPTS)
    _check_whole("clip_skip", asked.clip_skip, 1)
    _check_choice("convention", asked.convention, tuple(CONVENTIONS))
    if asked.spacing is not None:
        _check_choice("spacing", asked.spacing, SPACINGS)
    sampler, spacing = _sampler(asked)
    if asked.eta > 0 and sampler != "ddim":
        raise ValueError(f"eta {asked.eta} with sampler {sampler}; only ddim takes eta; leave it at 0")
    return dataclasses.replace(
        asked,
        sampler=sampler,
        spacing=spacing,
        seed=_seed(asked),
        guidance_interval=_interval(asked.guidance_interval),
        loras=tuple(_lora(given) for given in _listed("loras", asked.loras)),
        embeddings=tuple(_embedding(given) for given in _listed("embeddings", asked.embeddings)),
        adapter_folder=None if asked.adapter_folder is None else str(asked.adapter_folder),
    )


def check_side(name: str, value: Any, multiple: int) -> int:
    """A side in pixels. Raises ValueError where it is not a multiple of what the autoencoder halves away."""
    _check_whole(name, value, multiple, LONGEST_SIDE)
    if value % multiple:
        below = value // multiple * multiple
        raise ValueError(f"{name} {value} is not a multiple of {multiple}; try {below} or {below + multiple}")
    return value


def check_strength(value: Any) -> float:
    """How much of the noise an image is given before it is denoised: 0 (none) to 1 (all)."""
    _check_number("strength", value, 0, 1)
    return float(value)


def check_posterior(value: Any) -> None:
    """What is taken of the autoencoder's posterior."""
    _check_choice("posterior", value, ("sample", "mode"))


def check_prompts(prompt: Any) -> list[str]:
    """One prompt or several, as a list."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else None
    if not prompts:
        raise ValueError(f"prompt {_shown(prompt)}; expected text, or a list of texts that is not empty")
    for text in prompts:
        _check_text("prompt", text)
    return prompts


def _sampler(asked: Settings) -> tuple[str, str | None]:
    """The sampler's NAME and the spacing: web interfaces name both at once, as in "Euler a Karras"."""
    _check_text("sampler", asked.sampler)
    spelling = plain(asked.sampler)
    for spacing in IN_SIGMA:
        base = spelling.removesuffix(spacing)
        if base and base != spelling:
            if asked.spacing not in (None, spacing):
                raise ValueError(f"sampler {asked.sampler!r} with spacing {asked.spacing!r}; name one spacing, not two")
            return find(base).NAME, spacing
    return find(asked.sampler).NAME, asked.spacing


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _seed(asked: Settings) -> int:
    if asked.seed is None:
        return secrets.randbelow(DRAWN_BELOW)
    if asked.seed == -1:
        raise ValueError("seed -1; for a drawn one, leave the seed out; otherwise expected a whole number from 0")
    _check_whole("seed", asked.seed, 0, SEEDS_BELOW - 1)
    return asked.seed


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"guidance_interval {_shown(value)}; expected two timesteps, lowest and highest")
    for t in value:
        _check_number("guidance_interval's timestep", t, 0, math.inf)
    if value[0] > value[1]:
        raise ValueError(f"guidance_interval {value[0]} to {value[1]}; expected the lower timestep first")
    return (float(value[0]), float(value[1]))


def _listed(name: str, value: Any) -> list[Any]:
    """One or several, as a list."""
    if isinstance(value, str | Path):
        return [value]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} {_shown(value)}; expected a list of files or names")
    return list(value)


def _lora(value: Any) -> tuple[str, float]:
    file, coefficient = value if isinstance(value, list | tuple) and len(value) == 2 else (value, 1.0)
    _check_path("LoRA", file)
    _check_number(f"LoRA {file}, coefficient", coefficient, -math.inf, math.inf)
    return str(file), float(coefficient)


def _embedding(value: Any) -> tuple[str, str | None]:
    file, placeholder = value if isinstance(value, list | tuple) and len(value) == 2 else (value, None)
    _check_path("embedding", file)
    if placeholder is not None:
        _check_text("placeholder", placeholder)
    return str(file), placeholder


def _check_path(name: str, value: Any) -> None:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"{name} {_shown(value)}; expected a file or a name")


def _check_whole(name: str, value: Any, lowest: int, highest: int | None = None) -> None:
    if type(value) is not int or value < lowest or (highest is not None and value > highest):
        upwards = f"a whole number from {lowest} {'up' if highest is None else f'to {highest}'}"
        raise ValueError(f"{name} {_shown(value)}; expected {upwards}")


def _check_number(name: str, value: Any, lowest: float, highest: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest or abs(value) > sys.float_info.max:
        bound = f", {lowest} or more" if math.isfinite(lowest) else ""
        allowed = f"{lowest} to {highest}" if math.isfinite(highest) else f"a finite number{bound}"
        raise ValueError(f"{name} {_shown(value)}; expected {allowed}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} {_shown(value)}; expected text")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {_shown(value)}; expected one of {', '.join(choices)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
