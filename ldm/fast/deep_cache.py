"""The deep part of the UNet computed at some steps only, an approximation: Ma et al. 2023, "DeepCache: Accelerating Diffusion
Models for Free", arXiv:2312.00858.

From step to step what the lower levels make of a picture changes less than its details. So every few calls the whole network is
computed; at the calls between, the last DEPTH blocks are given again what they were given then, and with them only the blocks
whose results they look at are computed anew.
"""

from itertools import chain

import torch
from torch import Tensor, nn

from ldm.fast.unet import Block, FastUNet
from ldm.models.unet_blocks import KeysValues

DEPTH = 2  # blocks of the way up that are computed at every call


class CachedUNet(nn.Module):
    """A `FastUNet`, with the same seams, whose deep part is computed at each `every`-th call of a run.

    A run has one list of contexts, as `project_context` returned it: another list is another run.
    """

    def __init__(self, unet: FastUNet, every: int, depth: int = DEPTH):
        super().__init__()
        self.unet, self.config, self.conv_in, self.every, self.depth = unet, unet.config, unet.conv_in, every, depth
        self.contexts: list[KeysValues] | None = None
        self.calls, self.features = 0, torch.empty(0)
        self.shape: torch.Size | None = None

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        return self.denoise(x, self.embed_time(t), self.project_context(context))

    def embed_time(self, t: Tensor | float) -> list[Tensor]:
        return self.unet.embed_time(t)

    def project_context(self, context: Tensor) -> list[KeysValues]:
        return self.unet.project_context(context)

    def denoise(self, x: Tensor, times: list[Tensor], contexts: list[KeysValues]) -> Tensor:
        same_run = self.contexts is contexts and self.shape == x.shape
        self.calls = self.calls + 1 if same_run else 0
        self.contexts, self.shape = contexts, x.shape
        unet, count = self.unet, len(contexts[0][0])
        deep, last = unet.up[: -self.depth], unet.up[-self.depth :]
        if self.calls % self.every == 0:
            each = iter(times), iter(contexts)
            skips = unet.descend(x, unet.down, *each)
            self.features = unet.ascend(unet.middle(skips[-1], *each), deep, skips, count, *each)
        else:
            first = unet.down[: self.depth - 1]
            each = self._of_the_rest(times, first, last, "residual"), self._of_the_rest(contexts, first, last, "attention")
            skips = unet.descend(x, first, *each)
        return unet.conv_out(unet.ascend(self.features, last, skips, count, *each))

    def _of_the_rest(self, given: list, first: nn.ModuleList, last: nn.ModuleList, kind: str):
        """Those of the times or contexts that the first and last blocks take."""
        before, behind = (sum(_has(block, kind) for block in blocks) for blocks in (first, last))
        return chain(given[:before], given[len(given) - behind :])


def _has(block: Block, kind: str) -> bool:
    return getattr(block, kind) is not None
