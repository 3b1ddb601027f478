"""Options that several commands share, and what becomes of them.

An option that is not given is not passed on, so that every default stands in one place, `ldm.Settings`. Spellings of
CompVis's scripts are accepted beside ours.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.checkpoint import Components

MODEL_VARIABLE = "LDM_MODEL"
SETTINGS = (
    *("negative_prompt", "steps", "guidance_scale", "guidance_interval", "sampler", "spacing", "eta", "convention"),
    *("seed", "num_images", "batch_size", "tile", "prompt_syntax", "long_prompt", "clip_skip"),
    *("loras", "embeddings", "adapter_folder", "safety", "watermark"),
)


def add_model(command: argparse.ArgumentParser) -> None:
    """Which model, where, and in which precision."""
    group = command.add_argument_group("model")
    group.add_argument(
        "--model",
        "--ckpt",
        metavar="SOURCE",
        help=f"a checkpoint: .ckpt, .safetensors, a folder, hub:OWNER/NAME (default: ${MODEL_VARIABLE}, or else bundled)",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    group.add_argument("--dtype", help="float32, bfloat16, float16 or float64 (default float32)")
    group.add_argument("--precision", choices=("full", "autocast"), help=argparse.SUPPRESS)
    group.add_argument("--weights", help="ema or raw, where a file holds both (default: ema where there is one)")
    group.add_argument("--variant", help="fp16 for a folder's half-precision files (default: the full ones where there are)")
    group.add_argument("--tokenizer", help="hf or openai: how prompts are cleaned (default hf)")


def load(args: argparse.Namespace) -> "Components":
    """The model that the options name."""
    if args.model == "":
        raise ValueError(
            f"--model names nothing; name a checkpoint, or leave it out for ${MODEL_VARIABLE} or the bundled model"
        )

    import ldm
    from ldm.checkpoint import BUNDLED

    source = args.model or os.environ.get(MODEL_VARIABLE) or BUNDLED
    device = args.device or _best_device()
    chosen = {name: getattr(args, name) for name in ("weights", "variant", "tokenizer") if getattr(args, name) is not None}
    return ldm.load(source, device=device, dtype=_dtype(args, device), **chosen)


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(args: argparse.Namespace, device: str) -> Any:
    import torch

    half = "bfloat16" if device.startswith("cpu") else "float16"
    name = args.dtype or {"autocast": half}.get(args.precision, "float32")
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    names |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "half": torch.float16}
    if name not in names:
        raise ValueError(f"dtype {name!r}; expected one of {', '.join(names)}")
    return names[name]


def add_sampling(command: argparse.ArgumentParser) -> None:
    """How noise is taken away: what `make` and `schedule` have in common."""
    group = command.add_argument_group("sampling")
    group.add_argument("--steps", "--ddim_steps", type=int, metavar="N", help="steps of the sampler, 1 to 1000 (default 25)")
    group.add_argument("--sampler", help="pndm, ddim, 'Euler a', k_euler, 'DPM++ 2M Karras', unipc ... (default pndm)")
    group.add_argument("--plms", dest="sampler", action="store_const", const="pndm", help=argparse.SUPPRESS)
    group.add_argument("--dpm_solver", dest="sampler", action="store_const", const="dpmpp_2m", help=argparse.SUPPRESS)
    group.add_argument(
        "--spacing",
        "--schedule",
        help="tapered, uniform, leading, linspace, trailing, compvis, karras or exponential (default: the convention's)",
    )
    group.add_argument("--convention", help="ldm, diffusers, kdiffusion or compvis: do as that one does (default ldm)")


def add_adapters(command: argparse.ArgumentParser) -> None:
    """LoRAs and textual inversions."""
    group = command.add_argument_group("adapters")
    group.add_argument(
        "--lora",
        dest="loras",
        action="append",
        type=_lora,
        metavar="FILE[:C]",
        help="a LoRA, with its coefficient (default 1); several with several; or <lora:NAME:C> in the prompt",
    )
    group.add_argument(
        "--embedding",
        dest="embeddings",
        action="append",
        type=_embedding,
        metavar="[WORD=]FILE",
        help="a textual inversion, with the word that stands for it (default: its own)",
    )
    group.add_argument("--adapter-folder", "--lora-folder", metavar="FOLDER", help="where LoRAs and embeddings are named from")


def _lora(text: str) -> tuple[str, float]:
    """FILE:C, where C is a number; a file's name may have colons."""
    file, colon, coefficient = text.rpartition(":")
    try:
        return (file, float(coefficient)) if colon and file else (text, 1.0)
    except ValueError:
        return text, 1.0


def _embedding(text: str) -> tuple[str, str | None]:
    word, equals, file = text.partition("=")
    return (file, word) if equals and file else (text, None)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ldm.Settings` that were given."""
    return {name: value for name in SETTINGS if (value := getattr(args, name, None)) is not None}


def warn(text: str) -> None:
    print(f"ldm: warning: {text}", file=sys.stderr)
