"""A whole checkpoint, whatever it was read from: the common form between reading and writing."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weights_convert.architecture import Sampling, Schedule
from weights_convert.component import Component
from weights_convert.tokenizer_files import Vocabulary


@dataclass(frozen=True)
class Checkpoint:
    """The components of a model by kind (`architecture.COMPONENTS`), its noise schedule, and its words.

    `layout` is "native", "compvis" (any single file) or "diffusers". `vocabulary` is None for CLIP's own. `sampling` is what
    only a native folder says.
    """

    path: Path
    layout: str
    components: Mapping[str, Component]
    schedule: Schedule
    vocabulary: Vocabulary | None = None
    sampling: Sampling = Sampling()


def sampling_in_words(checkpoint: Checkpoint) -> list[str]:
    """What `sampling` says that is not the default, for a layout that has no place for it."""
    chosen = dataclasses.asdict(checkpoint.sampling).items() - dataclasses.asdict(Sampling()).items()
    return [f"{name} {value:g}" for name, value in sorted(chosen)]
