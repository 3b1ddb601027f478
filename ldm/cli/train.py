"""`ldm train STAGE`: train an autoencoder, a text encoder, a UNet, a LoRA, the judge of scenes, or the bundled model."""

import argparse
from pathlib import Path
from typing import Any

from ldm.cli import options, sharing

STAGES = {
    "autoencoder": "a KL autoencoder, on pictures",
    "clip": "a text encoder, by contrast with pictures",
    "unet": "a UNet, in the latents of one and on the states of the other",
    "lora": "a LoRA of a model, on pictures with captions",
    "judge": "the classifier that says what a picture of a scene shows",
    "bundled": "judge, autoencoder, clip and unet in turn: the model that ships with the package",
}


def add(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train a LoRA, a UNet, a text encoder, an autoencoder, or a whole model",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train one stage of a latent diffusion model:\n\n"
        + "\n".join(f"    {name:<12} {about}" for name, about in STAGES.items())
        + "\n\nRun alone, or on many processes: torchrun --nproc_per_node N -m ldm train ...\n"
        "What was stopped goes on where it was when the same command is given again.",
    )
    command.add_argument("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    command.add_argument(
        "--out", type=Path, required=True, help="the run's folder: metrics, sheets, result; for lora, a .safetensors file"
    )
    command.add_argument("--recipe", type=Path, metavar="FILE", help="a TOML file with a table for the stage")
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting: batch=32, model.heads=4")
    command.add_argument("--data", metavar="DIR", help="pictures with captions, instead of drawn scenes (not for the judge)")
    command.add_argument(
        *("--model", "--base"),
        metavar="MODEL",
        help=f"for lora: of which (default: ${options.MODEL_VARIABLE}, or else bundled); for unet: whose UNet is trained on",
    )
    command.add_argument("--autoencoder", metavar="MODEL", help="for unet: the model that gives the autoencoder")
    command.add_argument("--text-encoder", metavar="MODEL", help="for unet: the model that gives tokenizer and text encoder")
    command.add_argument(
        "--shrink", type=float, metavar="F", help="for unet: the same course, F times fewer steps of F times fewer pictures"
    )
    command.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ldm.processes import joined
    from ldm.training import bundled

    _check(args)
    with joined(args.device) as processes, sharing.one_voice(processes):
        if args.stage == "bundled":
            made = bundled.train(args.out, processes, recipe=args.recipe or bundled.RECIPE, quiet=args.quiet)
        else:
            made = _one(args, processes)
        if processes.leads:
            print(made)


def _check(args: argparse.Namespace) -> None:
    """Options that this stage does not have are refused rather than passed over."""
    if args.stage != "lora" and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out}: is a file; --out names the folder of the run")
    for name in ("model", "autoencoder", "text_encoder"):
        users = ("unet", "lora") if name == "model" else ("unet",)
        if getattr(args, name) and args.stage not in users:
            raise ValueError(f"--{name.replace('_', '-')} is for {' and '.join(users)}, not for {args.stage}")
    if args.stage == "unet" and not args.model and not (args.autoencoder and args.text_encoder):
        raise ValueError("a UNet needs --model MODEL to go on from, or --autoencoder MODEL and --text-encoder MODEL")
    if args.data and args.stage in ("judge", "bundled"):
        raise ValueError(f"--data is not for {args.stage}, which is made of drawn scenes")
    if args.shrink is not None and args.stage != "unet":
        raise ValueError(f"--shrink is for unet, not for {args.stage}")
    if args.set and args.stage == "bundled":
        raise ValueError("--set is for one stage; for bundled, write a recipe and name it with --recipe")


def _one(args: argparse.Namespace, processes: Any) -> Path:
    """Train one stage; the file or folder that it made."""
    from ldm.training import autoencoder, card, clip, judge, lora, recipe, unet

    kinds = {
        "autoencoder": autoencoder.AutoencoderRecipe,
        "clip": clip.CLIPRecipe,
        "unet": unet.UNetRecipe,
        "lora": lora.LoRARecipe,
        "judge": judge.JudgeRecipe,
    }
    table = recipe.read(args.recipe).get(args.stage, {}) if args.recipe else {}
    settings = [*args.set, *([f"data.source={str(Path(args.data).resolve())!r}"] if args.data else [])]
    table = recipe.with_settings(table, settings)
    base = {"unet": _parts, "lora": _whole}.get(args.stage, lambda *_: None)(args, processes, table)
    made = recipe.make(kinds[args.stage], table, str(args.recipe or args.stage))
    if args.shrink is not None:
        made = card.shrunk(made, args.shrink)
    if base:
        {"unet": unet, "lora": lora}[args.stage].train(made, base, args.out, processes, quiet=args.quiet)
    else:
        {"autoencoder": autoencoder, "clip": clip, "judge": judge}[args.stage].train(
            made, args.out, processes, quiet=args.quiet
        )
    return {"judge": args.out / "judge.safetensors", "lora": args.out}.get(args.stage, args.out / "model")


def _whole(args: argparse.Namespace, processes: Any, table: dict[str, Any]) -> Any:
    """The model that a LoRA is of, in whose size pictures are read where the recipe does not say."""
    import os

    import ldm
    from ldm.checkpoint import BUNDLED

    _default(table, "data", {})
    if isinstance(table["data"], dict) and "source" not in table["data"]:
        raise ValueError("a LoRA needs --data DIR: pictures with captions, name.txt beside name.png, or metadata.jsonl")
    whole = ldm.load(args.model or os.environ.get(options.MODEL_VARIABLE) or BUNDLED, device=processes.device)
    _default(table, "data", {"size": whole.unet.config.sample_size * whole.autoencoder.config.downsampling})
    return whole


def _parts(args: argparse.Namespace, processes: Any, table: dict[str, Any]) -> Any:
    """The frozen networks, and for fine-tuning the UNet, whose architecture the recipe then takes."""
    import dataclasses

    import ldm
    from ldm.training import model_folder
    from ldm.training.unet import Base

    if args.model:
        whole = ldm.load(args.model, device=processes.device)
        _default(table, "model", dataclasses.asdict(whole.unet.config))
        _default(table, "schedule", dataclasses.asdict(whole.schedule))
        return Base(tokenizer=whole.tokenizer, text_encoder=whole.text_encoder, autoencoder=whole.autoencoder, unet=whole.unet)
    coder = model_folder.read(Path(args.autoencoder), "autoencoder", device=processes.device)
    encoder = model_folder.read(Path(args.text_encoder), "text_encoder", device=processes.device)
    _default(table, "model", {"context_width": encoder.config.width})
    tokenizer = model_folder.read_tokenizer(Path(args.text_encoder), encoder.config.context_length)
    return Base(tokenizer=tokenizer, text_encoder=encoder, autoencoder=coder)


def _default(table: dict[str, Any], name: str, fields: dict[str, Any]) -> None:
    """Fields of the part `name` of a recipe, wherever it does not say otherwise. What is no table is refused later."""
    given = table.get(name, {})
    table[name] = fields | given if isinstance(given, dict) else given
