"""Gradient checkpointing of the UNet (Chen et al. 2016): the same gradients, to the last bit, from a tenth of the memory."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.models.unet import UNet, UNetConfig
from ldm.models.unet_blocks import Recomputable, ResidualBlock
from tests import seeded

CONFIG = UNetConfig(
    level_widths=(32, 64), attention_levels=(True, True), residual_blocks=1, heads=4, context_width=32, norm_groups=8
)
T = torch.tensor([3.5, 981.0])


@pytest.fixture(autouse=True)
def with_gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG)


def loss_of(model, side: int = 16) -> torch.Tensor:
    return model(seeded.tensor("x", 2, 4, side, side), T, seeded.tensor("context", 2, 7, 32)).float().square().mean()


def gradients(unet: UNet, on: bool, *, dtype: str = "float32", attention=nullcontext, model=None) -> dict[str, torch.Tensor]:
    """Of every weight, the backward pass being outside of the contexts, as in training."""
    unet.checkpoint_gradients(on)
    unet.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), attention():
        loss = loss_of(unet if model is None else model)
    loss.backward()
    unet.checkpoint_gradients(False)
    return {name: p.grad.clone() for name, p in unet.named_parameters()}


def kept(unet: UNet, on: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, other than weights: every memory once."""
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    memory = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    unet.checkpoint_gradients(on)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(unet)
    unet.checkpoint_gradients(False)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in memory.items() if place not in weights)


@pytest.mark.parametrize("attention", [nullcontext, lambda: sdpa_kernel(SDPBackend.MATH)], ids=["any kernel", "training's"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_same_to_the_last_bit(unet, dtype, attention):
    plain, again = (gradients(unet, on, dtype=dtype, attention=attention) for on in (False, True))
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())


def test_less_than_a_fifth_of_the_memory_is_kept(unet):
    assert kept(unet, True) < kept(unet, False) / 5


def test_every_block_is_computed_twice_and_only_where_it_is_on(unet):
    """Once in each pass, and no more than once where nothing asks for gradients."""
    calls, hooks = [], []
    blocks = [module for module in unet.modules() if isinstance(module, Recomputable)]
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda module, _: calls.append(module)))
    gradients(unet, False)
    plain = len(calls)
    gradients(unet, True)
    again = len(calls) - plain
    calls.clear()
    unet.checkpoint_gradients(True)
    with torch.no_grad():
        loss_of(unet)
    unet.checkpoint_gradients(False)
    for hook in hooks:
        hook.remove()
    assert (plain, again, len(calls)) == (len(blocks), 2 * len(blocks), len(blocks))


def test_it_is_off_by_default_and_no_part_of_the_model(unet):
    assert not any(module.recompute for module in UNet(CONFIG).modules() if isinstance(module, Recomputable))
    before = unet.state_dict().keys()
    unet.checkpoint_gradients()
    assert unet.state_dict().keys() == before and unet.config == CONFIG
    unet.checkpoint_gradients(False)


def test_the_seams_stay(unet):
    x, context = seeded.tensor("x", 2, 4, 16, 16), seeded.tensor("context", 2, 7, 32)
    unet.checkpoint_gradients()
    whole, split = unet(x, T, context), unet.denoise(x, unet.embed_time(T), unet.project_context(context))
    unet.checkpoint_gradients(False)
    assert torch.equal(whole, split) and torch.equal(whole, unet(x, T, context))


def test_a_graph_of_torch_compile_holds_the_recomputation():
    torch.manual_seed(0)
    block = ResidualBlock(8, 16, 16, 4)
    x, time = seeded.tensor("x", 1, 8, 4, 4), seeded.tensor("time", 1, 16, 1, 1)
    block(x, time).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    block.recompute = True
    torch.compile(block.run, backend="aot_eager", fullgraph=True)(x, time).square().sum().backward()
    torch._dynamo.reset()
    for name, p in block.named_parameters():
        if name in plain:
            assert (p.grad - plain[name]).abs().max() <= 1e-5 * plain[name].abs().max(), name


def test_gradients_are_the_same_under_ddp(unet):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(unet, gradient_as_bucket_view=True)
        plain, again = (gradients(unet, on, model=model) for on in (False, True))
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_residual_block_says_what_a_call_of_it_says():
    torch.manual_seed(0)
    block = ResidualBlock(8, 8, 16, 4)
    x, time = seeded.tensor("x", 1, 8, 4, 4), seeded.tensor("time", 1, 8, 1, 1)
    assert torch.equal(block.run(x, time), block(x, time))
