"""A port of text encoder and UNet in numpy alone, as `docs/traces.md` tells its writer to trace it: nothing of ldm, no torch.

    python numpy_port.py MODEL-FOLDER OUR-TRACE NEW-TRACE

It reads a native folder's weights, starts from the token ids, the latents and the timestep of a trace of ours, and writes down
what it computes for the network's first call.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


class Notes:
    """The trace: arrays in the order in which they come."""

    def __init__(self):
        self.arrays, self.entries = {}, []

    def __call__(self, name, array, call=None):
        key = str(len(self.arrays))
        self.arrays[key] = np.ascontiguousarray(array)
        entry = {"name": name, "file": "tensors.safetensors", "key": key}
        self.entries.append(entry if call is None else entry | {"call": call})
        return array

    def write(self, folder):
        folder.mkdir()
        save_file(self.arrays, folder / "tensors.safetensors")
        manifest = {"format": "ldm trace", "version": 1, "about": {"program": "numpy port"}, "tensors": self.entries}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def read(folder, wanted):
    """Tensors of a trace by (name, call)."""
    entries = json.loads((folder / "manifest.json").read_text())["tensors"]
    found = {}
    for entry in entries:
        place = entry["name"], entry.get("call")
        if place in wanted and place not in found:
            with safe_open(folder / entry["file"], framework="numpy") as file:
                found[place] = file.get_tensor(entry["key"])
    return [found[place] for place in wanted]


class Port:
    def __init__(self, component, weights, config, notes, call=None):
        self.component, self.w, self.config, self.notes, self.call = component, weights, config, notes, call

    def note(self, name, array):
        return self.notes(f"{self.component}.{name}" if name else self.component, array, self.call)

    def linear(self, name, x):
        y = x @ self.w[f"{name}.weight"].T
        return self.note(name, y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y)

    def layer_norm(self, name, x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return self.note(name, y * self.w[f"{name}.weight"] + self.w[f"{name}.bias"])

    def group_norm(self, name, x, eps=1e-5):
        grouped = x.reshape(len(x), self.config["norm_groups"], -1)
        y = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + eps)
        affine = (self.w[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return self.note(name, y.reshape(x.shape) * next(affine) + next(affine))

    def convolution(self, name, x, stride=1):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
        y = np.einsum("bchwij,ocij->bohw", windows, self.w[f"{name}.weight"], optimize=True)
        return self.note(name, y + self.w[f"{name}.bias"][:, None, None])

    def attend(self, name, x, context, heads, causal=False):
        split = lambda y: y.reshape(*y.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
        key, value = (split(self.linear(f"{name}.{part}", context)) for part in ("key", "value"))
        scores = split(self.linear(f"{name}.query", x)) @ key.swapaxes(-1, -2) / math.sqrt(key.shape[-1])
        if causal:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ value
        return self.linear(f"{name}.output", y.transpose(0, 2, 1, 3).reshape(*x.shape))

    # -- Text encoder

    def encode(self, ids):
        self.note("ids", ids)
        x = self.w["token_embedding.weight"][ids] + self.w["position_embedding.weight"][: ids.shape[1]]
        for i in range(self.config["layers"]):
            h = self.layer_norm(f"layers.{i}.norm1", x)
            x = x + self.attend(f"layers.{i}.attention", h, h, self.config["heads"], causal=True)
            h = self.linear(f"layers.{i}.mlp.fc1", self.layer_norm(f"layers.{i}.norm2", x))
            x = x + self.linear(f"layers.{i}.mlp.fc2", h / (1 + np.exp(-1.702 * h)))
        return self.layer_norm("final_norm", x)

    # -- UNet

    def denoise(self, x, t, context):
        for name, array in (("x", x), ("t", t), ("context", context)):
            self.note(name, array)
        half = self.w["time_embedding.linear_1.weight"].shape[1] // 2
        angles = t[:, None] * 10_000.0 ** (-np.arange(half) / half)
        waves = np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
        time = self.linear("time_embedding.linear_2", silu(self.linear("time_embedding.linear_1", waves)))
        blocks = {prefix: 1 + max(int(n.split(".")[1]) for n in self.w if n.startswith(prefix)) for prefix in ("down.", "up.")}
        x = self.convolution("conv_in", x)
        skips = [x]
        for i in range(blocks["down."]):
            x = self.block(f"down.{i}", x, time, context)
            skips.append(x)
        x = self.residual("middle.residual_1", x, time)
        x = self.transformer("middle.attention", x, context)
        x = self.residual("middle.residual_2", x, time)
        for i in range(blocks["up."]):
            x = self.block(f"up.{i}", np.concatenate([x, skips.pop()], 1), time, context)
        return self.convolution("conv_out", silu(self.group_norm("norm_out", x)))

    def block(self, name, x, time, context):
        if f"{name}.residual.conv1.weight" in self.w:
            x = self.residual(f"{name}.residual", x, time)
        if f"{name}.attention.proj_in.weight" in self.w:
            x = self.transformer(f"{name}.attention", x, context)
        if f"{name}.downsample.weight" in self.w:
            x = self.convolution(f"{name}.downsample", x, stride=2)
        if f"{name}.upsample.weight" in self.w:
            x = self.convolution(f"{name}.upsample", x.repeat(2, 2).repeat(2, 3))
        return self.note(name, x)

    def residual(self, name, x, time):
        h = self.convolution(f"{name}.conv1", silu(self.group_norm(f"{name}.norm1", x)))
        h = h + self.linear(f"{name}.time_projection", silu(time))[:, :, None, None]
        h = self.convolution(f"{name}.conv2", silu(self.group_norm(f"{name}.norm2", h)))
        if f"{name}.shortcut.weight" in self.w:
            x = np.einsum("bchw,oc->bohw", x, self.w[f"{name}.shortcut.weight"])
            x = self.note(f"{name}.shortcut", x + self.w[f"{name}.shortcut.bias"][:, None, None])
        return self.note(name, x + h)

    def transformer(self, name, x, context):
        heads, tokens = self.config["heads"], self.group_norm(f"{name}.norm", x, 1e-6).reshape(*x.shape[:2], -1).swapaxes(1, 2)
        y = self.linear(f"{name}.proj_in", tokens)
        h = self.layer_norm(f"{name}.block.norm1", y)
        y = y + self.attend(f"{name}.block.self_attention", h, h, heads)
        y = y + self.attend(f"{name}.block.cross_attention", self.layer_norm(f"{name}.block.norm2", y), context, heads)
        value, gate = np.split(
            self.linear(f"{name}.block.feed_forward.expand", self.layer_norm(f"{name}.block.norm3", y)), 2, -1
        )
        y = y + self.linear(f"{name}.block.feed_forward.reduce", value * self.gelu(gate))
        return self.note(name, x + self.linear(f"{name}.proj_out", y).swapaxes(1, 2).reshape(x.shape))

    gelu = staticmethod(lambda x: x * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))) / 2)


def silu(x):
    return x / (1 + np.exp(-x))


def main(model, ours, new, port=Port):
    configs = json.loads((model / "model.json").read_text())["components"]
    ids, x, t = read(ours, [("text_encoder.ids", None), ("unet.x", 0), ("unet.t", 0)])
    notes = Notes()
    text = port("text_encoder", load_file(model / "text_encoder.safetensors"), configs["text_encoder"], notes)
    unet = port("unet", load_file(model / "unet.safetensors"), configs["unet"], notes, call=0)
    unet.denoise(x, t.reshape(-1), text.encode(ids))
    notes.write(new)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
