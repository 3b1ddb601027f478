"""What frozen networks make of the data, asked once for everything before the first step and kept in files.

Files are named after the network's weights and the data, so none is taken for another's. Shards that were encoded ahead of
time (`ldm encode`) have it already; then the networks are not asked, but must be those that the shards were made with.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.models.autoencoder import Autoencoder, Posterior
from ldm.models.clip import TextEncoder
from ldm.output.receipt import fingerprint
from ldm.processes import Processes
from ldm.text.tokenizer import Tokenizer
from ldm.training.data import Data, keep, to_unit

PIXELS_AT_ONCE = 1 << 22  # that the autoencoder is given: 16 pictures of 512 x 512


class Latents:
    """The posterior of every picture. `shape` is that of one picture's latents, (c, h, w)."""

    def __init__(self, data: Data, autoencoder: Autoencoder, folder: Path, processes: Processes):
        side = data.size // autoencoder.config.downsampling
        self.shape = (autoencoder.config.latent_channels, side, side)
        self.scale = autoencoder.config.scaling_factor
        name = fingerprint({"autoencoder": autoencoder})
        if data.encoding:
            _check(data, "autoencoder", name)
            self._moments = data.moments
            return

        def make(indices: list[int]) -> Tensor:
            return moments(autoencoder, data.images(indices), processes.device)

        file = folder / f"latents-{name}-{data.identity}-{data.size}.npy"
        keep(file, len(data), (2, *self.shape), make, processes=processes)
        kept = np.load(file, mmap_mode="r")
        self._moments = lambda indices: torch.from_numpy(kept[np.asarray(indices)])

    def draw(self, indices: list[int], noise: Tensor) -> Tensor:
        """From each picture's posterior, scaled as the UNet wants it: (b, c, h, w)."""
        mean, log_variance = self._moments(indices).float().unbind(1)
        return Posterior(mean, log_variance).sample(noise) * self.scale


class Contexts:
    """The states of every caption, and of the empty text."""

    def __init__(self, data: Data, tokenizer: Tokenizer, text_encoder: TextEncoder, folder: Path, processes: Processes):
        name = fingerprint({"text_encoder": text_encoder})
        if data.encoding:
            _check(data, "text encoder", name)
            _check(data, "tokenizer", tokenizer_fingerprint(tokenizer))
            self.empty, self._states = data.empty(), data.states
            return

        def make(indices: list[int]) -> Tensor:
            return states(tokenizer, text_encoder, data.captions(indices), processes.device)

        self.empty = states(tokenizer, text_encoder, [""], processes.device)[0]
        file = folder / f"texts-{name}-{data.identity}.npy"
        keep(file, len(data), tuple(self.empty.shape), make, processes=processes)
        kept = np.load(file, mmap_mode="r")
        self._states = lambda indices: torch.from_numpy(kept[np.asarray(indices)])

    def rows(self, indices: list[int], dropped: Tensor) -> Tensor:
        """(b, n, d): of each caption, or of the empty text where it is dropped."""
        return torch.where(dropped[:, None, None], self.empty, self._states(indices).float())


class Tokens:
    """The token ids of captions, for a text encoder that is trained too."""

    def __init__(self, data: Data, tokenizer: Tokenizer):
        self.data, self.tokenizer = data, tokenizer
        self.empty = tokenizer([""]).ids[0]

    def rows(self, indices: list[int], dropped: Tensor) -> Tensor:
        """(b, n): of each caption, or of the empty text where it is dropped."""
        return torch.where(dropped[:, None], self.empty, self.tokenizer(self.data.captions(indices)).ids)


@torch.no_grad()
def moments(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """Mean and log variance of the posterior of each picture, uint8 (b, 3, h, w): (b, 2, c, h / f, w / f), on the CPU."""
    found = []
    for part in images.split(max(PIXELS_AT_ONCE // images[0, 0].numel(), 1)):
        posterior = autoencoder.encode(to_unit(part.to(device)))
        found.append(torch.stack([posterior.mean, posterior.log_variance], dim=1).cpu())
    return torch.cat(found)


@torch.no_grad()
def states(tokenizer: Tokenizer, text_encoder: TextEncoder, texts: list[str], device: torch.device) -> Tensor:
    """The text encoder's states of each text: (b, n, d), on the CPU."""
    return text_encoder(tokenizer(texts).ids.to(device)).cpu()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A short hash of all that decides which ids a text has."""
    about = [sorted(tokenizer.vocabulary.items()), list(tokenizer.merges), tokenizer.length, tokenizer.style]
    return hashlib.sha256(json.dumps([*about, sorted(tokenizer.placeholders.items())]).encode()).hexdigest()[:16]


def _check(data: Data, kind: str, name: str) -> None:
    made_with = getattr(data.encoding, kind.replace(" ", "_"))
    if made_with != name:
        raise ValueError(
            f"{data.where}: encoded with another {kind} ({made_with}, and not {name}); encode the pictures with this run's"
        )
