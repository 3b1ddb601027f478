"""From a path to a model: `load` builds the modules on the meta device and hands each its tensors, straight from the file.

`weights_convert` finds out what the path is and names every tensor natively; a tensor already of the wanted type is used
where it lies, in the memory-mapped file, so that loading costs no second copy and little time.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import weights_convert
from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.clip import ImageConfig, ImageEncoder, TextConfig, TextEncoder
from ldm.models.safety import SafetyChecker, SafetyConfig
from ldm.models.unet import UNet, UNetConfig
from ldm.presets import preset
from ldm.text.tokenizer import Tokenizer
from weights_convert import CheckpointError
from weights_convert.component import Component, check_finite
from weights_convert.tokenizer_files import clip_vocabulary

MODULES = {
    "text_encoder": (TextEncoder, TextConfig),
    "unet": (UNet, UNetConfig),
    "autoencoder": (Autoencoder, AutoencoderConfig),
    "safety": (SafetyChecker, SafetyConfig),
    "image_encoder": (ImageEncoder, ImageConfig),
}
LOADED = ("text_encoder", "unet", "autoencoder", "safety")  # by `load`; the image encoder is for measuring, not for making
REQUIRED = ("text_encoder", "unet", "autoencoder")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BUNDLED = "bundled"  # the name of the model that ships with the package
RELEASE_EVERY = 64 << 20  # bytes converted between two releases of the mapped file


@dataclass(frozen=True, kw_only=True)
class Components:
    """A whole model, ready to run. `safety` is None where the checkpoint has no safety checker.

    `name` is what the model is called: its file or folder, or its preset. `sources` says for each component which file,
    and which of its weights, it came from. `guidance_scale` is what it is sampled with where nobody says otherwise.
    `adapters` is what receipts tell of the LoRAs and textual inversions that it has. Of a model whose modules `ldm.fast` has
    rewritten, `acceleration` says how, and `fingerprint` is that of the weights it was made from.
    """

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    unet: UNet
    autoencoder: Autoencoder
    schedule: ScheduleConfig
    safety: SafetyChecker | None
    sources: Mapping[str, str]
    name: str
    guidance_scale: float = 7.5
    adapters: tuple[Mapping[str, Any], ...] = ()
    acceleration: Mapping[str, Any] | None = None
    fingerprint: str | None = None


def load(
    source: str | Path = BUNDLED,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: str = "auto",
    variant: str = "auto",
    ignore: Sequence[str] = (),
    tokenizer: str = "hf",
    safety: bool = True,
) -> Components:
    """Load the model at `source`: a native folder, a diffusers folder, a CompVis `.ckpt`, a single-file `.safetensors`,
    "bundled", the small model that ships with the package, or "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION", a diffusers
    folder there (extra `hub`; nothing else uses the network).

    weights: "ema", "raw" or "auto" (EMA where there is), for a single file that holds both.
    variant: "fp16" for a diffusers folder's half-precision files, "" for the full ones, "auto" for the full ones if there.
    ignore: names of unexpected tensors to load the file without; a last "*" stands for any ending.
    tokenizer: how prompts are cleaned, "hf" or "openai"; see `ldm/text/tokenizer.py`.
    safety: whether to load the safety checker too, where there is one: a quarter of Stable Diffusion v1's weights.
    Modules are in eval mode. Raises CheckpointError, one line, where the source is not a whole model.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"{source}: cannot be loaded in dtype {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    check_device(source, device)
    checkpoint = weights_convert.read(_local(source, variant), weights=weights, variant=variant, ignore=ignore)
    missing = [kind for kind in REQUIRED if kind not in checkpoint.components]
    if missing:
        there = ", ".join(checkpoint.components)
        raise CheckpointError(f"{source}: holds {there} but no {' and no '.join(missing)}; a model needs {', '.join(REQUIRED)}")
    vocabulary = checkpoint.vocabulary or clip_vocabulary()
    _check_fit(checkpoint, len(vocabulary.tokens))
    wanted = [kind for kind in LOADED if safety or kind in REQUIRED]
    present = {kind: checkpoint.components[kind] for kind in wanted if kind in checkpoint.components}
    modules = {kind: load_module(component, device=device, dtype=dtype) for kind, component in present.items()}
    return Components(
        tokenizer=Tokenizer(vocabulary.tokens, vocabulary.merges, modules["text_encoder"].config.context_length, tokenizer),
        schedule=ScheduleConfig(**dataclasses.asdict(checkpoint.schedule)),
        sources={kind: component.source for kind, component in present.items()},
        name=Path(checkpoint.path).resolve().stem,
        guidance_scale=checkpoint.sampling.guidance_scale,
        **{"safety": None, **modules},
    )


def load_module(component: Component, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build one component on the meta device and give it the checkpoint's tensors."""
    _check_divisible(component)
    module_type, config_type = MODULES[component.kind]
    with torch.device("meta"), _SkipInitialisation():
        module = module_type(config_type(**dataclasses.asdict(component.architecture)))
    module.load_state_dict(dict(_tensors(component, torch.device(device), dtype)), strict=True, assign=True)
    return module.eval()


class _SkipInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are: drawing random numbers for tensors without memory costs torch over a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def build(name: str, *, seed: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Components:
    """A model of the preset `name` with random weights: torch's own initialisation under `seed`."""
    config = preset(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {k: MODULES[k][0](getattr(config, k)).to(device, dtype).eval() for k in REQUIRED}
    return Components(
        tokenizer=Tokenizer.clip(config.text_encoder.context_length),
        schedule=config.schedule,
        safety=None,
        sources=dict.fromkeys(modules, f"random weights, seed {seed}"),
        name=f"{name} with random weights",
        **modules,
    )


def _tensors(component: Component, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Native tensors on `device` in `dtype`, checked for NaN; the file's pages are let go as they have been converted."""
    converted = 0
    for name in component.tensors:
        found = component.tensors[name]
        tensor = found.to(device, dtype)
        check_finite(component, name, tensor, found)
        yield name, tensor
        if tensor is not found:
            converted += found.nbytes
            del found
            if converted > RELEASE_EVERY:
                component.tensors.release()
                converted = 0


def check_device(source: str | Path, device: str | torch.device) -> None:
    """Raise CheckpointError, one line, where the device cannot be used."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown name, one this build has not, one that is not there
        reason = " ".join(str(error).split()).partition(".")[0][:100]
        raise CheckpointError(f"{source}: device {str(device)!r} cannot be used here ({reason}); try cpu") from None


def _check_divisible(component: Component) -> None:
    """Heads and norm groups leave no mark on the tensors, so the file cannot vouch for them; each must divide its layer."""
    architecture = component.architecture
    widths = getattr(architecture, "level_widths", None) or (architecture.width,)
    attends = getattr(architecture, "attention_levels", (True,) * len(widths))
    attending = {*(width for width, yes in zip(widths, attends, strict=True) if yes), widths[-1]}
    for field, layers in (("norm_groups", set(widths)), ("heads", attending)):
        count = getattr(architecture, field, 1)
        odd = [width for width in sorted(layers) if width % count]
        if odd:
            raise CheckpointError(f"{component.source}: {component.kind} has {field} {count}; expected a divisor of {odd[0]}")


def _check_fit(checkpoint: weights_convert.Checkpoint, tokens: int) -> None:
    """Components taken from different models do not fit together; say so before the first matrix product does."""
    text, unet, autoencoder = (checkpoint.components[kind].architecture for kind in REQUIRED)
    pairs = (
        ("the text encoder's width", text.width, "the UNet's context", unet.context_width),
        ("the autoencoder's latent channels", autoencoder.latent_channels, "the UNet's output channels", unet.out_channels),
    )
    for left, left_size, right, right_size in pairs:
        if left_size != right_size:
            raise CheckpointError(
                f"{checkpoint.path}: {left} is {left_size}, {right} {right_size}; they are of different models"
            )
    if tokens > text.vocabulary_size:
        raise CheckpointError(
            f"{checkpoint.path}: the vocabulary has {tokens:,} tokens, the text encoder {text.vocabulary_size:,}; "
            "they are of different models"
        )


def _local(source: str | Path, variant: str) -> Path:
    """The path of `source`, fetched first where it says "hub:". A folder of one's own called bundled is "./bundled"."""
    if str(source) == BUNDLED:
        return bundled_folder()
    if str(source).startswith("hub:"):
        return _fetched(str(source), variant)
    path = Path(source).expanduser()
    looks_like_a_hub_id = str(source).count("/") == 1 and not path.suffix and str(source)[0] not in "~./"
    if looks_like_a_hub_id and not os.path.exists(path):
        raise CheckpointError(f"{source}: there is no such file or folder; to fetch it from the hub, say hub:{source}")
    return path


def bundled_folder() -> Path:
    """Where the bundled model lies. Raises CheckpointError where the package was built without it."""
    folder = Path(__file__).resolve().parent / "assets" / BUNDLED
    if not folder.is_dir():
        raise CheckpointError(f"{BUNDLED}: this package was built without its model; ldm train bundled makes one")
    return folder


def _fetched(source: str, variant: str) -> Path:
    """The files of a diffusers folder on the hub: the plain or the marked variant of the weights, not both."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{source}: needs the hub extra; install it with: pip install 'ldm[hub]'") from None
    name, _, revision = source.removeprefix("hub:").partition("@")
    mark = "" if variant in ("auto", "") else f".{variant}"
    weights = [f"*/{stem}{mark}.{end}" for stem in ("*model", "diffusion_pytorch_model") for end in ("safetensors", "bin")]
    others = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=[*others, *weights]))
    except Exception as error:  # the library raises many kinds, from requests' to its own
        raise CheckpointError(f"{source}: not to be had from the hub ({' '.join(str(error).split())[:160]})") from None
