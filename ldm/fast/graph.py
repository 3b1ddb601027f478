"""A CUDA graph of the guided network: hundreds of kernels, launched as one.

At batch 1 a GPU is done with most of the UNet's kernels before Python has launched the next. A graph records them once, with
the addresses they read and write, and replays them. So what changes from call to call is copied to those addresses: x, the
timestep (its embedding is part of the graph), and, when the prompt is another, the contexts' keys and values. What the sampler
does between two calls is a dozen small kernels on numbers that it has on the host; none of them waits for the device.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.fast.unet import FastUNet
from ldm.models.unet_blocks import KeysValues

CAPTURES = 4  # shapes whose graphs are kept; each holds the memory of one call
WARM_UP = 2  # calls before a capture, in which libraries choose their kernels
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a function of tensors that stay where they are, on the current device: what replays it, and where its result
    then is."""
    before, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        before.wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):  # torch's own stream is of the device of its first capture
            out = function()
    finally:
        torch.cuda.set_stream(before)  # torch leaves the other one current, on which all fails, where a capture has failed
    return graph.replay, out


class Capture:
    """One graph: of inputs of one shape."""

    def __init__(self, unet: FastUNet, x: Tensor, t: Tensor, contexts: Sequence[KeysValues], record: Record):
        self.x, self.t = x.clone(), t.clone()
        self.contexts = [tuple(part.clone() for part in pair) for pair in contexts]
        self.copied = contexts  # held, so that another list is another object
        self.replay, self.out = record(lambda: unet.denoise(self.x, unet.embed_time(self.t), self.contexts))

    def __call__(self, x: Tensor, t: Tensor, contexts: Sequence[KeysValues]) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        if contexts is not self.copied:
            for mine, given in zip(self.contexts, contexts, strict=True):
                for held, part in zip(mine, given, strict=True):
                    held.copy_(part)
            self.copied = contexts
        self.replay()
        return self.out.clone()


class GraphedUNet(nn.Module):
    """A `FastUNet` whose calls are replayed, with the same seams. For use without gradients.

    A shape that cannot be captured is computed kernel by kernel, with a warning. The lists that `project_context` returns must
    not be changed; other contexts are another list.
    """

    def __init__(self, unet: FastUNet, record: Record = record):
        super().__init__()
        self.unet, self.config, self.conv_in, self.record = unet, unet.config, unet.conv_in, record
        self.captures: dict[tuple, Capture] = {}
        self.refused: set[tuple] = set()

    def forward(self, x: Tensor, t: Tensor | float, context: Tensor) -> Tensor:
        return self.denoise(x, self.embed_time(t), self.project_context(context))

    def embed_time(self, t: Tensor | float) -> Tensor:
        """The timesteps on the device, (1,) or (b,), float64; the graph has the rest. No number waits for the device."""
        device = self.conv_in.bias.device
        if isinstance(t, Tensor):
            return t.to(device, torch.float64).reshape(-1)
        return torch.full((1,), float(t), dtype=torch.float64, device=device)

    def project_context(self, context: Tensor) -> list[KeysValues]:
        return self.unet.project_context(context)

    def denoise(self, x: Tensor, times: Tensor, contexts: Sequence[KeysValues]) -> Tensor:
        with torch.cuda.device_of(x):  # which streams and graphs are of
            capture = self._captured(x, times, contexts)
            if capture is None:
                return self.unet.denoise(x, self.unet.embed_time(times), contexts)
            return capture(x, times, contexts)

    def _captured(self, x: Tensor, times: Tensor, contexts: Sequence[KeysValues]) -> Capture | None:
        """The graph for these shapes, captured where there is none yet; None where that cannot be."""
        key = (tuple(x.shape), tuple(times.shape), tuple(contexts[0][0].shape))
        if key in self.refused:
            return None
        capture = self.captures.pop(key, None)
        if capture is None:
            while len(self.captures) >= CAPTURES:  # the one that was used longest ago
                del self.captures[next(iter(self.captures))]
            try:
                capture = Capture(self.unet, x, times, contexts, self.record)
            except RuntimeError as error:
                self.refused.add(key)
                warnings.warn(f"no CUDA graph of x {list(x.shape)} ({_line(error)}); slower without", stacklevel=2)
                return None
        self.captures[key] = capture
        return capture


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
