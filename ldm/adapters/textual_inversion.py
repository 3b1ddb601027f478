"""Textual inversion: words whose vectors were learned from a few pictures, put beside a text encoder's own.

Gal et al. 2022, "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion",
arXiv:2208.01618. A prompt's placeholder becomes one token for each of its vectors; the token embedding looks those up in rows
of their own, after the model's. Everything else of the model stays, and is shared with the model given.

    toy = weights_convert.embedding.read_embedding("learned_embeds.bin")
    components = attach(components, [toy])            # "a photo of <cat-toy>"
    components = attach(components, [(toy, "toy")])   # "a photo of toy"
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.adapters.lora import shallow_copy
from ldm.checkpoint import Components
from ldm.models.clip import TextEncoder
from weights_convert import CheckpointError
from weights_convert.embedding import Embedding

MADE_FOR = {768: "Stable Diffusion v1", 1024: "Stable Diffusion v2", 1280: "SDXL", 2048: "SDXL"}  # by the width of the vectors


class ExtendedEmbedding(nn.Embedding):
    """A token embedding with further rows: ids (b, n) -> vectors (b, n, d). Ids from `num_embeddings` on are of `added` (m, d).

    `weight` is the given embedding's own, and all that a state dict holds: so the model is saved, loaded, and known by its
    fingerprint as it is without the rows. What must tell pictures made with them apart records the files' SHA-256.
    """

    def __init__(self, base: nn.Embedding, added: Tensor):
        super().__init__(base.num_embeddings, base.embedding_dim, _weight=base.weight)
        self.weight = base.weight
        self.register_buffer("added", added.to(base.weight), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        further = ids - self.num_embeddings
        own = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight)
        return torch.where(further[..., None] < 0, own, F.embedding(further.clamp(min=0), self.added))


def attach(components: Components, embeddings: Sequence[Embedding | tuple[Embedding, str | None]]) -> Components:
    """A model that knows these embeddings; the one given stays as it is, and shares its weights with the new one.

    embeddings: each alone, or with the placeholder that is to stand for it in prompts. Without one that is its `name`: the key
    in a file of diffusers', the name of a file of AUTOMATIC1111's or kohya's. See `Tokenizer.with_placeholders` for how prompts
    are searched. Since weights are shared, moving either model to another device or dtype moves both.
    Raises CheckpointError for vectors of another width, ValueError for a placeholder that is taken or cannot be one.
    """
    table = components.text_encoder.token_embedding
    rows = [table.added] if isinstance(table, ExtendedEmbedding) else []
    free = table.num_embeddings + sum(map(len, rows))
    ids: dict[str, range] = {}
    told = []
    for given in embeddings:
        embedding, placeholder = given if isinstance(given, tuple) else (given, None)
        placeholder = embedding.name if placeholder is None else placeholder
        _check_width(embedding, table.embedding_dim)
        if placeholder in ids:
            raise ValueError(f"{embedding.path}: placeholder {placeholder!r} is taken; give one of the two another name")
        count = len(embedding.vectors)
        ids[placeholder] = range(free, free + count)
        free += count
        rows.append(embedding.vectors.to(table.weight))
        told.append({"kind": "embedding", "placeholder": placeholder, "sha256": embedding.sha256})
    if not ids:
        return components
    tokenizer = components.tokenizer.with_placeholders(ids)
    encoder = _with_embedding(components.text_encoder, ExtendedEmbedding(table, torch.cat(rows)))
    adapters = (*components.adapters, *told)
    return dataclasses.replace(components, tokenizer=tokenizer, text_encoder=encoder, adapters=adapters)


def _with_embedding(encoder: TextEncoder, embedding: nn.Embedding) -> TextEncoder:
    """A shallow copy with another token embedding. Its containers are its own: a hook on the copy is none on the encoder."""
    made = shallow_copy(encoder)
    made.token_embedding = embedding.train(encoder.training)
    return made


def _check_width(embedding: Embedding, expected: int) -> None:
    found = embedding.vectors.shape[1]
    if found == expected:
        return
    made_for = f"it was made for {MADE_FOR.get(found, 'another model')}; use one made for this model"
    raise CheckpointError(f"{embedding.path}: its vectors are {found} wide, the text encoder's {expected}; {made_for}")
