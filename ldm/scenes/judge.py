"""The judge: a small convolutional classifier that says what a picture of a scene shows.

Pictures (b, 3, 64, 64) in [-1, 1] -> which layout, and for each of its places, in order, which colour and which shape. It is
trained on renders alone and shares nothing with the models that it judges. Its own accuracy bounds what it can measure.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.scenes.world import COLOURS, LAYOUTS, SHAPES, Noun, Scene

SIZE = 64  # pixels of a side; other pictures are resized
MOST = max(map(len, LAYOUTS.values()))  # solids in a scene
NOTHING = -100  # the label of a place that a layout does not have; cross-entropy ignores it


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Channels of the three levels, each half the resolution of the one before, features of the last hidden layer, and the
    share of them that training drops."""

    widths: tuple[int, ...] = (48, 96, 160)
    hidden: int = 384
    norm_groups: int = 8
    dropout: float = 0.3


class Block(nn.Module):
    """Residual block: (b, in, h, w) -> (b, out, h / 2, w / 2)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.down = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Pictures (b, 3, h, w) in [-1, 1] -> logits of layouts (b, 11), colours (b, 3, 8) and shapes (b, 3, 4).

    kept: (b, hidden), in training: 0 for what is dropped out, and what the rest is multiplied by.
    """

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        channels = (3, *config.widths)
        self.blocks = nn.ModuleList(Block(channels[i], channels[i + 1], config.norm_groups) for i in range(len(config.widths)))
        self.norm = nn.GroupNorm(config.norm_groups, channels[-1])
        self.squeeze = nn.Conv2d(channels[-1], 32, 1)
        side = SIZE // 2 ** len(config.widths)
        self.hidden = nn.Linear(32 * side**2, config.hidden)
        self.sizes = (len(LAYOUTS), MOST * len(COLOURS), MOST * len(SHAPES))
        self.heads = nn.Linear(config.hidden, sum(self.sizes))

    def forward(self, pictures: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x = pictures
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        for block in self.blocks:
            x = block(x)
        x = self.squeeze(F.silu(self.norm(x)))
        x = F.silu(self.hidden(x.flatten(1)))
        x = self.heads(x if kept is None else x * kept)
        layouts, colours, shapes = x.float().split(self.sizes, dim=1)
        return layouts, colours.unflatten(1, (MOST, -1)), shapes.unflatten(1, (MOST, -1))


def load(path: str | Path) -> Judge:
    """The judge in a file of its weights, float32. Raises ValueError, one line, where it holds no judge."""
    try:
        tensors = load_file(path)
        model = Judge()
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: holds no judge that can be read ({reason}); ldm train judge makes one") from None
    return model.eval()


def labels(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """What the judge should say: layouts (b,), colours (b, 3), shapes (b, 3)."""
    layouts = torch.tensor([list(LAYOUTS).index(scene.layout) for scene in scenes])
    colours = torch.full((len(scenes), MOST), NOTHING)
    shapes = torch.full((len(scenes), MOST), NOTHING)
    for i, scene in enumerate(scenes):
        for k, solid in enumerate(scene.solids):
            colours[i, k] = list(COLOURS).index(solid.colour)
            shapes[i, k] = list(SHAPES).index(solid.shape)
    return layouts, colours, shapes


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor) -> list[tuple[str, tuple[Noun, ...]]]:
    """What each picture shows: its layout, and colour and shape of the solid in each place (sizes are not judged)."""
    found = []
    for part in pictures.split(256):
        best = (logits.argmax(-1).tolist() for logits in judge(part))
        for layout, colours, shapes in zip(*best, strict=True):
            name = list(LAYOUTS)[layout]
            places = zip(colours, shapes, strict=True)
            nouns = tuple((None, list(COLOURS)[colour], list(SHAPES)[shape]) for colour, shape in places)
            found.append((name, nouns[: len(LAYOUTS[name])]))
    return found
