"""Which words drew which pixels: the cross-attention maps of a run, word by word.

Tang et al. 2023, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", arXiv:2210.04885, section 2.2: how much
every pixel looked at a word, averaged over heads, layers and steps, after the maps of all sizes were brought to one.

    with AttentionMaps(model) as maps:
        result = ldm.txt2img(model, "a red cube on top of a blue sphere", seed=1)
    maps.words("a red cube on top of a blue sphere")   # [("a", (h, w)), ("red", (h, w)), ...]
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.checkpoint import Components
from ldm.models.unet import UNet
from ldm.models.unet_blocks import KeysValues, SpatialTransformer


class AttentionMaps:
    """A context manager that sums up how much pixels look at tokens, in the calls of a model's UNet.

    Of a guided call it is the half with the prompt, of several images the first. The model computes what it does without; the
    probabilities, which fused attention never has in memory, are computed beside it. Raises ValueError for an accelerated
    model, whose UNet has no such parts.
    """

    def __init__(self, components: Components):
        if not isinstance(components.unet, UNet):
            raise ValueError("the model is accelerated, which attention maps cannot look into; leave --fast out")
        self.components = components
        self.calls = 0
        self._layers = [module for module in components.unet.modules() if isinstance(module, SpatialTransformer)]
        self._hooks: list[Any] = []
        self._size = self._whole = torch.Size((0, 0))
        self._total: Tensor | None = None  # (tokens, h, w)
        self._added = 0

    def __enter__(self) -> "AttentionMaps":
        unet = self.components.unet
        self._hooks.append(unet.conv_in.register_forward_hook(self._begin))
        for layer in self._layers:
            self._hooks.append(layer.register_forward_pre_hook(self._note_size))
            self._hooks.append(layer.block.cross_attention.register_forward_pre_hook(self._look))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, module: Any, inputs: tuple, output: Tensor) -> None:
        self.calls += 1
        if self._total is None:
            self._whole = output.shape[-2:]

    def _note_size(self, module: Any, inputs: tuple) -> None:
        self._size = inputs[0].shape[-2:]

    @torch.no_grad()
    def _look(self, module: Any, inputs: tuple[Tensor, KeysValues]) -> None:
        x, (key, _) = inputs
        x = x[len(x) // 2 :][:1] if len(x) > 1 else x  # the halves of guidance: unconditional first
        key = key[len(key) // 2 :][:1] if len(key) > 1 else key
        query = rearrange(module.query(x), "b n (h d) -> b h n d", h=module.heads)
        scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
        looked = rearrange(scores.softmax(dim=-1).mean(dim=1), "b (h w) m -> b m h w", h=self._size[0])
        whole = F.interpolate(looked, size=self._whole, mode="bicubic", align_corners=False).clamp(min=0)[0].cpu()
        self._total = whole if self._total is None else self._total + whole
        self._added += 1

    def tokens(self) -> Tensor:
        """(tokens, h, w): the mean share of its attention that each pixel gave to each token of the (first) prompt."""
        if self._total is None:
            raise ValueError("no attention was seen; make a picture inside the with block")
        return self._total / self._added

    def words(self, prompt: str) -> list[tuple[str, Tensor]]:
        """Each word of the prompt, as written, with the sum of its tokens' maps (h, w); words that did not fit are left out."""
        text, tokens = self.components.tokenizer.tokens(prompt)
        places = {place: token.start for place, token in enumerate(tokens[: self.components.tokenizer.length - 2], start=1)}
        maps, found = self.tokens(), []
        for word in re.finditer(r"\S+", text):
            own = [place for place, start in places.items() if word.start() <= start < word.end()]
            if own:
                found.append((word.group(), maps[own].sum(dim=0)))
        return found
