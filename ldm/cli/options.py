"""Options that several commands share, and what becomes of them.

An option that is not given is not passed on, so that every default stands in one place, `ldm.Settings`. Spellings of
CompVis's scripts are accepted beside ours.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.checkpoint import Components

MODEL_VARIABLE = "LDM_MODEL"
SETTINGS = (
    *("negative_prompt", "steps", "guidance_scale", "guidance_interval", "sampler", "spacing", "eta", "convention"),
    *("seed", "num_images", "batch_size", "tile", "prompt_syntax", "long_prompt", "clip_skip"),
    *("loras", "embeddings", "adapter_folder", "safety", "watermark"),
)
APPROXIMATIONS = ("cache_steps", "merge_tokens")


def add_model(command: argparse.ArgumentParser, *, fast: bool = False) -> None:
    """Which model, where, and in which precision. fast: whether the command has a use for a model rewritten to be quick."""
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
    if fast:
        group.add_argument("--fast", action="store_true", help="rewrite the model to be quicker; takes no LoRAs")
        text = "with --fast, not exact: "
        group.add_argument("--cache-steps", type=int, metavar="N", help=f"{text}the whole network at each Nth step only")
        group.add_argument("--merge-tokens", type=float, metavar="SHARE", help=f"{text}attention to so many fewer, as 0.5")
    command.set_defaults(fast=False, cache_steps=None, merge_tokens=None)
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

    approximations = {name: getattr(args, name) for name in APPROXIMATIONS if getattr(args, name) is not None}
    if approximations and not args.fast:
        raise ValueError(f"--{next(iter(approximations)).replace('_', '-')} is for --fast; add that, or leave it out")
    source = args.model or os.environ.get(MODEL_VARIABLE) or BUNDLED
    device = args.device or best_device()
    chosen = {name: getattr(args, name) for name in ("weights", "variant", "tokenizer") if getattr(args, name) is not None}
    safety = getattr(args, "safety", None) != "off"  # which nobody then asks
    components = ldm.load(source, device=device, dtype=_dtype(args, device), safety=safety, **chosen)
    if not args.fast:
        return components
    from ldm.fast import accelerate

    return accelerate(components, **approximations)


def best_device() -> str:
    """A GPU where there is one."""
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


def add_prompt(command: argparse.ArgumentParser) -> None:
    """What is to be shown."""
    group = command.add_argument_group("prompt")
    group.add_argument("words", nargs="?", metavar="PROMPT", help='what to show; "" is allowed')
    group.add_argument("--prompt", help="the same, as an option")
    group.add_argument("--from-file", metavar="FILE", help="a prompt a line, '-' for standard input; empty lines are skipped")
    group.add_argument(
        "-n", "--negative-prompt", "--negative_prompt", metavar="TEXT", help="what the prompt is contrasted with"
    )
    group.add_argument(
        "--prompt-syntax", metavar="SYNTAX", help="plain, compel (word++, (a phrase)0.8) or a1111 ((x:1.3), [x]); default plain"
    )
    group.add_argument("--compel", dest="prompt_syntax", action="store_const", const="compel", help="short for that syntax")
    group.add_argument(
        "--long-prompt", metavar="HOW", help="cut, or in several windows: windows, sentences or commas (default cut)"
    )
    group.add_argument(
        "--clip-skip", type=int, metavar="N", help="the text encoder's layer, counted from the end (default 1, the last)"
    )


def add_form(command: argparse.ArgumentParser, size: str) -> None:
    """Size, guidance, seeds and number of the pictures. size: what it is where none is given, in words."""
    group = command.add_argument_group("image")
    group.add_argument("-W", "--width", "--W", type=int, metavar="PIXELS", help=f"multiple of 8 (default: {size})")
    group.add_argument("-H", "--height", "--H", type=int, metavar="PIXELS", help=f"multiple of 8 (default: {size})")
    group.add_argument(
        "--guidance-scale",
        "--scale",
        "--cfg-scale",
        type=float,
        metavar="G",
        help="0 and up (default: the model's, or 7.5)",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar="T",
        help="lowest and highest timestep that is guided (default: all)",
    )
    group.add_argument("--eta", "--ddim_eta", type=float, help="fresh noise in DDIM, 0 to 1 (default 0)")
    group.add_argument("--seed", type=int, help="of the first picture; the others count up (default: drawn, and shown)")
    group.add_argument("--num-images", "--n_samples", type=int, metavar="N", help="of each prompt (default 1)")
    group.add_argument("--n_iter", type=int, default=1, help=argparse.SUPPRESS)
    group.add_argument("--batch-size", type=int, metavar="N", help="pictures that are computed together (default 4)")
    group.add_argument("--tile", type=int, metavar="PIXELS", help="autoencoder in tiles, for large pictures (default: in one)")


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


def prompts(args: argparse.Namespace) -> list[str]:
    """The prompt given, or those of the file. Raises ValueError where there is none, or more than one."""
    given = [source for source in (args.words, args.prompt, args.from_file) if source is not None]
    if len(given) != 1:
        raise ValueError(f"{len(given)} prompts given; expected one of PROMPT, --prompt and --from-file")
    if args.from_file is None:
        return given
    try:
        text = sys.stdin.buffer.read() if args.from_file == "-" else Path(args.from_file).read_bytes()
        prompts = [line for line in text.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.from_file}: is not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{args.from_file}: cannot be read ({error.strerror})") from None
    if not prompts:
        raise ValueError(f"{args.from_file}: holds no prompt; expected one a line")
    return prompts


def check_folder(*files: Path | None) -> None:
    """Raises ValueError where a file that is to be written, if any is, would stand in no folder."""
    for file in files:
        if file and not file.resolve().parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.resolve().parent}; create it first")


def sides(args: argparse.Namespace) -> dict[str, int]:
    """The sides that were given."""
    return {name: getattr(args, name) for name in ("width", "height") if getattr(args, name) is not None}


def warn(text: str) -> None:
    print(f"ldm: warning: {text}", file=sys.stderr)
