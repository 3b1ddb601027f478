"""How weights change: AdamW or Muon, the learning rate's course, gradients cut, and the moving average of the weights.

AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101, as Stable Diffusion v1 was trained. Muon: Jordan et al. 2024,
kellerjordan.github.io/posts/muon: the update of a matrix is made orthogonal, so that no direction of it is neglected; here for
linear layers and convolutions, AdamW for all the rest. Moving average: Ho et al. 2020, arXiv:2006.11239, appendix B.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

N = TypeVar("N", bound=nn.Module)
SMALLEST_MATRIX = 16  # sides; less is an input or output of few channels, which Muon's authors leave to AdamW


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """`learning_rate` is reached after `warm_up` steps and kept, but for the last `cool_down` (a share of all steps),
    over which it falls to 0. `clip`: the most the gradient's norm may be; 0 is no bound. `ema`: of the moving average."""

    name: str = "adamw"
    learning_rate: float = 1e-4
    warm_up: int = 10_000
    cool_down: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 0.0
    ema: float = 0.9999


class Optimiser:
    """One or two of torch's optimisers over a model's parameters, and the course of their learning rate."""

    def __init__(self, model: nn.Module, config: OptimiserConfig, steps: int):
        if config.name not in ("adamw", "muon"):
            raise ValueError(f"optimiser {config.name!r}; expected adamw or muon")
        self.config, self.steps = config, steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        if config.name == "muon" and any(isinstance(p, DTensor) for p in self.parameters):
            raise ValueError("optimiser muon with parallel fsdp; expected adamw: Muon needs whole matrices")
        matrices = [p for p in self.parameters if p not in embeddings and _is_matrix(p)] if config.name == "muon" else []
        kept = set(matrices)
        rest = [p for p in self.parameters if p not in kept]
        decay = {"weight_decay": config.weight_decay}
        plain = {"betas": (config.beta1, config.beta2), **decay, "fused": True}
        self.parts = [torch.optim.AdamW(rest, config.learning_rate, **plain)]
        if matrices:
            self.parts.append(_Muon(matrices, config.learning_rate, **decay))

    def step(self, step: int) -> float:
        """Change the weights by their gradients, which are gone afterwards; step counts from 0. Returns the gradient's norm."""
        norm = _whole(nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True))
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm, foreach=True)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.config.learning_rate * self.course(step)
            part.step()
        for p in self.parameters:
            p.grad = None
        return norm

    def course(self, step: int) -> float:
        """The share of the learning rate in force at a step."""
        rise = min(1.0, (step + 1) / max(self.config.warm_up, 1))
        last = self.config.cool_down * self.steps
        fall = min(1.0, (self.steps - step) / last) if last else 1.0
        return rise * max(fall, 0.0)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: Iterable[dict[str, Any]]) -> None:
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


def _whole(value: Tensor) -> Tensor:
    """A sharded tensor gathered, for which all processes call; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= SMALLEST_MATRIX


class _Muon(torch.optim.Muon):
    """torch's Muon, which takes matrices, over linear layers and convolutions: a kernel is a row for each output channel."""

    def __init__(self, weights: list[Tensor], learning_rate: float, weight_decay: float):
        self.weights = weights
        matrices = [nn.Parameter(_matrix(w.detach(), w)) for w in weights]
        super().__init__(matrices, learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self) -> None:
        for matrix, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            matrix.grad = _matrix(weight.grad, weight)
        super().step()
        for matrix in self.param_groups[0]["params"]:
            matrix.grad = None


def _matrix(values: Tensor, like: Tensor) -> Tensor:
    """(out, rest): of `like` itself a view, whichever way its memory runs."""
    if values.ndim == 4 and not like.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)


class MovingAverage:
    """The mean of a model's weights over their last about 1 / (1 - decay) values; of fewer at the beginning."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.current = dict(model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.current.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.current.values()), weight)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.average.items():  # one by one: of sharded tensors there is no copying of lists
            value.copy_(state[name])

    def into(self, model: N) -> N:
        """A new model of the same kind, on the CPU, with the average as its weights. Sharded ones are gathered, for which all
        processes call."""
        model.load_state_dict({**model.state_dict(), **{name: _whole(value) for name, value in self.average.items()}})
        return model.eval()
