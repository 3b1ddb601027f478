"""Multi-head attention (Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762), used by every network here.

Letters: b batch, n queries, m keys, h heads, d features of one head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V (eq. 1) in one fused kernel: (b, h, n, d), (b, h, m, d), (b, h, m, d) -> (b, h, n, d).

    causal: attend backwards only. mask: or to what is True in it, (b, 1, n, m) or (b, 1, 1, m); not both.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """The same written out, with the (b, h, n, m) scores in memory: what `attention` is tested against."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(diagonal=1)
        scores = scores.masked_fill(future, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ value


class Attention(nn.Module):
    """Attention with its four projections. The context may be the input itself, or another sequence (cross-attention).

    x (b, n, width), context (b, m, context_width) -> (b, n, width).
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = True):
        super().__init__()
        self.heads = heads
        context_width = width if context_width is None else context_width
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(context_width, width, bias=bias)
        self.value = nn.Linear(context_width, width, bias=bias)
        self.output = nn.Linear(width, width)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Both projections of the context, (b, h, m, d) each: all that attention needs to know of it."""
        return self._split(self.key(context)), self._split(self.value(context))

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor] | None = None,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from x to `keys_values`, or to x itself where they are not given. causal, mask: as in `attention`."""
        key, value = self.keys_values(x) if keys_values is None else keys_values
        attended = attention(self._split(self.query(x)), key, value, causal=causal, mask=mask)
        return self.output(rearrange(attended, "b h n d -> b n (h d)"))

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)
