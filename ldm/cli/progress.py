"""What a run shows of itself on its way: a bar with the time left, and a preview."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any


class Steps:
    """One bar over the steps of one run. Nothing shows before the first, so that a refusal is one line."""

    def __init__(self, *, quiet: bool):
        self.quiet, self.bar, self.begun = quiet, None, time.time()

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def after_step(self, x: Any, info: Any) -> Any:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=info.count, unit="step", disable=self.quiet, file=sys.stderr)
            self.bar.start_t = self.begun
        self.bar.update()
        return x


class Progress:
    """One bar over all steps of all portions, with the time left; and the preview.

    Nothing shows before the first step, so that what is still refused is refused in one line. drawn: a seed to show then.
    """

    def __init__(self, args: argparse.Namespace, components: Any, portions: int, drawn: int | None):
        self.args, self.components, self.portions, self.drawn = args, components, portions, drawn
        self.bar, self.text, self.begun = None, "", time.time()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def describe(self, made: int, total: int) -> None:
        self.text = f"picture {made + 1} of {total}"
        if self.bar is not None:
            self.bar.set_description(self.text)

    def write(self, path: Path) -> None:
        self._show()
        self.bar.clear()
        print(path, flush=True)
        self.bar.refresh()

    def after_step(self, x: Any, info: Any) -> Any:
        self._show()
        self.bar.total = info.count * self.portions
        self.bar.update()
        turn = (info.index + 1) % self.args.preview_every == 0 or info.index + 1 == info.count
        if self.args.preview is not None and turn:
            self._preview(info.x0[:1])
        return x

    def _show(self) -> None:
        if self.bar is not None:
            return
        from tqdm import tqdm

        if self.drawn is not None:
            print(f"seed {self.drawn}", file=sys.stderr)
        self.bar = tqdm(desc=self.text, unit="step", disable=self.args.quiet, file=sys.stderr)
        self.bar.start_t = self.begun

    def _preview(self, x0: Any) -> None:
        from ldm.output import files
        from ldm.pipelines.autoencoding import pictures

        (picture,) = pictures(self.components, x0, self.args.tile)
        files.save_as(picture, None, self.args.preview)


class StageBar:
    """One bar for each stage, in the process that speaks."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.bar, self.stage = args, None, None

    def __enter__(self) -> "StageBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tell(self, stage: str, done: int, count: int) -> None:
        from tqdm import tqdm

        if self.args.stops:
            raise KeyboardInterrupt
        if stage != self.stage:
            self.__exit__()
            self.stage = stage
            self.bar = tqdm(total=count, desc=stage, unit="portion", disable=self.args.quiet, leave=False)
        self.bar.update(done - self.bar.n)
