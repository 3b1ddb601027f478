"""Maps and tokens, one memory and two views; and the norms of a loaded model in another type."""

import torch
from torch import Tensor, nn


def tokens_of(x: Tensor) -> Tensor:
    """A map (b, c, h, w), channels_last, as tokens (b, h w, c): a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(tokens: Tensor, height: int) -> Tensor:
    """Tokens (b, h w, c) as a map (b, c, h, w), channels_last: a view."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def as_many(x: Tensor, count: int) -> Tensor:
    """x (b, ...) repeated to `count` samples, if it has fewer."""
    return x if x.shape[0] == count else x.repeat(count // x.shape[0], *(1,) * (x.ndim - 1))


def same_norm(norm: nn.GroupNorm | nn.LayerNorm, dtype: torch.dtype) -> nn.Module:
    """The same norm in dtype, sharing its weights where they are of that type."""
    with torch.device("meta"):
        if isinstance(norm, nn.GroupNorm):
            made = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps)
        else:
            made = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    made.weight, made.bias = (nn.Parameter(t.detach().to(dtype), requires_grad=False) for t in (norm.weight, norm.bias))
    return made
