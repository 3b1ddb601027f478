"""Instruments: what turns pictures, and some of them prompts, into the features that are measured.

CLIP (Radford et al. 2021, arXiv:2103.00020) embeds both; Inception v3 (Szegedy et al. 2015, arXiv:1512.00567) is the one that
the Frechet inception distance is defined with (Heusel et al. 2017, arXiv:1706.08500). How a picture is brought to a network's
size moves the distance more than a checkpoint does (Parmar et al. 2022, arXiv:2104.11222), so every instrument says how.

Pictures (n) -> features (n, width); prompts (n) -> features (n, width). All float32, on the CPU. A picture's features do not
depend on what is looked at beside it, up to rounding.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import weights_convert
from ldm import images
from ldm.checkpoint import BUNDLED, bundled_folder, check_device, load_module
from ldm.evaluation import inception as inception_v3
from ldm.models.clip import normalised, pool
from ldm.output.safety import prepared
from ldm.text.tokenizer import Tokenizer
from weights_convert import CheckpointError
from weights_convert.layouts import clip_folder, native_folder
from weights_convert.tokenizer_files import clip_vocabulary

AT_ONCE = 32  # pictures or prompts in one pass of a network
CLIP_RESIZES = ("none", "bicubic")


class Instrument(Protocol):
    """What measures pictures.

    name: for tables, as "CLIP of bundled". resize: how pictures get to its size, always named. width: features a picture.
    fingerprint: of its weights and of how it resizes; instruments with the same one give the same numbers, up to rounding.
    """

    name: str
    resize: str
    width: int

    @property
    def fingerprint(self) -> str: ...

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (n, width), float32, on the CPU, one row a picture."""
        ...


class ClipInstrument:
    """Both towers of a CLIP. Embeddings are not normalised; those that lie in the same direction belong together."""

    def __init__(
        self,
        *,
        name: str,
        resize: str,
        image: nn.Module,
        text: nn.Module,
        projection: nn.Module,
        tokenizer: Tokenizer,
    ):
        """resize: one of CLIP_RESIZES. projection: of a text's state at its first end token, (n, text width) -> (n, width)."""
        self.name = name
        self.width = image.config.projection_width
        self._size = image.config.image_size
        self._prepare = {"none": self._as_they_are, "bicubic": self._bicubic}[resize]
        side = f"{self._size} x {self._size}"
        self.resize = {"none": f"none ({side})", "bicubic": f"bicubic, antialiased (Pillow), to {side}, centre crop"}[resize]
        self._image, self._text, self._projection, self._tokenizer = image, text, projection, tokenizer
        self._device = image.patch_embedding.weight.device

    @cached_property
    def fingerprint(self) -> str:
        modules = (self._image, self._text, self._projection)
        words = "\n".join([self.resize, self._tokenizer.style, *self._tokenizer.vocabulary, *self._tokenizer.merges])
        return fingerprint(modules, words)

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings (n, width) of pictures. Raises ValueError where one does not have the size and is not to be resized."""
        return in_parts(images, lambda part: self._image(self._prepare(part).to(self._device)), self.width)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (n, width) of prompts. What does not fit into the context is left out, as when pictures are made."""
        return in_parts(prompts, self._embedded, self.width)

    def _embedded(self, prompts: Sequence[str]) -> Tensor:
        ids = self._tokenizer(prompts).ids.to(self._device)
        return self._projection(pool(self._text(ids), ids, self._tokenizer.end))

    def _as_they_are(self, pictures: Sequence[Image.Image]) -> Tensor:
        for picture in pictures:
            if picture.size != (self._size, self._size):
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"a picture is {size}; {self.name} takes {self._size} x {self._size}; resize it, or bicubic")
        return normalised(_pixels(pictures) / 255)

    def _bicubic(self, pictures: Sequence[Image.Image]) -> Tensor:
        return torch.stack([prepared(images.rgb(picture), self._size) for picture in pictures])


def clip(source: str | Path = BUNDLED, *, device: str | torch.device = "cpu", resize: str | None = None) -> ClipInstrument:
    """The CLIP of "bundled", of a native folder that has an image encoder, or of a folder that transformers wrote of a
    CLIPModel (as openai/clip-vit-large-patch14, the one that the score is usually given with).

    resize: "none", pictures must have the network's size; "bicubic", as CLIP was trained: the shorter side to that size, then
    the middle. Where left out, "none" for a native folder and "bicubic" for transformers'.
    Raises CheckpointError, one line, where there is no whole CLIP.
    """
    if resize not in (None, *CLIP_RESIZES):
        raise ValueError(f"resize {resize!r}; expected {' or '.join(CLIP_RESIZES)}")
    check_device(source, device)
    folder = bundled_folder() if str(source) == BUNDLED else Path(source).expanduser()
    if (folder / native_folder.INDEX).exists():
        found, own = weights_convert.read(folder), "none"
    elif (folder / clip_folder.CONFIG).exists():
        found, own = clip_folder.read(folder), "bicubic"
    else:
        expected = f"a folder with {native_folder.INDEX} or with {clip_folder.CONFIG} and its weights"
        raise CheckpointError(f"{source}: no CLIP here; expected {BUNDLED}, or {expected}")
    missing = [kind for kind in ("image_encoder", "text_encoder") if kind not in found.components]
    if missing:
        raise CheckpointError(f"{source}: has no {' and no '.join(missing)}; a CLIP has both; ldm train clip makes them")
    image, text = (load_module(found.components[kind], device=device) for kind in ("image_encoder", "text_encoder"))
    projection = _projection(getattr(found, "text_projection", None), image, text, source)
    vocabulary = found.vocabulary or clip_vocabulary()
    return ClipInstrument(
        name=f"CLIP of {BUNDLED if str(source) == BUNDLED else folder.resolve().name}",
        resize=resize or own,
        image=image,
        text=text,
        projection=projection.to(device),
        tokenizer=Tokenizer(vocabulary.tokens, vocabulary.merges, text.config.context_length),
    )


def _projection(weight: Tensor | None, image: nn.Module, text: nn.Module, source: str | Path) -> nn.Module:
    """The text's projection, or nothing where the image tower projects into the text's width."""
    widths = text.config.width if weight is None else len(weight), image.config.projection_width
    if widths[0] != widths[1]:
        raise CheckpointError(f"{source}: texts have {widths[0]} features, pictures {widths[1]}; they are of different models")
    if weight is None:
        return nn.Identity()
    linear = nn.Linear(text.config.width, widths[1], bias=False)
    linear.weight = nn.Parameter(weight.float())
    return linear.eval()


class InceptionInstrument:
    """Inception v3; see `inception` for the ways of resizing."""

    width = inception_v3.WIDTH

    def __init__(self, *, name: str, resize: str, network: inception_v3.Inception):
        self.name, self.resize = name, inception_v3.RESIZES[resize]
        self._prepare = {"legacy": inception_v3.legacy, "clean": inception_v3.clean}[resize]
        self._network = network

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([self._network], self.resize)

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Features (n, 2048) of pictures of any size."""
        device = self._network.Conv2d_1a_3x3.conv.weight.device
        return in_parts(images, lambda part: self._network(self._prepare(part).to(device)), self.width)


def inception(file: Path, *, device: str | torch.device = "cpu", resize: str = "legacy") -> InceptionInstrument:
    """The Inception v3 whose weights are in a file, in the naming of pytorch-fid and torch-fidelity.

    resize: "legacy", bilinear as TensorFlow 1, what most published distances were measured with; "clean", bicubic with
    antialiasing (clean-fid), what they should have been. Raises CheckpointError, one line, where the file does not fit.
    """
    if resize not in inception_v3.RESIZES:
        raise ValueError(f"resize {resize!r}; expected {' or '.join(inception_v3.RESIZES)}")
    check_device(file, device)
    network = inception_v3.load(file, device=device)
    return InceptionInstrument(name=f"Inception v3 ({Path(file).name})", resize=resize, network=network)


def fingerprint(modules: Iterable[nn.Module], words: str) -> str:
    """A short hash of every weight of the modules, in order, and of what else makes their numbers."""
    digest = hashlib.sha256(words.encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).numpy())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def in_parts(given: Sequence, network: Callable[[Sequence], Tensor], width: int) -> Tensor:
    """What `network` makes of `given`, AT_ONCE at a time: (n, width), float32, on the CPU. Convolutions, too, are computed in
    full float32, which a GPU does not do unless asked."""
    rows = [torch.empty(0, width)]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for start in range(0, len(given), AT_ONCE):
            rows.append(network(given[start : start + AT_ONCE]).float().cpu())
    return torch.cat(rows)


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> (n, 3, h, w), float32, 0 to 255."""
    arrays = [np.array(images.rgb(picture), dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
