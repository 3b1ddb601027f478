"""A whole checkpoint, whatever it was read from: the common form between reading and writing."""

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
