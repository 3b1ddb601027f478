"""Files of textual inversion: a few vectors that stand for a word in a text encoder's table of token embeddings.

Gal et al. 2022, "An Image is Worth One Word", arXiv:2208.01618. One word a file, in any of the forms in circulation:

    {"string_to_param": {"*": (n, d)}, "name": ..., "step": ...}    AUTOMATIC1111's `.pt`, and the authors' own, where
                                                                    string_to_param is a torch ParameterDict
    {"<cat-toy>": (d,) or (n, d)}                                   diffusers' learned_embeds `.bin` and `.safetensors`
    {"emb_params": (n, d)}                                          kohya's, and what AUTOMATIC1111 reads of `.safetensors`

Pickles are read by the reader of `containers/`, which runs nothing.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weights_convert.component import FLOATS
from weights_convert.containers import TensorFile, open_tensors
from weights_convert.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

NAMELESS = ("*", "emb_params")  # keys that stand for any word
OF_SDXL = ("clip_g", "clip_l")  # SDXL has two text encoders, and its files a tensor for each


@dataclass(frozen=True, eq=False)
class Embedding:
    """n vectors that stand for a word: `vectors` (n, d), float32, and the SHA-256 of the whole file.

    `name` is the key that the file has them under, or, where that is "*" or "emb_params", the file's name without its ending,
    which is what AUTOMATIC1111 goes by. (diffusers goes by the "name" inside such a file, which stays when it is renamed.)
    """

    name: str
    vectors: "Tensor"
    path: Path
    sha256: str


def read_embedding(path: str | Path) -> Embedding:
    """Read one embedding. Raises CheckpointError, one line, for anything else: none, several, SDXL's, or not finite."""
    path = Path(path).expanduser()
    file = open_tensors(path)
    key = _only_key(file)
    _check_spec(file, key)
    vectors = _vectors(file, key)
    with path.open("rb") as whole:
        sha256 = hashlib.file_digest(whole, "sha256").hexdigest()
    return Embedding(path.stem if key in NAMELESS else key, vectors, path, sha256)


def _only_key(file: TensorFile) -> str:
    keys = list(file.specs)
    if any(key in OF_SDXL for key in keys):
        raise CheckpointError(f"{file.path}: made for SDXL ({', '.join(keys[:5])}); expected one made for Stable Diffusion v1")
    if len(keys) != 1:
        more = ", ..." if len(keys) > 5 else ""
        found = f"{len(keys):,} tensors ({', '.join(keys[:5])}{more})" if keys else "no tensors"
        raise CheckpointError(f"{file.path}: holds {found}; expected one embedding a file: save each word to one of its own")
    return keys[0]


def _check_spec(file: TensorFile, key: str) -> None:
    spec = file.specs[key]
    if len(spec.shape) not in (1, 2) or 0 in spec.shape:
        raise CheckpointError(f"{file.path}: {key} has shape {list(spec.shape)}; expected vectors, [width] or [count, width]")
    if spec.dtype not in FLOATS:
        raise CheckpointError(f"{file.path}: {key} is of type {spec.dtype}; expected one of {', '.join(FLOATS)}")


def _vectors(file: TensorFile, key: str) -> "Tensor":
    """A copy, (n, d) in float32."""
    import torch

    vectors = torch.atleast_2d(file.tensor(key)).to(torch.float32, copy=True).contiguous()
    if not vectors.isfinite().all():
        row = (~vectors.isfinite()).any(dim=1).nonzero()[0].item()
        raise CheckpointError(f"{file.path}: vector {row} of {key} holds NaN or infinite values; it cannot be used")
    return vectors
