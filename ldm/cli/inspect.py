"""`ldm inspect FILE ...`: what a picture, a checkpoint or a trace tells of itself.

A picture by its receipt, the text of other tools, and the watermark; checkpoints and traces in `inspect_files.py`.
"""

import argparse
from pathlib import Path
from typing import Any

SHOWN = ("prompt", "negative_prompt", "task", "seed", "steps", "sampler", "spacing", "guidance_scale", "strength", "convention")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
QUIET = (None, "", [], (), {})  # values that say nothing


def add(commands: Any) -> None:
    text = "what a picture, a checkpoint or a trace tells of itself"
    about = (
        "Of a picture its receipt, or the parameters that other tools wrote, and the invisible watermark. Of a checkpoint, "
        "file or folder: layout, naming, precision, hashes, a pickle's instructions (none is run), names missing or too "
        "many, NaN and the range of the numbers; exit status 3 where something is wrong. Of a trace: its tensors."
    )
    command = commands.add_parser("inspect", help=text, allow_abbrev=False, description=about)
    command.add_argument("files", nargs="+", metavar="FILE", help="PNG, JPEG or WebP; .safetensors, .ckpt, .bin; a folder")
    command.add_argument("--json", action="store_true", help="one JSON object a line, with all there is")
    command.add_argument("--no-values", action="store_true", help="of checkpoints: do not read the numbers")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    import json

    from ldm.cli import inspect_files

    wrong = False
    for number, path in enumerate(map(Path, args.files)):
        if is_picture(path):
            found, lines = look(path), _lines
        elif inspect_files.is_trace(path):
            found, lines = inspect_files.trace(path), inspect_files.trace_lines
        else:
            found, lines = inspect_files.checkpoint(path, values=not args.no_values), inspect_files.checkpoint_lines
            wrong = wrong or found["wrong"]
        if args.json:
            print(json.dumps(found, sort_keys=True))
            continue
        if number:
            print()
        print("\n".join(lines(found)))
    return 3 if wrong else 0


def is_picture(path: Path) -> bool:
    """By its first bytes, or, of what nobody else knows either, by its name."""
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return path.suffix.lower() in PICTURES
    return start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")) or start[8:12] == b"WEBP" or path.suffix.lower() in PICTURES


def look(path: Path) -> dict[str, Any]:
    """What is in the file, as plain values. Raises ValueError where it is no picture, or its receipt is damaged."""
    from ldm import images
    from ldm.output import files, receipt

    picture = images.read(path)
    found: dict[str, Any] = {"file": str(path), "size": list(picture.size), "watermark": _watermark(picture)}
    texts = files.texts(path)
    if files.KEY in texts:
        found["receipt"] = receipt.from_json(texts[files.KEY], str(path))
        if "pixels_sha256" in found["receipt"]:
            found["pixels_as_made"] = receipt.picture_hash(picture) == found["receipt"]["pixels_sha256"]
    elif "parameters" in texts:
        found["parameters"] = texts["parameters"]
    return found


def _watermark(picture: Any) -> bool | None:
    """None where nobody can look."""
    from ldm.output import watermark

    try:
        return watermark.is_marked(picture)
    except ImportError:
        return None


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['file']}: {found['size'][0]} x {found['size'][1]}"]
    receipt = found.get("receipt")
    if receipt:
        told = {name.replace("_", " "): receipt.get(name) for name in SHOWN}
        model = receipt["model"]
        told["model"] = f"{model.get('name')} ({model.get('fingerprint')}), {receipt['dtype']} on {receipt['device']}"
        adapters = receipt.get("adapters", ())
        told["LoRA"] = [f"{a.get('name')} at {a.get('coefficient')}" for a in adapters if a.get("kind") == "lora"]
        told["embedding"] = [str(a.get("placeholder")) for a in adapters if a.get("kind") == "embedding"]
        told["safety"] = _safety(receipt.get("verdict"), receipt.get("safety"))
        told["cut off"] = receipt.get("cut_off")
        told["made by"] = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
        lines += [f"  {name}: {', '.join(v) if isinstance(v, list) else v}" for name, v in told.items() if v not in QUIET]
        if "pixels_as_made" in found:
            lines.append(f"  pixels: {'as they were made' if found['pixels_as_made'] else 'NOT those of the receipt'}")
    elif "parameters" in found:
        lines += ["  no receipt; parameters:", *(f"    {line}" for line in found["parameters"].splitlines())]
    else:
        lines.append("  no receipt, no parameters")
    says = {True: "StableDiffusionV1", False: "none", None: "not looked for; pip install 'ldm[watermark]'"}
    return [*lines, f"  watermark: {says[found['watermark']]}"]


def _safety(verdict: dict[str, Any] | None, action: str | None) -> str | None:
    if verdict is None:
        return None
    margins = ", ".join(f"{i}: {margin}" for i, margin in enumerate(verdict.get("margins", ())))
    said = f"flagged for concepts {verdict.get('concepts')}; action: {action}" if verdict.get("flagged") else "passed"
    return f"{said}; margins over the thresholds, by concept: {margins}"
