"""CLIP's two towers in three namings: native, transformers, and OpenAI's own.

OpenAI fuses the three attention projections into one matrix and multiplies by its last projection from the right.
Stable Diffusion's checkpoints use transformers' names, with one level more or less before them (see `layouts/`).
"""

from weights_convert.architecture import ImageEncoder, SafetyChecker, TextEncoder
from weights_convert.naming.layers import (
    KEY,
    QUERY,
    TRANSPOSED,
    VALUE,
    Layer,
    Line,
    Parameter,
    convolution,
    linear,
    norm,
    tensor,
    under,
)

NAMINGS = ("native", "transformers", "openai")
SAFETY_NAMINGS = ("native", "transformers", "transformers-5")


def text_lines(text: TextEncoder) -> list[Line]:
    """Every layer of the text transformer."""
    tokens, positions = (text.vocabulary_size, text.width), (text.context_length, text.width)
    return [
        *_table("token_embedding.weight", "embeddings.token_embedding.weight", "token_embedding.weight", tokens),
        *_table("position_embedding.weight", "embeddings.position_embedding.weight", "positional_embedding", positions),
        *_layers(text.layers, text.width, text.mlp_width),
        ("final_norm", "final_layer_norm", "ln_final", norm(text.width)),
    ]


def image_lines(image: ImageEncoder) -> list[Line]:
    """Every layer of the image tower and its projection."""
    projection = tensor(image.projection_width, image.width, openai=TRANSPOSED)
    return [
        *under(("", "vision_model", ""), _image_tower(image)),
        ("projection.weight", "visual_projection.weight", "proj", projection),
    ]


def safety_lines(safety: SafetyChecker) -> list[Line]:
    """The image tower and the concepts it is compared with. Up to transformers 4 the tower stood one level deeper."""
    width, concepts, special = safety.projection_width, safety.concepts, safety.special_care_concepts
    tower = [(native, name, name, layer) for native, name, _, layer in _image_tower(safety)]
    projection = tensor(width, safety.width)
    return [
        *under(("image_encoder", "vision_model.vision_model", "vision_model"), tower),
        _alike("image_encoder.projection.weight", "visual_projection.weight", projection),
        _alike("concepts", "concept_embeds", tensor(concepts, width)),
        _alike("concept_thresholds", "concept_embeds_weights", tensor(concepts)),
        _alike("special_care", "special_care_embeds", tensor(special, width)),
        _alike("special_care_thresholds", "special_care_embeds_weights", tensor(special)),
    ]


def _alike(native: str, transformers: str, layer: Layer) -> Line:
    return native, transformers, transformers, layer


def _image_tower(image: ImageEncoder) -> list[Line]:
    """ "pre_layrnorm" is transformers' spelling."""
    patches = convolution(3, image.width, kernel=image.patch_size, bias=False)
    positions = (image.image_size // image.patch_size) ** 2 + 1, image.width
    return [
        ("class_embedding", "embeddings.class_embedding", "class_embedding", tensor(image.width)),
        ("patch_embedding", "embeddings.patch_embedding", "conv1", patches),
        *_table("position_embedding.weight", "embeddings.position_embedding.weight", "positional_embedding", positions),
        ("pre_norm", "pre_layrnorm", "ln_pre", norm(image.width)),
        *_layers(image.layers, image.width, image.mlp_width),
        ("post_norm", "post_layernorm", "ln_post", norm(image.width)),
    ]


def _table(native: str, transformers: str, openai: str, shape: tuple[int, int]) -> list[Line]:
    return [(native, transformers, openai, tensor(*shape))]


def _layers(count: int, width: int, mlp_width: int) -> list[Line]:
    found = []
    for i in range(count):
        prefixes = f"layers.{i}", f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        found += under(prefixes, _transformer_layer(width, mlp_width))
    return found


def _transformer_layer(width: int, mlp_width: int) -> list[Line]:
    return [
        ("norm1", "layer_norm1", "ln_1", norm(width)),
        *_projections(width),
        ("attention.output", "self_attn.out_proj", "attn.out_proj", linear(width, width)),
        ("norm2", "layer_norm2", "ln_2", norm(width)),
        ("mlp.fc1", "mlp.fc1", "mlp.c_fc", linear(width, mlp_width)),
        ("mlp.fc2", "mlp.fc2", "mlp.c_proj", linear(mlp_width, width)),
    ]


def _projections(width: int) -> list[Line]:
    """Query, key and value: six tensors, which OpenAI keeps as thirds of two."""
    found = []
    for native, transformers, third in (("query", "q", QUERY), ("key", "k", KEY), ("value", "v", VALUE)):
        for name, shape in (("weight", (width, width)), ("bias", (width,))):
            names = f"attention.{native}.{name}", f"self_attn.{transformers}_proj.{name}", f"attn.in_proj_{name}"
            layer: Layer = (Parameter("", shape, {"openai": third}),)
            found.append((*names, layer))
    return found
