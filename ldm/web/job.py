"""One request for pictures, and how it stands: what the queue, the run and whoever waits look at."""

import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ldm.pipelines.result import Result

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
PREVIEW_EVERY = 1.0  # seconds between two previews of a job that is watched
WATCHED = 5.0  # seconds since somebody asked for a preview, within which a job counts as watched


@dataclass(eq=False)
class Job:
    """One request. `fields` are the pipeline's keyword arguments, the prompt and a seed among them, checked beforehand."""

    task: str
    fields: Mapping[str, Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: str = WAITING
    step: int = 0  # of all steps of all batches
    steps: int = 0
    batch: int = 0  # which is being made, from 0
    batches: int = 1
    preview: bytes | None = None  # a PNG
    finished: Result | None = None  # of the batches that are made
    result: Result | None = None
    error: str | None = None
    fault: bool = False  # whether the error is the server's own
    origin: str = ""  # which interface it came through
    withheld: str | None = None  # why there are no previews and no denoising, where a safety checker withholds pictures
    views: tuple[str, ...] = ()  # "attention", "denoising": what else to make, for those who study the model
    attention: list[tuple[str, Image.Image]] = field(default_factory=list)  # words and how pixels looked at them
    denoising: list[tuple[str, Image.Image]] = field(default_factory=list)  # the estimate of the picture, step by step
    made: float = field(default_factory=time.monotonic)
    begun: float | None = None
    ended: float | None = None
    watched: float = float("-inf")
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def count(self) -> int:
        """Pictures."""
        return self.fields.get("num_images", 1)

    @property
    def progress(self) -> float:
        """0 to 1."""
        return 1.0 if self.state == DONE else self.step / self.steps if self.steps else 0.0

    @property
    def size(self) -> int:
        """Bytes of the pictures that it keeps."""
        views = [picture for _, picture in (*self.attention, *self.denoising)]
        pictures = [*(self.result.images if self.result else ()), *views]
        return sum(picture.width * picture.height * len(picture.getbands()) for picture in pictures)

    def watch(self) -> None:
        """Somebody would like a preview."""
        self.watched = time.monotonic()
