"""LoRAs of seeded random factors, and files of them in every spelling that is in circulation."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import seeded

ALPHA, RANK = 3.0, 4
UNET = "down_blocks.0.attentions.0.transformer_blocks.0"
# diffusers' or transformers' path, our own, and the weight's shape in the tiny model.
LAYERS = {
    f"{UNET}.attn1.to_q": ("unet", "down.0.attention.block.self_attention.query", (16, 16)),
    f"{UNET}.attn1.to_out.0": ("unet", "down.0.attention.block.self_attention.output", (16, 16)),
    f"{UNET}.attn2.to_k": ("unet", "down.0.attention.block.cross_attention.key", (16, 32)),
    "text_model.encoder.layers.1.self_attn.q_proj": ("text_encoder", "layers.1.attention.query", (32, 32)),
    "text_model.encoder.layers.0.self_attn.out_proj": ("text_encoder", "layers.0.attention.output", (32, 32)),
}
# Layers that only kohya's and LyCORIS' files, and PEFT's, have: (path, kind, own path, weight's shape).
CONVOLUTIONS = {
    "down_blocks.0.resnets.0.conv1": ("unet", "down.0.residual.conv1", (16, 16, 3, 3)),
    "down_blocks.0.downsamplers.0.conv": ("unet", "down.2.downsample", (16, 16, 3, 3)),
    "down_blocks.1.resnets.0.conv_shortcut": ("unet", "down.3.residual.shortcut", (32, 16, 1, 1)),
    "down_blocks.1.resnets.0.time_emb_proj": ("unet", "down.3.residual.time_projection", (32, 64)),
    "mid_block.attentions.0.proj_in": ("unet", "middle.attention.proj_in", (48, 48, 1, 1)),
    "conv_in": ("unet", "conv_in", (16, 4, 3, 3)),
}


def factors(path: str, shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """down (r, in, ...) and up (out, r, ...)."""
    ones = (1, 1) if len(shape) == 4 else ()
    down = seeded.tensor(f"{path} down", RANK, *shape[1:], seed=seed) / shape[1] ** 0.5
    return down, seeded.tensor(f"{path} up", shape[0], RANK, *ones, seed=seed) / 2


def kohya(path: Path, layers=None, seed: int = 0, alpha: float | None = ALPHA, **extra) -> Path:
    tensors = dict(extra)
    for name, (kind, _, shape) in (layers or LAYERS).items():
        stem = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[kind] + name.replace(".", "_")
        down, up = factors(name, shape, seed)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def dotted(path: Path, spell, metadata=None, prefixes=("unet.", "text_encoder."), with_alpha=False) -> Path:
    """Files whose names have dots; `spell` gives (down's, up's) name of a path with its prefix."""
    tensors = {}
    for name, (kind, _, shape) in LAYERS.items():
        down, up = spell(prefixes[kind != "unet"] + name)
        tensors[down], tensors[up] = factors(name, shape)
        if with_alpha:
            tensors[f"{prefixes[kind != 'unet']}{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path, metadata=metadata)
    return path


def peft_style(name):
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def middle_style(name):
    part = "lora_linear_layer" if name.startswith("text") else "lora"
    return f"{name}.{part}.down.weight", f"{name}.{part}.up.weight"


def oldest_style(name):
    """The attention processors of the UNet; text encoders had lora_linear_layer already."""
    if name.startswith("text"):
        return middle_style(name)
    head, _, last = name.removesuffix(".0").rpartition(".")
    return tuple(f"{head}.processor.{last}_lora.{role}.weight" for role in ("down", "up"))


def alpha_metadata() -> dict[str, str]:
    stated = {
        f"{kind}.{field}": value for kind in ("unet", "text_encoder") for field, value in (("lora_alpha", ALPHA), ("r", RANK))
    }
    return {"format": "pt", "lora_adapter_metadata": json.dumps(stated)}


def peft_folder(path: Path, kind: str) -> Path:
    """One component's, as PEFT writes it."""
    path.mkdir()
    tensors = {}
    for name, (of, _, shape) in LAYERS.items():
        if of == kind:
            down, up = peft_style(f"base_model.model.{name}")
            tensors[down], tensors[up] = factors(name, shape)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 1.0,
        "alpha_pattern": {"to_q": ALPHA, "to_out.0": ALPHA, "to_k": ALPHA},
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def spelled(folder: Path) -> dict[str, Path]:
    """The same LoRA in every spelling of a whole model."""
    metadata = alpha_metadata()
    bare = lambda spell: lambda name: spell(name.removeprefix("unet."))  # noqa: E731
    return {
        "kohya": kohya(folder / "kohya.safetensors"),
        "diffusers today": dotted(folder / "today.safetensors", peft_style, metadata),
        "diffusers today, with the adapter's name": dotted(
            folder / "named.safetensors", lambda n: (f"{n}.lora_A.default.weight", f"{n}.lora_B.default.weight"), metadata
        ),
        "diffusers, middle": dotted(folder / "middle.safetensors", middle_style, with_alpha=True),
        "diffusers, oldest": dotted(folder / "oldest.safetensors", oldest_style, metadata),
        "diffusers, oldest, bare": dotted(folder / "bare.safetensors", bare(oldest_style), metadata),
    }
