"""What a training script made, as a native folder: one component or several, in the layout that `ldm.load` reads."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import weights_convert
from ldm.checkpoint import load_module
from ldm.diffusion.schedule import ScheduleConfig
from ldm.text.tokenizer import Tokenizer
from weights_convert.architecture import COMPONENTS, Sampling, Schedule
from weights_convert.checkpoint import Checkpoint
from weights_convert.component import Component
from weights_convert.tokenizer_files import Vocabulary, clip_vocabulary


def write(
    folder: Path,
    modules: Mapping[str, nn.Module],
    *,
    schedule: ScheduleConfig | None = None,
    vocabulary: Vocabulary | None = None,
    sampling: Sampling | None = None,
    dtype: str | None = None,
) -> None:
    """Write modules, by kind, each with its `config`. What was in the folder's place goes when the new one is whole."""
    components = {}
    for kind, module in modules.items():
        architecture = COMPONENTS[kind](**dataclasses.asdict(module.config))
        tensors = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        components[kind] = Component(kind, architecture, "native", "trained", tensors)
    if vocabulary == clip_vocabulary():  # which every reader has
        vocabulary = None
    noise = Schedule(**dataclasses.asdict(schedule or ScheduleConfig()))
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    whole = Checkpoint(fresh, "native", components, noise, vocabulary, sampling or Sampling())
    weights_convert.write(whole, fresh, "native", dtype)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def read(folder: Path, kind: str, *, device: torch.device | str = "cpu") -> nn.Module:
    """One component of any checkpoint, float32. Raises CheckpointError where it is not there."""
    checkpoint = weights_convert.read(folder)
    if kind not in checkpoint.components:
        raise weights_convert.CheckpointError(f"{folder}: holds {', '.join(checkpoint.components)} but no {kind}")
    return load_module(checkpoint.components[kind], device=device)


def read_tokenizer(folder: Path, length: int) -> Tokenizer:
    """The tokenizer that a checkpoint's text encoder goes with."""
    vocabulary = read_vocabulary(folder)
    return Tokenizer(vocabulary.tokens, vocabulary.merges, length) if vocabulary else Tokenizer.clip(length)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a checkpoint, None for CLIP's own."""
    return weights_convert.read(folder).vocabulary
