"""Tracing: what every part of a network computes, written down as it runs.

    with TraceWriter("run.trace") as writer, Tracer(writer, {"unet": unet}, only=("unet.down.*",)):
        unet(x, t, context)

Any module will do. Parts of ours are named by their paths, `unet.down.0.residual.conv1`; parts of diffusers', transformers' and
CompVis's modules get the same names, by the tables of `weights_convert`, so that traces of both can be compared.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.sampling import Info
from ldm.models.autoencoder import Autoencoder
from ldm.models.clip import TextEncoder
from ldm.models.unet import UNet
from ldm.numerics.traces import TraceError, TraceWriter
from weights_convert import detect
from weights_convert.naming.modules import module_paths

BLOCKS = ("unet.conv_in", "unet.down.?", "unet.down.??", "unet.middle", "unet.up.?", "unet.up.??", "unet.conv_out")
NETWORK = "unet"  # whose calls are counted
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)  # parts that are never called
# What a component is given, by the names of its arguments in any implementation.
INPUTS = {
    "unet": {"x": ("x", "sample"), "t": ("t", "timestep", "timesteps"), "context": ("context", "encoder_hidden_states")},
    "text_encoder": {"ids": ("ids", "input_ids")},
}
# Where our pipelines go around a component's front door, the parts that see the same: (pattern, what their input is).
SIDE_DOORS = {
    "unet": (("conv_in", "x"), ("time_embedding", "t"), ("*.cross_attention.key", "context")),
    "autoencoder": (("post_quant_conv", "latents"), ("encoder", "pixels")),
}


class Tracer:
    """A context manager that notes down the output of every called part of `modules`, in the order of execution.

    writer: where to. modules: by the kind of component they are: unet, text_encoder, autoencoder, or another name for anything
    else. only: patterns of names with * and ?; all without any. What components are given is noted down in any case, under
    names such as `unet.x`, `unet.t`, `unet.context`, `text_encoder.ids` and `autoencoder.latents`.

    `call` counts the network's calls: what the UNet computes, and `after_step` and `add` note down, carries it.
    """

    def __init__(self, writer: TraceWriter, modules: Mapping[str, nn.Module], *, only: Sequence[str] = ()):
        self.call = 0
        self._writer, self._modules, self._only = writer, dict(modules), tuple(only)
        self._hooks: list[Any] = []

    def __enter__(self) -> "Tracer":
        for component, module in self._modules.items():
            names, ours = names_of(component, module)
            parts = dict(module.named_modules())
            for path, name in names.items():
                self._watch(parts[path], f"{component}.{name}" if name else component, component)
            if component in INPUTS and not (ours and component in SIDE_DOORS):  # our pipelines use no front door of the UNet
                self._watch_front(component, module)
            else:
                self._watch_sides(component, {name: parts[path] for path, name in names.items()})
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def add(self, name: str, value: Tensor | float, *, call: int | None = None) -> None:
        """Note down something else, if `only` allows it."""
        if self.wants(name):
            self._writer.add(name, torch.as_tensor(value), call=call)

    def wants(self, name: str) -> bool:
        return not self._only or any(fnmatchcase(name, pattern) for pattern in self._only)

    def after_step(self, x: Tensor, info: Info) -> Tensor:
        """The hook of our pipelines: the sampler's terms, under the call that the step ended with."""
        call = max(self.call - 1, 0)
        terms = {"t": info.step.t, "sigma": info.step.sigma, "eps": info.eps, "x0": info.x0, "x": x}
        for name, value in terms.items():
            value = torch.tensor(value, dtype=torch.float64) if isinstance(value, int | float) else value
            self.add(f"sampler.{name}", value, call=call)
        return x

    def on_step_end(self, pipeline: Any, index: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same for `callback_on_step_end` of diffusers' pipelines, which tell of x alone."""
        self.add("sampler.x", kept["latents"], call=max(self.call - 1, 0))
        return kept

    def _watch(self, part: nn.Module, name: str, component: str) -> None:
        counts = component == NETWORK
        if self.wants(name):

            def note(_: nn.Module, given: Any, out: Any) -> None:
                for ending, tensor in _tensors(out):
                    self._writer.add(name + ending, tensor, call=self.call if counts else None)

            self._hooks.append(part.register_forward_hook(note))
        if name == f"{NETWORK}.conv_out":
            self._hooks.append(part.register_forward_hook(self._next_call))

    def _next_call(self, *_: object) -> None:
        self.call += 1

    def _watch_front(self, component: str, module: nn.Module) -> None:
        """What a component is called with."""
        arguments = list(inspect.signature(module.forward).parameters)

        def front(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = dict(zip(arguments, args, strict=False)) | kwargs
            for name, spellings in INPUTS[component].items():
                self._note_input(component, name, next((given[one] for one in spellings if one in given), None))

        self._hooks.append(module.register_forward_pre_hook(front, with_kwargs=True))

    def _watch_sides(self, component: str, parts: Mapping[str, nn.Module]) -> None:
        """What the parts are called with that stand at a component's `SIDE_DOORS`."""
        for pattern, name in SIDE_DOORS.get(component, ()):
            part = next((part for path, part in parts.items() if fnmatchcase(path, pattern)), None)
            if part is not None:
                side = lambda _, args, name=name: self._note_input(component, name, args[0])  # noqa: E731
                self._hooks.append(part.register_forward_pre_hook(side))

    def _note_input(self, component: str, name: str, value: Any) -> None:
        if isinstance(value, Tensor | int | float):
            call = self.call if component == NETWORK else None
            self._writer.add(f"{component}.{name}", torch.as_tensor(value), call=call)


def names_of(component: str, module: nn.Module) -> tuple[dict[str, str], bool]:
    """Path in the module -> path in ours, of every part that is called and that both have; and whether the module is ours.

    A module that is none of the known implementations of its component keeps its own paths. Raises TraceError where it is one,
    but its sizes cannot be told.
    """
    called = [path for path, part in module.named_modules() if not isinstance(part, (*CONTAINERS, nn.Identity))]
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = next((found for found in detect.components(shapes) if found.kind == component), None)
    if found is None or isinstance(module, UNet | TextEncoder | Autoencoder):
        return {path: path for path in called}, True
    prefix = found.prefix
    inner = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    architecture = detect.infer(found, inner)
    if architecture is None:
        raise TraceError(f"the sizes of this {component} cannot be told from its tensors; expected one of Stable Diffusion v1")
    inside = {path.removeprefix(prefix): path for path in called if path.startswith(prefix)}
    names = module_paths(architecture, found.naming, inside)
    return {inside[path]: names[path] for path in inside if path in names}, False


def _tensors(out: Any) -> Iterator[tuple[str, Tensor]]:
    """What a part returned: a tensor, or the tensors of a tuple, of which the first goes by the part's own name."""
    if isinstance(out, Tensor):
        yield "", out
    elif isinstance(out, tuple | list):
        for i, tensor in enumerate(out):
            if isinstance(tensor, Tensor):
                yield f".{i}" if i else "", tensor
