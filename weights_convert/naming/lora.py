"""The layers of UNet and text encoder as LoRA files spell them.

One layer is spelled, in the files in circulation,

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight       kohya, with .alpha beside it
    lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight                 the same in CompVis's names
    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight       diffusers, oldest
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight            diffusers, middle
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight               diffusers, today
    base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight   PEFT

and text encoders alike. Each spelling is made of the tables of `unet.py` and `clip.py`; none is guessed from a name.
"""

import re
from collections.abc import Iterator, Mapping

from weights_convert.architecture import Architecture
from weights_convert.naming import bijection

Layer = tuple[str, str]  # "unet" or "text_encoder", and the native path of the layer
NAMINGS = {"unet": ("diffusers", "compvis"), "text_encoder": ("transformers",)}
KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_text_model_", "lora_te1_text_model_", "lora_te_", "lora_te1_")}
OLDEST = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
ROLE = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.[^.]+)?\.weight"
    r"|\.(?P<alpha>alpha))"
)


def layer_shapes(architectures: Mapping[str, Architecture]) -> Iterator[tuple[Layer, tuple[int, ...]]]:
    """Every layer with a matrix or a kernel, and its weight's shape."""
    for kind, architecture in architectures.items():
        for entry in bijection(architecture, "native"):
            if entry.native.endswith(".weight") and len(entry.shape) in (2, 4) and "_embedding.weight" not in entry.native:
                yield (kind, entry.native.removesuffix(".weight")), entry.shape


def _foreign(architectures: Mapping[str, Architecture]) -> Iterator[tuple[str, str, Layer, tuple[int, ...]]]:
    """(naming, the foreign path, the layer, the foreign weight's shape)."""
    for kind, architecture in architectures.items():
        known = {layer for layer, _ in layer_shapes({kind: architecture})}
        for naming in NAMINGS[kind]:
            for entry in bijection(architecture, naming):
                layer = kind, entry.native.removesuffix(".weight")
                if layer in known and entry.native.endswith(".weight"):
                    yield naming, entry.foreign.removesuffix(".weight"), layer, entry.foreign_shape


def kohya_names(architectures: Mapping[str, Architecture]) -> Iterator[tuple[Layer, str, tuple[int, ...]]]:
    """Every layer with kohya's name for it, and its weight's shape where that name comes from."""
    for naming, path, layer, shape in _foreign(architectures):
        if naming in ("diffusers", "transformers"):
            yield layer, KOHYA[layer[0]][0] + path.replace(".", "_"), shape


def spellings(architectures: Mapping[str, Architecture]) -> Iterator[tuple[str, Layer]]:
    """Every spelling of every layer: kohya's, and the dotted one as `plain` leaves it."""
    for _, path, layer, _ in _foreign(architectures):
        for prefix in KOHYA[layer[0]]:
            yield prefix + path.replace(".", "_"), layer
        yield path, layer


def plain(name: str) -> str:
    """A dotted name without what its tool puts before or into it."""
    for prefix in ("base_model.model.", "unet.", "text_encoder.", "text_model."):
        name = name.removeprefix(prefix)
    if ".processor." in name:
        name = name.replace(".processor.", ".")
        return f"{name}.0" if name.endswith(".to_out") else name
    head, _, last = name.rpartition(".")
    if head.endswith("self_attn") and last.startswith("to_"):  # diffusers' oldest text encoders
        return f"{head}.{OLDEST.get(last, last)}"
    return name
