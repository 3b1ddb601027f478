"""The receipt of a picture: everything that made it, as JSON, and the line of `parameters` that other tools read.

A receipt is a dict of plain values: the task and its fields as given, the seed, the model by name and fingerprint, versions,
hashes of what went in and of the pixels that came out. `ldm.pipelines.replay` makes the picture again from it.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.samplers import all_samplers

FORMAT = 1
# What every receipt has, and what reading relies on; the pipelines check the rest as they check every field.
FIELDS = {
    **dict.fromkeys(("format", "seed", "width", "height"), int),
    **dict.fromkeys(("task", "prompt", "sampler", "tokenizer", "dtype", "device"), str),
    **dict.fromkeys(("model", "versions"), dict),
}
OPTIONAL = {"adapters": list, "verdict": dict}
PROBES = 64  # values looked at in each tensor


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """A short hash of a model's weights: names, shapes, and 64 values of every tensor, evenly spread, rounded to bfloat16.

    It tells checkpoints apart in milliseconds, in whatever layout, and as float64, float32 or bfloat16. (What float16 rounded
    first, bfloat16 does not always round to the same.) It is no proof against somebody who changes the values between.
    """
    digest = hashlib.sha256()
    for kind, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{kind}.{name} {tuple(tensor.shape)}\n".encode())
        probes = torch.cat([_probe(tensor) for _, tensor in sorted(module.state_dict().items())])
        digest.update(probes.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _probe(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(flat.numel() // PROBES, 1)].to(torch.bfloat16)


def versions() -> dict[str, str]:
    """What computes: with another of any of these a picture may come out with other roundings."""
    import ldm

    return {
        "ldm": ldm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def picture_hash(image: Image.Image) -> str:
    """SHA-256 of a picture's size and RGB pixels, whatever file they are in."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width} {rgb.height} ".encode() + rgb.tobytes()).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and values as float32."""
    values = tensor.detach().cpu().float().contiguous()
    return hashlib.sha256(f"{tuple(values.shape)} ".encode() + values.numpy().tobytes()).hexdigest()


def parameters(receipt: Mapping[str, Any]) -> str:
    """The text that AUTOMATIC1111's web interface writes under the key `parameters`, and that galleries read."""
    label = all_samplers()[receipt["sampler"]].SPELLINGS[0]
    fields = {
        "Steps": receipt["steps"],
        "Sampler": label,
        "Schedule type": (receipt["spacing"] or "").capitalize() or None,
        "CFG scale": f"{receipt['guidance_scale']:g}",
        "Seed": receipt["seed"],
        "Size": f"{receipt['width']}x{receipt['height']}",
        "Model hash": receipt["model"]["fingerprint"],
        "Model": " ".join(receipt["model"]["name"].replace(",", " ").split()),
        "Denoising strength": receipt.get("strength"),
        "Eta": receipt["eta"] or None,
        "Version": f"ldm {receipt['versions']['ldm']}",
    }
    negative = f"Negative prompt: {receipt['negative_prompt']}\n" if receipt["negative_prompt"] else ""
    listed = ", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None)
    return f"{receipt['prompt']}\n{negative}{listed}"


def to_json(receipt: Mapping[str, Any]) -> str:
    return json.dumps(receipt, ensure_ascii=True, separators=(",", ":"), sort_keys=True)


def from_json(text: str, where: str) -> dict[str, Any]:
    """The receipt in `text`. Raises ValueError, naming `where`, if it is none of ours."""
    try:
        receipt = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: its receipt is not JSON") from None
    for name, kind in FIELDS.items():
        if not isinstance(receipt, dict) or name not in receipt:
            raise ValueError(f"{where}: its receipt has no {name}; expected one written by ldm")
        if not isinstance(receipt[name], kind):
            raise ValueError(f"{where}: its receipt has {name} {receipt[name]!r:.60}; expected one written by ldm")
    for name, kind in OPTIONAL.items():
        held = receipt.get(name, kind())
        if not isinstance(held, kind) or not all(isinstance(part, dict) for part in held if kind is list):
            raise ValueError(f"{where}: its receipt has {name} {held!r:.60}; expected one written by ldm")
    if receipt["format"] != FORMAT:
        raise ValueError(f"{where}: its receipt has format {receipt['format']!r}; this version reads {FORMAT}")
    return receipt
