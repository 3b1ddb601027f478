"""What the parts of a quick network are told when they are made."""

from dataclasses import dataclass, field

import torch

from ldm.fast.attention import ChosenAttention


@dataclass(frozen=True, kw_only=True)
class Plan:
    """dtype: of weights and arithmetic. winograd: "auto", "all" or "none"; see `convolutions.py`. kernels: whether to use
    our own, Triton's on a GPU and C's on a CPU. attend: attention, (b, h, n, d) each of queries, keys and values.
    merge_tokens: the share of them that self-attention does without; see `token_merging.py`."""

    dtype: torch.dtype
    winograd: str = "auto"
    kernels: bool = True
    attend: ChosenAttention = field(default_factory=ChosenAttention)
    merge_tokens: float = 0.0
