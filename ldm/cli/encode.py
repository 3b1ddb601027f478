"""`ldm encode`: pictures with captions -> shards of latents and of states, to train a UNet or a LoRA on."""

import argparse
import os
from pathlib import Path
from typing import Any

from ldm.cli import options, sharing


def add(commands: Any) -> None:
    command = commands.add_parser(
        "encode",
        help="encode pictures and captions ahead of training, into shards",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Encode pictures and captions ahead of training, into shards that `ldm train unet --data DIR` reads.\n\n"
        "Run alone, or on many processes: torchrun --nproc_per_node N -m ldm encode ...\n"
        "What was stopped goes on where it was when the same command is given again. Samples that are not kept are counted.",
    )
    command.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a folder of pictures with captions, or shards: a folder of them, 'a/{000..099}.tar', or a .txt or .json list",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write shards to")
    command.add_argument(
        "--model",
        metavar="MODEL",
        help=f"whose autoencoder and text encoder (default: ${options.MODEL_VARIABLE}, or else bundled)",
    )
    command.add_argument("--size", type=int, metavar="PIXELS", help="of the pictures (default: the model's; 512 of SD v1)")
    command.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default 1000")
    command.add_argument("--limit", type=int, metavar="N", help="at most so many samples (default: all)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="which samples: filter.min_side=512, filter.aesthetic_above=5, filter.watermark_below=0.5, filter.unreadable=drop",
    )
    command.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import ldm
    from ldm.checkpoint import BUNDLED
    from ldm.processes import joined
    from ldm.training import recipe
    from ldm.training.data import DataConfig
    from ldm.training.encode import encode

    given = {"source": args.data, "size": args.size, "limit": args.limit}
    table = recipe.with_settings({name: value for name, value in given.items() if value is not None}, args.set)
    recipe.make(DataConfig, table, "encode")  # before a model is loaded
    with joined(args.device) as processes, sharing.one_voice(processes):
        source = args.model or os.environ.get(options.MODEL_VARIABLE) or BUNDLED
        base = ldm.load(source, device=processes.device, safety=False)
        size = base.unet.config.sample_size * base.autoencoder.config.downsampling
        config = recipe.make(DataConfig, {"size": size, **table}, "encode")
        drops = encode(config, base, args.out, processes, samples_per_shard=args.samples_per_shard, quiet=args.quiet)
        if processes.leads:
            print(f"{args.out}: {drops.summary()}")
