"""The kernels in C of `ldm.fast`: what they compute, that they round no worse than torch's, and what is done without them."""

import functools
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.fast import compiling, native, packing, products, winograd
from ldm.fast.attention import ChosenAttention
from ldm.fast.convolutions import Upsampling, convolution
from ldm.fast.normalisation import GroupNorm, LayerNorm
from ldm.fast.plan import Plan
from ldm.models.attention import attention, softmax_attention
from tests import seeded

compiled = pytest.mark.skipif(compiling.library("attention") is None, reason="no C compiler, or no AVX2")


def tensors(b: int, h: int, n: int, m: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """As the layers have them: queries, keys and values cut out of one product."""
    random = torch.Generator().manual_seed(n * m + d)
    whole = torch.randn(b, max(n, m), 3 * h * d, generator=random).to(dtype) * scale
    query, key, value = (part.unflatten(-1, (h, d)).transpose(1, 2) for part in whole.chunk(3, dim=-1))
    return query[:, :, :n], key[:, :, :m], value[:, :, :m]


def error(made: Tensor, of: tuple[Tensor, ...]) -> float:
    truth = softmax_attention(*(one.double() for one in of))
    return ((made.double() - truth).norm() / truth.norm()).item()


# Blocks are of 48 or 24 queries and 128 keys, panels of 8 or 4 keys, pairs of 2.
SHAPES = [
    (2, 8, 300, 300, 40),
    (1, 2, 48, 128, 80),
    (2, 4, 5, 77, 160),
    (1, 1, 260, 257, 512),
    (1, 3, 49, 1, 8),
    (30, 1, 1, 129, 16),
]


@compiled
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_c_is_as_exact_as_torch_s(shape):
    of = tensors(*shape, torch.float32)
    made = native.attention(*of)
    assert made.shape == of[0].shape and made.transpose(1, 2).is_contiguous()
    assert error(made, of) < max(1.5 * error(attention(*of), of), 3e-7)
    of = tensors(*shape, torch.bfloat16)
    made = native.attention(*of)
    assert made.dtype == torch.bfloat16 and error(made, of) < max(1.1 * error(attention(*of), of), 2e-3)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart_do_not_overflow(dtype):
    """Of scores as large as these one key takes all; exponentials taken before the maximum is known would be infinite."""
    of = tensors(1, 2, 60, 200, 40, dtype, scale=30.0)
    assert error(native.attention(*of), of) < 1.2 * error(attention(*of), of)
    query, key, value = tensors(1, 1, 10, 300, 8, dtype)
    query, key = query.abs() + 1, -key.abs() - 1 - 100 * torch.arange(300)[:, None].flip(0)  # each block larger than the last
    lowest = native.attention(query, key.to(dtype), value)
    torch.testing.assert_close(lowest, value[:, :, -1:].expand_as(lowest), rtol=0, atol=1e-6)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_a_number_stays_so(dtype, which):
    of = [one.clone() for one in tensors(1, 1, 60, 200, 8, dtype)]
    of[which][0, 0, 50, 3] = math.nan
    made, expected = native.attention(*of).isnan(), attention(*of).isnan()
    assert expected.any() and torch.equal(made, expected)


@compiled
def test_attention_is_computed_in_c_where_it_can_be_and_by_torch_elsewhere(monkeypatch):
    calls = []
    true = native.attention
    monkeypatch.setattr(native, "attention", lambda *of: calls.append(of[0].dtype) or true(*of))
    attend = ChosenAttention()
    of = tensors(1, 2, 20, 30, 40, torch.float32)
    torch.testing.assert_close(attend(*of), attention(*of))
    assert calls == [torch.float32]
    for other in (
        tensors(1, 2, 20, 30, 12, torch.float32),  # a width that is no multiple of 8
        tensors(1, 2, 20, 30, 40, torch.float64),
        tensors(1, 2, 20, 30, 40, torch.float16),
        tuple(one.transpose(2, 3).contiguous().transpose(2, 3) for one in of),  # features that are no neighbours
        tuple(one.clone().requires_grad_() for one in of),
    ):
        with torch.enable_grad():
            torch.testing.assert_close(attend(*other), attention(*other))
        torch.testing.assert_close(ChosenAttention(choose=False)(*other), attention(*other))
    assert calls == [torch.float32]


@compiled
@pytest.mark.parametrize(
    ("b", "c", "o", "size"),
    [(2, 320, 64, (16, 16)), (1, 16, 128, (1, 1)), (3, 144, 64, (21, 18)), (1, 48, 192, (4, 70)), (2, 128, 64, (5, 100))],
    ids=str,
)
@pytest.mark.parametrize("block", [1, 1 << 14, 1 << 30])
def test_convolutions_in_c_are_as_exact_as_torch_s(monkeypatch, b, c, o, size, block):
    """Blocks are of 96 tiles of 4x4 pixels, 128 channels, 64 outputs; maps come in bands."""
    monkeypatch.setattr(winograd, "BLOCK_IN_C", block)
    conv, of = seeded.fill(torch.nn.Conv2d(c, o, 3, padding=1)), Plan(dtype=torch.float32)
    quick, bias = winograd.Winograd(conv, of), seeded.tensor("bias", o)
    assert quick.native
    x = seeded.tensor("x", b, c, *size).contiguous(memory_format=torch.channels_last)
    wide = F.interpolate(x, scale_factor=2, mode="nearest")
    with torch.no_grad():
        for given, made in ((x, quick(x)), (wide, quick(x, scale=2))):
            exact = F.conv2d(given.double(), conv.weight.double(), conv.bias.double(), padding=1)
            assert made.shape == exact.shape
            assert (made - exact).norm() < 9e-7 * exact.norm()  # torch: 2e-7 to 9e-7, by processor and layout
        torch.testing.assert_close(quick(x, bias), quick(x) + (bias - conv.bias)[:, None, None], rtol=1e-4, atol=1e-5)
        doubled = quick(x, write=lambda part, out: torch.mul(part, 2, out=out))
        torch.testing.assert_close(doubled, quick(2 * x), rtol=0, atol=0)
        x[0, 1, 0, 0] = math.nan
        assert conv(x).isnan().any() and quick(x)[conv(x).isnan()].isnan().all()


@compiled
@pytest.mark.parametrize(("c", "o", "size"), [(320, 64, (16, 16)), (16, 128, (3, 1)), (144, 192, (21, 18))], ids=str)
def test_bfloat16_is_widened_computed_with_and_rounded_once(monkeypatch, c, o, size):
    monkeypatch.setattr(native, "engine", lambda: False)
    conv = seeded.fill(torch.nn.Conv2d(c, o, 3, padding=1)).bfloat16()
    quick = winograd.Winograd(conv, Plan(dtype=torch.bfloat16))
    assert quick.native and quick.taps.dtype == torch.bfloat16
    x = seeded.tensor("x", 2, c, *size).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for given, made in ((x, quick(x)), (F.interpolate(x, scale_factor=2, mode="nearest"), quick(x, scale=2))):
            exact = F.conv2d(given.double(), conv.weight.double(), conv.bias.double(), padding=1)
            rounded = exact.bfloat16()
            assert made.dtype == torch.bfloat16 and (made == rounded).float().mean() > 0.99
            assert (made.double() - exact).norm() < 1.001 * (rounded.double() - exact).norm()
        x[0, 0, 0, 0], x[1, 1, 0, 0] = math.nan, math.inf
        assert not quick(x)[:, :, 0, 0].isfinite().any()


@compiled
def test_convolutions_that_the_kernel_in_c_cannot_do_are_torch_s():
    conv = functools.partial(torch.nn.Conv2d, kernel_size=3, padding=1)
    assert native.convolves(conv(32, 64), torch.float32)
    for other in (conv(8, 64), conv(32, 48), conv(32, 64, stride=2), conv(32, 64, dilation=2), conv(32, 64, groups=2)):
        assert not native.convolves(other, torch.float32)
    assert not native.convolves(torch.nn.Conv2d(32, 64, 1), torch.float32)
    assert not any(native.convolves(conv(32, 64), dtype) for dtype in (torch.float64, torch.float16))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "c", "groups", "size", "mean"),
    [(2, 320, 32, (24, 24), 0.0), (1, 32, 32, (5, 3), 2.0), (3, 48, 4, (1, 2), 0.0), (1, 64, 1, (100, 97), 300.0)],
    ids=str,
)
def test_norms_in_c_are_as_exact_as_torch_s(b, c, groups, size, mean, dtype):
    """Sums are of 128 pixels, and of at most 64 parts of a map. A mean far from nothing costs nothing."""
    norm = seeded.fill(torch.nn.GroupNorm(groups, c)).to(dtype)
    quick = GroupNorm(norm, Plan(dtype=dtype))
    x = (seeded.tensor("x", b, c, *size) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    exact = F.silu(F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps))
    made = quick(x)
    assert quick.native and made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    if dtype == torch.float32:
        own = F.silu(norm(x))
        assert (made - exact).norm() < max(1.2 * (own - exact).norm(), 2e-7 * exact.norm())
    else:
        assert (made.double() - exact).norm() < 1.01 * (exact.bfloat16().double() - exact).norm()
    assert torch.equal(quick(x.contiguous()), made)  # of a map that is not channels_last
    whole = torch.full((b, size[0] + 2, size[1] + 3, c), 7.0, dtype=dtype)
    quick.writing(x)(x.permute(0, 2, 3, 1)[:, :, :1], whole[:, 1:-1, 2:3])  # a part to a part
    assert torch.equal(whole[:, 1:-1, 2], made.permute(0, 2, 3, 1)[:, :, 0])
    assert (whole[:, [0, -1]] == 7).all() and (whole[:, :, [0, 1, -1]] == 7).all()
    x[0, 0, 0, 0] = math.nan
    assert quick(x)[0, : c // groups].isnan().any() and (groups == 1 or quick(x)[0, -1].isfinite().all())


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "mean"), [((2, 7, 320), 0.0), ((1, 1, 16), 5.0), ((3, 1280), 100.0)], ids=str)
def test_norms_of_layers_and_without_silu(shape, mean, dtype):
    layer = seeded.fill(torch.nn.LayerNorm(shape[-1])).to(dtype)
    x = (seeded.tensor("x", *shape) + mean).to(dtype)
    exact = F.layer_norm(x.double(), shape[-1:], layer.weight.double(), layer.bias.double(), layer.eps)
    made, own = LayerNorm(layer, Plan(dtype=dtype))(x), F.layer_norm(x, shape[-1:], layer.weight, layer.bias, layer.eps)
    assert made.dtype == dtype and (made - exact).norm() < max(1.1 * (own - exact).norm(), 2e-7 * exact.norm())
    group = seeded.fill(torch.nn.GroupNorm(4, 32)).to(dtype)
    x = (seeded.tensor("x", 2, 32, 5, 3) + mean).to(dtype)
    exact = F.group_norm(x.double(), 4, group.weight.double(), group.bias.double(), group.eps)
    made, own = GroupNorm(group, Plan(dtype=dtype), silu=False)(x), group(x)
    assert (made - exact).norm() < max(1.5 * (own - exact).norm(), 3e-7 * exact.norm())


@compiled
def test_silu_of_any_number():
    """Of a map whose moments are known, so that what is normalised is what there was."""
    x = torch.cat([torch.linspace(-120, 120, 4079), torch.tensor([0.0, -1e4, 1e4, 3e38, -3e38, math.inf, -1e-30])])
    x = x[: len(x) // 16 * 16].view(1, 1, -1, 16)
    found, made = torch.stack([torch.ones(1, 16), torch.zeros(1, 16)]), torch.empty_like(x)
    native.normalise(x, found, made, True)
    torch.testing.assert_close(made, F.silu(x.double()).float(), rtol=5e-6, atol=1e-30)  # of -80: 2^115 with 24 bits of 115
    assert (made - F.silu(x.double()))[x.abs() < 8].abs().max() < 1e-6


def test_without_a_compiler_torch_does_the_work(monkeypatch, tmp_path):
    compiling.library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        assert compiling.library("attention") is None and not native.attends(torch.float32)
        of = tensors(1, 2, 20, 30, 40, torch.float32)
        assert torch.equal(ChosenAttention()(*of), attention(*of))
        for command in ("false", "'", "cat"):  # that fail, that is no command, that does something else
            compiling.library.cache_clear()
            monkeypatch.setenv("CC", command)
            assert compiling.library("attention") is None
    finally:
        compiling.library.cache_clear()


@compiled
def test_a_library_is_compiled_once_for_all_processes(tmp_path, monkeypatch):
    program = (
        "import time; from ldm.fast import compiling; start = time.perf_counter();"
        "print(compiling.library('attention') is not None, time.perf_counter() - start)"
    )

    def run(**environment: str) -> tuple[str, set[str]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()[0]
        return made, {path.name for path in (tmp_path / "ldm").glob("*")} if (tmp_path / "ldm").is_dir() else set()

    made, first = run(XDG_CACHE_HOME=str(tmp_path))
    assert made == "True" and len(first) == 1
    made, second = run()
    assert made == "True" and second == first  # nothing left of the work, and nothing made anew
    other = shutil.which("gcc") or shutil.which("cc")
    made, third = run(CC=f"{other} -g0")
    assert made == "True" and len(third) == 2  # another compiler's is another library
    (tmp_path / "ldm").chmod(0o777)  # where others could put theirs
    made, fourth = run(CC=f"{other} -g1")
    assert made == "True" and fourth == third
    made, _ = run(XDG_CACHE_HOME="/proc/nowhere")  # where nothing can be written
    assert made == "True"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsampling_is_winograds_where_other_products_are_not_twice_as_quick(dtype):
    conv, plan = nn.Conv2d(256, 256, 3, padding=1), Plan(dtype=dtype)
    if products.multiplies(256, plan):
        pytest.skip("a matrix engine does both")
    convolves, other = native.convolves(conv, dtype), dtype == torch.bfloat16 and packing.possible(conv.weight, dtype)
    assert (Upsampling(conv, plan, 1 << 16).winograd is not None) == (convolves and not other)
    assert isinstance(convolution(nn.Conv2d(256, 256, 3, padding=1), plan, 1 << 16), winograd.Winograd) == convolves
