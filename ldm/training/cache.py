"""What frozen networks make of the data, asked once for everything before the first step and kept in files.

Files are named after the network's weights and the data, so none is taken for another's.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.models.autoencoder import Autoencoder, Posterior
from ldm.models.clip import TextEncoder
from ldm.output.receipt import fingerprint
from ldm.processes import Processes
from ldm.text.tokenizer import Tokenizer
from ldm.training.data import Folder, Scenes, keep, to_unit


class Latents:
    """The posterior of every picture. `shape` is that of one picture's latents, (c, h, w)."""

    def __init__(self, data: Scenes | Folder, autoencoder: Autoencoder, folder: Path, processes: Processes):
        side = data.size // autoencoder.config.downsampling
        self.shape = (autoencoder.config.latent_channels, side, side)
        self.scale = autoencoder.config.scaling_factor

        def moments(indices: list[int]) -> Tensor:
            posterior = autoencoder.encode(to_unit(data.images(indices)).to(processes.device))
            return torch.stack([posterior.mean, posterior.log_variance], dim=1).cpu()

        file = folder / f"latents-{fingerprint({'autoencoder': autoencoder})}-{data.identity}-{data.size}.npy"
        if processes.leads:
            keep(file, len(data), (2, *self.shape), moments)
        processes.wait()
        self.moments = np.load(file, mmap_mode="r")

    def draw(self, indices: list[int], noise: Tensor) -> Tensor:
        """From each picture's posterior, scaled as the UNet wants it: (b, c, h, w)."""
        mean, log_variance = torch.from_numpy(self.moments[np.asarray(indices)]).float().unbind(1)
        return Posterior(mean, log_variance).sample(noise) * self.scale


class Contexts:
    """The states of every caption, and of the empty text."""

    def __init__(
        self, data: Scenes | Folder, tokenizer: Tokenizer, text_encoder: TextEncoder, folder: Path, processes: Processes
    ):
        def states(texts: list[str]) -> Tensor:
            return text_encoder(tokenizer(texts).ids.to(processes.device)).cpu()

        with torch.no_grad():
            self.empty = states([""])[0]
        file = folder / f"texts-{fingerprint({'text_encoder': text_encoder})}-{data.identity}.npy"
        if processes.leads:
            keep(file, len(data), tuple(self.empty.shape), lambda indices: states(data.captions(indices)))
        processes.wait()
        self.states = np.load(file, mmap_mode="r")

    def rows(self, indices: list[int], dropped: Tensor) -> Tensor:
        """(b, n, d): of each caption, or of the empty text where it is dropped."""
        states = torch.from_numpy(self.states[np.asarray(indices)]).float()
        return torch.where(dropped[:, None, None], self.empty, states)


class Tokens:
    """The token ids of every caption, for a text encoder that is trained too."""

    def __init__(self, data: Scenes | Folder, tokenizer: Tokenizer):
        self.empty, self.ids = tokenizer([""]).ids[0], tokenizer(data.captions(range(len(data)))).ids

    def rows(self, indices: list[int], dropped: Tensor) -> Tensor:
        """(b, n): of each caption, or of the empty text where it is dropped."""
        return torch.where(dropped[:, None], self.empty, self.ids[indices])
