"""LoRA: small changes of many layers, beside the weights or merged into them.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. Every layer that a LoRA
has factors for gives W x + c (alpha / r) B A x, c being the coefficient that the user chooses.

    style = lora.read("style.safetensors", model)
    lora.attach(model, [(style, 0.8)])      # W is untouched and shared; the factors run beside it
    lora.merge(model, [(style, 0.8)])       # new weights where they change; as fast as the model without
    lora.unmerge(merged)                    # the weights that were there before, bit for bit

None of these changes the model that is given: what comes back shares with it all tensors that stay. `with_pairs` gives a model
with new factors that can be trained (`ldm train lora`).
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import Components
from ldm.models.unet_blocks import Shortcut
from weights_convert import architecture
from weights_convert.lora import Factors, LoRA, read_lora
from weights_convert.naming.lora import Layer

KINDS = {"unet": architecture.UNet, "text_encoder": architecture.TextEncoder}
Uses = Sequence[tuple[LoRA, float]]  # LoRAs, each with its coefficient


def read(path: str | Path, components: Components) -> LoRA:
    """Read a LoRA for this model, in any of the spellings of `weights_convert.lora`. `left` names what of it was of no use.

    Raises CheckpointError, one line, for a file that has nothing for this model, does not fit it, or is damaged.
    """
    return read_lora(path, architectures(components))


def architectures(components: Components) -> dict[str, architecture.Architecture]:
    """What LoRAs may change of a model, as `weights_convert.lora` wants it."""
    return {kind: made(**dataclasses.asdict(getattr(components, kind).config)) for kind, made in KINDS.items()}


def attach(components: Components, uses: Uses) -> Components:
    """A model that runs the LoRAs beside its weights. A coefficient of 0 leaves every bit as it is.

    The factors are moved to each layer's device and type now, and stay there: move a model first, then attach.
    """
    return _changed(components, uses, _attached, merged=False)


def merge(components: Components, uses: Uses) -> Components:
    """A model with the LoRAs in its weights, which are summed in float32 (float64 if they are) and rounded once.

    It keeps the weights that were there before, for `unmerge`, on the device and in the type that they have now.
    """
    return _changed(components, uses, _merged, merged=True)


def unmerge(components: Components) -> Components:
    """The model as it was before `merge`: the very tensors. Whatever was never merged stays."""
    changed = {}
    for kind in KINDS:
        module = getattr(components, kind)
        paths = [path for path, layer in module.named_modules() if hasattr(layer, "before_merging")]
        changed[kind] = _with_layers(module, dict.fromkeys(paths, _restored))
    kept = tuple(adapter for adapter in components.adapters if not adapter.get("merged"))
    return dataclasses.replace(components, **changed, adapters=kept)


def with_pairs(
    components: Components, layers: Iterable[Layer], rank: int, alpha: float, random: torch.Generator
) -> tuple[Components, "dict[Layer, Pair]"]:
    """A model with factors beside these layers, (kind, path), that can be trained; it begins as the model that is given.

    The layers' own weights are shared, and learn as well wherever they require gradients.
    """
    pairs = {(kind, path): Pair(getattr(components, kind).get_submodule(path), rank, alpha, random) for kind, path in layers}
    changed = {}
    for kind in KINDS:
        changes = {path: (lambda layer, pair=pair: _paired(layer, pair)) for (of, path), pair in pairs.items() if of == kind}
        changed[kind] = _with_layers(getattr(components, kind), changes)
    return dataclasses.replace(components, **changed), pairs


def _changed(components: Components, uses: Uses, change: Callable, *, merged: bool) -> Components:
    if components.acceleration is not None and uses:
        raise ValueError(
            "the model is accelerated, which LoRAs cannot change; leave --fast out, or merge them before you accelerate it"
        )
    changed = {}
    for kind in KINDS:
        by_layer: dict[str, list[tuple[Factors, float]]] = {}
        for lora, coefficient in uses:
            if not math.isfinite(coefficient):
                raise ValueError(f"LoRA {lora.name} with coefficient {coefficient}; expected a finite number")
            for (of, path), factors in lora.layers.items():
                if of == kind and coefficient != 0:
                    by_layer.setdefault(path, []).append((factors, coefficient))
        changes = {path: (lambda layer, own=own: change(layer, own)) for path, own in by_layer.items()}
        changed[kind] = _with_layers(getattr(components, kind), changes)
    told = [
        {"kind": "lora", "name": lora.name, "sha256": lora.sha256, "coefficient": float(c), "left": list(lora.left)}
        | ({"merged": True} if merged else {})
        for lora, c in uses
    ]
    return dataclasses.replace(components, **changed, adapters=(*components.adapters, *told))


# -- One layer -------------------------------------------------------------------------------------------------------------


def _attached(layer: nn.Module, uses: list[tuple[Factors, float]]) -> nn.Module:
    """A copy of the layer, on whose output the branches are added."""
    made = shallow_copy(layer)
    like = layer.weight
    wide = torch.promote_types(like.dtype, torch.float32)
    for factors, coefficient in uses:
        down, up = factors.down.to(like), (factors.up.to(wide) * (coefficient * factors.scale)).to(like)
        mid = None if factors.mid is None else factors.mid.to(like)
        made.register_forward_hook(lambda _, inputs, output, d=down, m=mid, u=up: output + _branch(made, inputs[0], d, m, u))
    return made


def _branch(layer: nn.Module, x: Tensor, down: Tensor, mid: Tensor | None, up: Tensor) -> Tensor:
    """up mid down x: (b, n, in) -> (b, n, out), or feature maps (b, c, h, w), with the layer's own stride and padding."""
    if not isinstance(layer, nn.Conv2d):
        if isinstance(layer, Shortcut):
            return F.conv2d(F.conv2d(x, down[..., None, None]), up[..., None, None])
        return F.linear(F.linear(x, down), up)
    own = {"stride": layer.stride, "padding": layer.padding}
    if mid is not None:
        return F.conv2d(F.conv2d(F.conv2d(x, down), mid, **own), up)
    return F.conv2d(F.conv2d(x, down, **own), up)


def _merged(layer: nn.Module, uses: list[tuple[Factors, float]]) -> nn.Module:
    """A copy of the layer with another weight, that remembers the first one."""
    weight = layer.weight
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.detach().to(wide)
    for factors, coefficient in uses:
        total = total + coefficient * factors.scale * product(factors, wide, weight.device).reshape(weight.shape)
    made = shallow_copy(layer)
    made.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
    made.before_merging = getattr(layer, "before_merging", (weight,))  # in a tuple, or it would count as a parameter
    return made


def product(factors: Factors, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the factors add to a weight at scale 1: (out, in) or (out, in, k, k)."""
    down, up = factors.down.to(device, dtype), factors.up.to(device, dtype)
    if factors.mid is None:
        return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    mid = factors.mid.to(device, dtype)
    return torch.einsum("os, srkl, ri -> oikl", up.flatten(1), mid, down.flatten(1))


def _restored(layer: nn.Module) -> nn.Module:
    made = shallow_copy(layer)
    (made.weight,) = layer.before_merging
    del made.before_merging
    return made


# -- Factors that are trained ----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """The factors of one layer: `down` (r, in) or (r, in, k, k) is drawn from N(0, 1 / in), `up` (out, r) begins as zero."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float, random: torch.Generator):
        super().__init__()
        weight = layer.weight
        down = torch.randn(rank, *weight.shape[1:], generator=random) / weight[0].numel() ** 0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, *(1,) * (weight.ndim - 2), device=weight.device))
        self.scale = alpha / rank

    def beside(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        return self.scale * _branch(layer, x, self.down, None, self.up)


def _paired(layer: nn.Module, pair: Pair) -> nn.Module:
    """A copy of the layer that has the pair as a part."""
    made = shallow_copy(layer)
    made.lora = pair
    made.register_forward_hook(lambda layer, inputs, output: output + layer.lora.beside(layer, inputs[0]))
    return made


# -- Copies ----------------------------------------------------------------------------------------------------------------


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with containers of its own and the same parameters, parts and hooks in them."""
    made = copy.copy(module)
    vars(made).update({name: copy.copy(held) for name, held in vars(module).items() if isinstance(held, dict | set)})
    return made


def _with_layers(module: nn.Module, changes: dict[str, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """A copy of the module with some of its layers, by path, replaced by what `changes` makes of them. Parts without any such
    layer are the given module's own."""
    if "" in changes:
        return changes[""](module)
    if not changes:
        return module
    below: dict[str, dict[str, Callable]] = {}
    for path, change in changes.items():
        first, _, rest = path.partition(".")
        below.setdefault(first, {})[rest] = change
    made = shallow_copy(module)
    for name, inner in below.items():
        made._modules[name] = _with_layers(module._modules[name], inner)
    return made
