"""What is in a file of tensors: which components, in which naming, of which architecture. Seen from names and shapes alone."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from math import isqrt

from weights_convert.architecture import (
    Architecture,
    Autoencoder,
    ImageEncoder,
    SafetyChecker,
    TextEncoder,
    UNet,
    from_json,
    to_json,
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """A component that a file holds: every name that starts with `prefix`, and with no longer prefix, is its own."""

    kind: str
    naming: str
    prefix: str


# Two tensors of each kind and naming: the component is there if either is, so that a file that lost one is told which.
PROBES = {
    ("unet", "compvis"): ("input_blocks.0.0.weight", "time_embed.0.weight"),
    ("unet", "diffusers"): ("down_blocks.0.resnets.0.time_emb_proj.weight", "mid_block.resnets.0.time_emb_proj.weight"),
    ("autoencoder", "compvis"): ("encoder.down.0.block.0.norm1.weight", "decoder.mid.attn_1.q.weight"),
    ("autoencoder", "diffusers"): (
        "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.mid_block.attentions.0.to_q.weight",
    ),
    ("autoencoder", "diffusers-old"): (
        "encoder.mid_block.attentions.0.query.weight",
        "decoder.mid_block.attentions.0.query.weight",
    ),
    ("text_encoder", "transformers"): ("embeddings.token_embedding.weight", "final_layer_norm.weight"),
    ("text_encoder", "openai"): ("token_embedding.weight", "ln_final.weight"),
    ("safety", "transformers"): (
        "vision_model.vision_model.embeddings.class_embedding",
        "vision_model.vision_model.post_layernorm.weight",
    ),
    ("safety", "transformers-5"): ("concept_embeds", "special_care_embeds"),
    ("image_encoder", "openai"): ("conv1.weight", "ln_pre.weight"),
    ("image_encoder", "transformers"): (
        "vision_model.embeddings.class_embedding",
        "vision_model.post_layernorm.weight",
    ),
}
# What may stand before a component's names, longest first; nothing stands before those not listed.
PREFIXES = {
    ("unet", "compvis"): ("model.diffusion_model.", ""),
    ("autoencoder", "compvis"): ("first_stage_model.", ""),
    ("text_encoder", "transformers"): (
        "cond_stage_model.transformer.text_model.",
        "cond_stage_model.transformer.",
        "text_model.",
        "",
    ),
    ("image_encoder", "openai"): ("visual.", ""),
}

# Names that tell another model, for a refusal that says what the file is.
OTHER_MODELS = (
    ("cond_stage_model.model.", "Stable Diffusion 2"),
    ("conditioner.embedders.", "SDXL"),
    ("text_encoders.", "Stable Diffusion 3 or later"),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "FLUX"),
    ("model.diffusion_model.double_blocks.", "FLUX"),
    ("control_model.", "ControlNet"),
    ("lora_unet_", "a LoRA"),
    ("lora_te_", "a LoRA"),
    ("unet.down_blocks.", "a LoRA"),
    ("transformer_blocks.", "a diffusion transformer"),
)


def components(names: Iterable[str]) -> list[Found]:
    """The components whose names are among `names`, one of a kind."""
    names, found = set(names), {}
    for (kind, naming), probes in PROBES.items():
        for prefix in PREFIXES.get((kind, naming), ("",)):
            if kind not in found and any(prefix + probe in names for probe in probes):
                found[kind] = Found(kind, naming, prefix)
    if "safety" in found:
        found.pop("image_encoder", None)  # it is the safety checker's own
    return list(found.values())


def other_model(names: Iterable[str]) -> str | None:
    """What else a file is, where its names tell."""
    return next((model for name in names for start, model in OTHER_MODELS if name.startswith(start)), None)


def infer(found: Found, shapes: Shapes) -> Architecture | None:
    """The architecture of a component from its tensors' shapes (names without the prefix); None if it cannot be told."""
    try:
        architecture = INFERENCES[found.kind, found.naming](shapes)
        return from_json(type(architecture), to_json(architecture), "inferred")
    except (LookupError, ValueError, ArithmeticError, StopIteration):
        return None


def _indices(shapes: Shapes, template: str) -> Iterator[int]:
    """0, 1, 2, ... as long as the name with that number put in is there."""
    for i in count():
        if template.format(i) not in shapes:
            return
        yield i


def _unet_diffusers(shapes: Shapes) -> UNet:
    levels = list(_indices(shapes, "down_blocks.{}.resnets.0.conv1.weight"))
    attention = tuple(f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in levels)
    keys = next(shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return UNet(
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        level_widths=tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels),
        attention_levels=attention,
        residual_blocks=len(list(_indices(shapes, "down_blocks.0.resnets.{}.conv1.weight"))),
        context_width=keys[1],
    )


def _unet_compvis(shapes: Shapes) -> UNet:
    """CompVis numbers blocks through all levels; a strided convolution ends each level but the last."""
    widths, attention, blocks, started = [], [], 0, False
    for i in count(1):
        if f"input_blocks.{i}.0.in_layers.2.weight" in shapes:
            if not started:
                widths.append(shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0])
                attention.append(f"input_blocks.{i}.1.norm.weight" in shapes)
            blocks, started = blocks + (len(widths) == 1), True
        elif f"input_blocks.{i}.0.op.weight" in shapes:
            started = False
        else:
            break
    keys = next(shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return UNet(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        level_widths=tuple(widths),
        attention_levels=tuple(attention),
        residual_blocks=blocks,
        context_width=keys[1],
    )


def _autoencoder(shapes: Shapes, level: str, block: str) -> Autoencoder:
    levels = list(_indices(shapes, level))
    return Autoencoder(
        image_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=shapes["decoder.conv_in.weight"][1],
        level_widths=tuple(shapes[level.format(i)][0] for i in levels),
        residual_blocks=len(list(_indices(shapes, block))),
    )


def _autoencoder_compvis(shapes: Shapes) -> Autoencoder:
    return _autoencoder(shapes, "encoder.down.{}.block.0.conv1.weight", "encoder.down.0.block.{}.conv1.weight")


def _autoencoder_diffusers(shapes: Shapes) -> Autoencoder:
    return _autoencoder(
        shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight", "encoder.down_blocks.0.resnets.{}.conv1.weight"
    )


def _text(shapes: Shapes, tokens: str, positions: str, layer: str, mlp: str) -> TextEncoder:
    vocabulary, width = shapes[tokens]
    return TextEncoder(
        vocabulary_size=vocabulary,
        context_length=shapes[positions][0],
        width=width,
        layers=len(list(_indices(shapes, layer))),
        heads=max(1, width // 64),
        mlp_width=shapes[mlp][0],
    )


def _text_transformers(shapes: Shapes) -> TextEncoder:
    return _text(
        shapes,
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.{}.layer_norm1.weight",
        "encoder.layers.0.mlp.fc1.weight",
    )


def _text_openai(shapes: Shapes) -> TextEncoder:
    return _text(
        shapes,
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.{}.ln_1.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    )


def _image(shapes: Shapes, patch: str, positions: str, layer: str, mlp: str, projection_width: int) -> dict:
    width, _, patch_size, _ = shapes[patch]
    side = isqrt(shapes[positions][0] - 1)
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "width": width,
        "layers": len(list(_indices(shapes, layer))),
        "heads": max(1, width // 64),
        "mlp_width": shapes[mlp][0],
        "projection_width": projection_width,
    }


def _image_transformers(shapes: Shapes, tower: str = "vision_model") -> dict:
    return _image(
        shapes,
        f"{tower}.embeddings.patch_embedding.weight",
        f"{tower}.embeddings.position_embedding.weight",
        tower + ".encoder.layers.{}.layer_norm1.weight",
        f"{tower}.encoder.layers.0.mlp.fc1.weight",
        shapes["visual_projection.weight"][0],
    )


def _image_openai(shapes: Shapes) -> ImageEncoder:
    layer, mlp = "transformer.resblocks.{}.ln_1.weight", "transformer.resblocks.0.mlp.c_fc.weight"
    return ImageEncoder(**_image(shapes, "conv1.weight", "positional_embedding", layer, mlp, shapes["proj"][1]))


def _safety(shapes: Shapes, tower: str) -> SafetyChecker:
    return SafetyChecker(
        **_image_transformers(shapes, tower),
        concepts=shapes["concept_embeds"][0],
        special_care_concepts=shapes["special_care_embeds"][0],
    )


INFERENCES: Mapping[tuple[str, str], Callable[[Shapes], Architecture]] = {
    ("unet", "diffusers"): _unet_diffusers,
    ("unet", "compvis"): _unet_compvis,
    ("autoencoder", "compvis"): _autoencoder_compvis,
    ("autoencoder", "diffusers"): _autoencoder_diffusers,
    ("autoencoder", "diffusers-old"): _autoencoder_diffusers,
    ("text_encoder", "transformers"): _text_transformers,
    ("text_encoder", "openai"): _text_openai,
    ("image_encoder", "transformers"): lambda shapes: ImageEncoder(**_image_transformers(shapes)),
    ("image_encoder", "openai"): _image_openai,
    ("safety", "transformers"): lambda shapes: _safety(shapes, "vision_model.vision_model"),
    ("safety", "transformers-5"): lambda shapes: _safety(shapes, "vision_model"),
}
