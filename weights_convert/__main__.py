"""`python -m weights_convert SRC DST --to LAYOUT`: one checkpoint layout into another."""

import argparse
import sys

from weights_convert.component import FLOATS
from weights_convert.convert import LAYOUTS, read, write
from weights_convert.errors import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weights_convert", description="Convert a Stable Diffusion v1 checkpoint from any layout to another."
    )
    parser.add_argument("source", metavar="SRC", help="a .ckpt, .safetensors or .bin file, or a native or diffusers folder")
    parser.add_argument("target", metavar="DST", help="the file or folder to make; must not exist yet")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="compvis makes one file, .safetensors or .ckpt")
    parser.add_argument("--dtype", choices=FLOATS, help="precision of the weights; default: as they are")
    parser.add_argument("--weights", default="auto", choices=("auto", "ema", "raw"), help="default: EMA where there is")
    parser.add_argument("--variant", default="auto", help="fp16 for the half-precision files of a diffusers folder")
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help="a tensor to leave out; may end in *")
    options = parser.parse_args(arguments)
    try:
        checkpoint = read(options.source, weights=options.weights, variant=options.variant, ignore=options.ignore)
        left_out = write(checkpoint, options.target, options.to, options.dtype)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: interrupted; {options.target} was not written", file=sys.stderr)
        return 130
    for kind, component in checkpoint.components.items():
        print(f"{kind}: {len(component.tensors)} tensors, {component.naming} names, from {component.source}")
    for what in left_out:
        print(f"left out: {what}")
    print(f"wrote {options.target} ({options.to})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
