"""diffusers' and transformers' modules with a model's own weights, to be measured beside ours."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ldm.checkpoint import Components
from weights_convert.architecture import COMPONENTS
from weights_convert.layouts import diffusers_config
from weights_convert.naming import to_foreign

NAMINGS = {"unet": "diffusers", "autoencoder": "diffusers", "text_encoder": "transformers"}


def builder(load: Callable[[torch.dtype], Components]) -> Callable[[torch.dtype], dict[str, nn.Module]] | None:
    """What builds them in a type, from what loads ours in that type; None where diffusers is not installed."""
    try:
        import diffusers
        import transformers
    except ImportError:
        return None

    def text_encoder(config: dict[str, Any]) -> nn.Module:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))

    classes = {
        "unet": diffusers.UNet2DConditionModel.from_config,
        "autoencoder": diffusers.AutoencoderKL.from_config,
        "text_encoder": text_encoder,
    }
    return lambda dtype: {kind: _module(kind, getattr(load(dtype), kind), build) for kind, build in classes.items()}


def _module(kind: str, ours: nn.Module, build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """A module of theirs that shares the weights of ours wherever they are arranged alike."""
    architecture = COMPONENTS[kind](**dataclasses.asdict(ours.config))
    with torch.device("meta"):
        module = build(diffusers_config.CONFIGS[kind](architecture)).eval()
    wanted = set(module.state_dict())
    tensors = to_foreign(architecture, NAMINGS[kind], ours.state_dict())
    prefix = "" if set(tensors) <= wanted else "text_model."
    module.load_state_dict({prefix + name: tensor for name, tensor in tensors.items()}, assign=True, strict=True)
    for name, buffer in module.named_buffers():  # counted positions, which no checkpoint holds
        if buffer.is_meta:
            parent, _, last = name.rpartition(".")
            length = torch.arange(buffer.shape[-1], device=next(ours.parameters()).device)
            module.get_submodule(parent).register_buffer(last, length.expand(buffer.shape), persistent=False)
    return module
