"""Inception v3 as the Frechet inception distance is defined with it: pictures (b, 3, h, w), 0 to 255 -> features (b, 2048).

Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", arXiv:1512.00567, table 1 and figures 5 to 7,
as in the TensorFlow graph of 2015-12-05 that Heusel et al. 2017 (arXiv:1706.08500) took. It departs from the published one:
average pools do not count the padding, the last block pools by maximum, and pixels become (p - 128) / 128.

Layers are called what the files of these weights call them: pytorch-fid's pt_inception-2015-12-05-6726825d.pth and
torch-fidelity's weights-inception-2015-12-05-6726825d.pth. Those files were not at hand: that this is the same network was
proven on random weights, against torch-fidelity's (`tests/test_inception.py`), never on the published ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ldm import images
from weights_convert import CheckpointError
from weights_convert.component import FLOATS
from weights_convert.containers import open_tensors

SIZE = 299  # pixels of a side
WIDTH = 2048
CLASSIFIER = ("fc.weight", "fc.bias")  # of 1008 classes, which features do not need
COUNTER = ".num_batches_tracked"  # which torch's norms keep beside their weights and some files do not
RESIZES = {"legacy": "bilinear as TensorFlow 1 (legacy FID)", "clean": "bicubic antialiased (clean-fid)"}


class Unit(nn.Module):
    """Convolution, normalisation by the statistics of training, ReLU. Odd kernels keep the size unless `valid`."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, *, stride: int = 1, valid: bool = False):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (0, 0) if valid or stride > 1 else (height // 2, width // 2)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """Mean of 3 x 3 neighbours, of fewer at the border: TensorFlow does not count its padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """Largest of 3 x 3 neighbours, the size kept."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    """Largest of 3 x 3 neighbours at every second place: h -> (h - 1) // 2."""
    return F.max_pool2d(x, 3, stride=2)


class Small(nn.Module):
    """Figure 5: branches of 1 x 1, 5 x 5 and twice 3 x 3, and a pool: (b, c, 35, 35) -> (b, 224 + pooled, 35, 35)."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = Unit(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = Unit(inputs, 48), Unit(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = Unit(inputs, 64), Unit(64, 96, 3), Unit(96, 96, 3)
        self.branch_pool = Unit(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, twice, self.branch_pool(average(x))], dim=1)


class Reduction(nn.Module):
    """Section 5, halves the grid: (b, c, 35, 35) -> (b, c + 480, 17, 17)."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Unit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 64), Unit(64, 96, 3)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, halve(x)], dim=1)


class Factorised(nn.Module):
    """Figure 6: 7 x 7 as rows after columns, `inner` channels wide: (b, c, 17, 17) -> (b, 768, 17, 17)."""

    def __init__(self, inputs: int, inner: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Unit(inputs, 192)
        self.branch7x7_1, self.branch7x7_2 = Unit(inputs, inner), Unit(inner, inner, row)
        self.branch7x7_3 = Unit(inner, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(inputs, inner), Unit(inner, inner, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(inner, inner, row), Unit(inner, inner, column)
        self.branch7x7dbl_5 = Unit(inner, 192, row)
        self.branch_pool = Unit(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], dim=1)


class LastReduction(nn.Module):
    """Halves the grid again: (b, c, 17, 17) -> (b, c + 512, 8, 8)."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(inputs, 192), Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(inputs, 192), Unit(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1)), Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, halve(x)], dim=1)


class Wide(nn.Module):
    """Figure 7: rows beside columns: (b, c, 8, 8) -> (b, 2048, 8, 8). pool: `average`, or `maximum` in the last block."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.pool = pool
        self.branch1x1 = Unit(inputs, 320)
        self.branch3x3_1, self.branch3x3_2a, self.branch3x3_2b = Unit(inputs, 384), Unit(384, 384, row), Unit(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(inputs, 448), Unit(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, row), Unit(384, 384, column)
        self.branch_pool = Unit(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        once = [self.branch3x3_2a(once), self.branch3x3_2b(once)]
        twice = [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *once, *twice, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """Pictures (b, 3, 299, 299), 0 to 255 -> features (b, 2048), the mean of the last block over its 8 x 8 places."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Unit(32, 32, 3, valid=True), Unit(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Unit(64, 80), Unit(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Small(192, 32), Small(256, 64), Small(288, 64)
        self.Mixed_6a = Reduction(288)
        self.Mixed_6b, self.Mixed_6c = Factorised(768, 128), Factorised(768, 160)
        self.Mixed_6d, self.Mixed_6e = Factorised(768, 160), Factorised(768, 192)
        self.Mixed_7a = LastReduction(768)
        self.Mixed_7b, self.Mixed_7c = Wide(1280, average), Wide(2048, maximum)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels - 128) / 128
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def load(file: str | Path, *, device: str | torch.device = "cpu") -> Inception:
    """The network with the weights of a file in the naming above, `.pth` or `.safetensors`, float32, in eval mode.

    No code that the file may carry is run. Raises CheckpointError, one line, where it does not hold all tensors and no others.
    """
    found, path = open_tensors(Path(file).expanduser()), str(file)
    with torch.device("meta"):
        model = Inception()
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.endswith(COUNTER)}
    specs = {name: s for name, s in found.specs.items() if name not in CLASSIFIER and not name.endswith(COUNTER)}
    faults = {
        "missing": expected.keys() - specs.keys(),
        "unexpected": specs.keys() - expected.keys(),
        "misshapen": {n for n, s in specs.items() if expected.get(n, s.shape) != s.shape or s.dtype not in FLOATS},
    }
    told = [f"{kind} {len(names)}: {', '.join(sorted(names)[:3])}" for kind, names in faults.items() if names]
    if told:
        raise CheckpointError(f"{path}: is not the Inception v3 of 2015-12-05; {'; '.join(told)}")
    tensors = {name: found.tensor(name).to(device, torch.float32) for name in expected}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path}: {broken[0]} holds numbers that are NaN or infinite; the file is damaged")
    counters = [name for name in model.state_dict() if name.endswith(COUNTER)]
    model.load_state_dict(tensors | {name: torch.zeros((), dtype=torch.int64) for name in counters}, assign=True)
    return model.eval()


def legacy(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures -> (n, 3, 299, 299), 0 to 255, by TensorFlow 1's bilinear interpolation: pixel i of the result lies at
    i h / 299 of the source, and shrinking takes no mean over what is skipped."""
    return torch.cat([_bilinear(torch.from_numpy(np.array(images.rgb(picture)))) for picture in pictures])


def _bilinear(picture: Tensor) -> Tensor:
    """(h, w, 3), uint8 -> (1, 3, 299, 299)."""
    x = picture.permute(2, 0, 1).float()
    for axis in (2, 1):
        length = x.shape[axis]
        place = torch.arange(SIZE, dtype=torch.float32) * (length / SIZE)
        low = place.long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (place - low).reshape(-1, *[1] * (2 - axis))
        left, right = x.index_select(axis, low), x.index_select(axis, high)
        x = left + (right - left) * share
    return x[None]


def clean(pictures: Sequence[Image.Image]) -> Tensor:
    """The same by Pillow's bicubic filter, which takes a mean over what is skipped, on unrounded channels (Parmar et al. 2022,
    arXiv:2104.11222, section 3)."""
    rows = []
    for picture in pictures:
        channels = np.array(images.rgb(picture), dtype=np.float32).transpose(2, 0, 1)
        resized = [Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for c in channels]
        rows.append(torch.from_numpy(np.stack([np.asarray(c) for c in resized]).clip(0, 255)))
    return torch.stack(rows)
