"""The products of a matrix engine (`ldm/fast/products_amx.c`): what they compute, and that they round once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import native, products
from ldm.fast.convolutions import Normalised, Upsampling, convolution
from ldm.fast.linear import GatedLinear, Linear
from ldm.fast.plan import Plan
from tests import seeded

engaged = pytest.mark.skipif(not native.engages(torch.bfloat16), reason="no matrix engine for bfloat16, or no C compiler")
PLAN = Plan(dtype=torch.bfloat16)
SHAPES = [(64, 320, 96), (1, 32, 1), (77, 64, 40), (1300, 1152, 33), (700, 2080, 32)]


def layer(module: nn.Module) -> nn.Module:
    return seeded.fill(module).bfloat16()


def tensor(*shape: int, name: str = "x") -> Tensor:
    return seeded.tensor(name, *shape).bfloat16()


def rounded_once(made: Tensor, exact: Tensor) -> bool:
    """Whether an error is that of rounding the exact result."""
    assert made.dtype == torch.bfloat16 and made.shape == exact.shape
    return (made.double() - exact).norm() < 1.02 * (exact.bfloat16().double() - exact).norm()


@engaged
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear_layers(rows, inputs, outputs):
    """Blocks are of 640 rows, 32 outputs and 1024 inputs; tiles of 32 rows."""
    linear = layer(nn.Linear(inputs, outputs))
    quick, x, addend = Linear(linear, plan=PLAN), tensor(2, rows, inputs), tensor(2, rows, outputs, name="more")
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    assert quick.tiled
    assert rounded_once(quick(x), exact)
    assert rounded_once(quick(x, addend=addend), exact + addend)
    assert rounded_once(quick(x[:, ::2]), exact[:, ::2])  # rows that lie apart
    assert torch.equal(quick(x.mT.contiguous().mT), quick(x))  # features that are no neighbours
    assert quick(x[:, :0]).shape == (2, 0, outputs)
    x[1, rows // 2, 5] = math.nan
    assert torch.equal(quick(x).isnan(), F.linear(x, linear.weight, linear.bias).isnan())


@engaged
def test_layers_of_one_input_are_one_and_need_no_bias():
    one, two = (layer(nn.Linear(64, outputs, bias=False)) for outputs in (64, 24))
    quick, x = Linear(one, two, plan=PLAN), tensor(3, 5, 64)
    exact = torch.cat([one.double()(x.double()), two.double()(x.double())], dim=-1)
    assert quick.tiled and rounded_once(quick(x), exact)


@engaged
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(33, 64, 64), (1300, 320, 320)])
def test_gated_layers_round_once(rows, inputs, outputs):
    linear = layer(nn.Linear(inputs, 2 * outputs))
    quick, x = GatedLinear(linear, PLAN), 4 * tensor(rows, inputs)
    value, gate = F.linear(x.double(), linear.weight.double(), linear.bias.double()).chunk(2, dim=-1)
    assert quick.tiled and rounded_once(quick(x), value * F.gelu(gate))


@engaged
def test_gelu_of_any_number():
    """The gate is the input itself, and what it multiplies is 1."""
    linear = nn.Linear(32, 64).bfloat16()
    with torch.no_grad():
        linear.weight.zero_()[32:].copy_(torch.eye(32))
        linear.bias.zero_()[:32] = 1
    x = torch.cat([torch.linspace(-15, 15, 4094), torch.tensor([0.0, 3e38])]).bfloat16().view(-1, 1).repeat(1, 32)
    made, number = GatedLinear(linear, PLAN)(x)[:, 0].double(), x[:, 0].double()
    exact = number * torch.special.erfc(-number / math.sqrt(2)) / 2  # torch's GELU has none of the tail
    assert ((made - exact).abs() <= exact.abs() * 2**-8 + 1e-38)[:-1].all() and made[-1] == number[-1]
    assert GatedLinear(linear, PLAN)(x * math.nan).isnan().all()


@engaged
@pytest.mark.parametrize(
    ("b", "c", "o", "size"),
    [(2, 320, 64, (16, 16)), (1, 32, 4, (1, 1)), (3, 96, 33, (5, 7)), (1, 544, 40, (4, 70)), (1, 32, 32, (40, 33))],
    ids=str,
)
def test_convolutions(b, c, o, size):
    conv = layer(nn.Conv2d(c, o, 3, padding=1))
    x = tensor(b, c, *size).contiguous(memory_format=torch.channels_last)
    quick, addend = convolution(conv, PLAN, 256), tensor(b, o, *size, name="more")
    assert isinstance(quick, products.TiledConvolution)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert rounded_once(quick(x), exact)
    assert rounded_once(quick(x, torch.zeros(o)), exact - conv.bias.double()[:, None, None])
    assert rounded_once(quick(x, addend=addend), exact + addend)
    norm = layer(nn.GroupNorm(8, c))
    made = Normalised(norm, conv, PLAN, 256)(x, addend=addend)
    direct = F.conv2d(F.silu(norm(x)).double(), conv.weight.double(), conv.bias.double(), padding=1) + addend
    assert (made.double() - direct).norm() < 0.02 * direct.norm()
    x[-1, 1, -1, -1] = math.nan
    assert torch.equal(quick(x).isnan(), F.conv2d(x.float(), conv.weight.float(), padding=1).isnan())


@engaged
@pytest.mark.parametrize(("b", "c", "o", "size"), [(2, 64, 64, (8, 8)), (1, 32, 33, (1, 1)), (3, 32, 16, (5, 7))], ids=str)
def test_upsampling(b, c, o, size):
    """Summed taps are rounded once more, like those of the transposed convolution in its place elsewhere."""
    conv = layer(nn.Conv2d(c, o, 3, padding=1))
    quick, x = Upsampling(conv, PLAN, 256), tensor(b, c, *size).contiguous(memory_format=torch.channels_last)
    wide = F.interpolate(x.double(), scale_factor=2, mode="nearest")
    exact = F.conv2d(wide, conv.weight.double(), conv.bias.double(), padding=1)
    assert quick.tiled is not None and quick(x).shape == exact.shape
    assert (quick(x).double() - exact).norm() < 2 * (exact.bfloat16().double() - exact).norm()
    smaller = quick(x, (2 * size[0] - 1, 2 * size[1]))
    assert smaller.shape[-2:] == (2 * size[0] - 1, 2 * size[1])


@engaged
def test_other_layers_are_torch_s():
    assert not any(
        isinstance(convolution(layer(conv), plan, 256), products.TiledConvolution)
        for conv, plan in (
            (nn.Conv2d(32, 32, 3, stride=2, padding=1), PLAN),
            (nn.Conv2d(40, 32, 3, padding=1), PLAN),
            (nn.Conv2d(32, 32, 3, padding=1), Plan(dtype=torch.float32)),
            (nn.Conv2d(32, 32, 3, padding=1), Plan(dtype=torch.bfloat16, kernels=False)),
        )
    )
    assert not Linear(layer(nn.Linear(40, 32)), plan=PLAN).tiled and not GatedLinear(layer(nn.Linear(32, 48)), PLAN).tiled


@engaged
def test_torch_s_own_products_are_as_before_between_ours():
    """Both use the engine, and each finds it set up as it left it."""
    linear, x = layer(nn.Linear(512, 512)), tensor(256, 512)
    quick, before = Linear(linear, plan=PLAN), linear(x)
    for _ in range(3):
        ours = quick(x)
        assert torch.equal(linear(x), before) and torch.equal(quick(x), ours)
