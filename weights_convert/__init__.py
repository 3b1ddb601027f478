"""Stable Diffusion v1 checkpoints in any layout in circulation, read as native tensors and written as any other layout.

    python -m weights_convert SRC DST --to native|compvis|diffusers [--dtype float16]

Imports nothing of `ldm`: the tables here are written down from the published files, and so are evidence of their own.

    naming/       what every tensor is called, in each naming (start reading here)
    containers/   files of named tensors: safetensors, torch.save
    layouts/      how a whole model lies on disk
    detect.py     which components a file holds
"""

from weights_convert.checkpoint import Checkpoint
from weights_convert.convert import read, write
from weights_convert.errors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "read", "write"]
