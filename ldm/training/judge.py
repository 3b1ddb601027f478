"""Train the judge of scenes on renders: `ldm train judge`. What it is, and what it says: `ldm/scenes/judge.py`.

Plain supervised classification, of scenes of either split: it is a measuring instrument, and must know what the models that
it measures have not seen. Pictures are mirrored, and noise, blur and brightness varied, so that it does not mind how a
generated picture differs in texture from a render.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.processes import Processes, generator
from ldm.scenes.judge import SIZE, Judge, JudgeConfig, labels, verdicts
from ldm.scenes.world import Scene, mirrored
from ldm.training.data import Scenes, drawn, to_unit
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.parallel import Together, shares

DISTURBANCE = 3  # purpose of the random numbers that disturb the pictures
SEED = 900  # of the scenes, apart from those that models are trained on
UNSEEN = 901  # of those that it is tested on


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """A run's every setting. A step is of `batch` pictures in each of `accumulation` micro-batches, which all processes share,
    `parallel` "exact", "ddp" or "fsdp" (see `parallel.py`). `noise`: the most that is added, of pictures in [-1, 1]; `blur`:
    the most, in pixels. `unseen`: how many pictures that are not trained on the tests are of.
    """

    model: JudgeConfig = field(default_factory=JudgeConfig)
    count: int = 40_000
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=2e-3, warm_up=200, cool_down=0.5, weight_decay=0.05, ema=0.998)
    )
    steps: int = 4000
    batch: int = 128
    accumulation: int = 1
    parallel: str = "exact"
    noise: float = 0.08
    blur: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    log_every: int = 50
    save_every: int = 500
    test_every: int = 1000
    unseen: int = 1000


def train(recipe: JudgeRecipe, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False) -> None:
    """Train, or resume what was begun in `folder`; the result is its `judge.safetensors`."""
    shared = shares(recipe.batch, recipe.accumulation, processes)
    data = drawn(Scenes(SEED, recipe.count, 64, split="any"), cache or folder / "data", processes)
    scenes = [data.scene(i) for i in range(len(data))]
    answers, mirrored_answers = labels(scenes), labels([mirrored(scene) for scene in scenes])
    unseen = Scenes(UNSEEN, recipe.unseen, 64, split="any")
    test_pictures = to_unit(unseen.images(range(len(unseen)))).to(processes.device)
    test_scenes = [unseen.scene(i) for i in range(len(unseen))]

    torch.manual_seed(recipe.seed)
    model = Judge(recipe.model)
    together = Together(model, recipe.parallel, processes, shared)
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, given={"samples": data.listing}, quiet=quiet)
    ledger.resume(model=model, optimiser=optimiser, average=average)

    batch = recipe.batch * recipe.accumulation
    for step in range(ledger.step, recipe.steps):
        indices = data.batch(recipe.seed, step, batch)
        for rows in together.parts():
            draws = Draws(recipe, step, rows)
            pictures = draws.disturb(to_unit(data.images(indices[rows])))
            pictures = pictures.to(processes.device, memory_format=processes.layout)
            turned = draws.mirrored
            right = [
                torch.where(turned.view(-1, *[1] * (a.ndim - 1)), b[indices[rows]], a[indices[rows]]).to(processes.device)
                for a, b in zip(answers, mirrored_answers, strict=True)
            ]
            with processes.precision(recipe.dtype):
                loss = loss_of(together.loss_of(pictures, draws.kept.to(processes.device)), right)
            together.backward(loss, loss=loss)
        means = together.finish()
        optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, **means)
        if done % recipe.test_every == 0 or done == recipe.steps:
            shadow = average.into(Judge(recipe.model)).to(processes.device)
            if processes.leads:
                ledger.log(done, accuracy=accuracy(shadow, test_pictures, test_scenes))
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, model=model, optimiser=optimiser, average=average)
    ledger.close()

    finished = average.into(Judge(recipe.model))
    if processes.leads:
        tensors = {name: tensor.half().contiguous() for name, tensor in finished.state_dict().items()}
        save_file(tensors, folder / "judge.partial", metadata={"format": "pt"})
        os.replace(folder / "judge.partial", folder / "judge.safetensors")


def loss_of(logits: tuple[Tensor, ...], answers: list[Tensor]) -> Tensor:
    """Cross-entropy of layout, colours and shapes, each a mean."""
    return sum(F.cross_entropy(said.flatten(0, -2), right.flatten()) for said, right in zip(logits, answers, strict=True))


class Draws:
    """The random numbers of some rows of one step's batch: which pictures are mirrored, how each is disturbed, and what of the
    network is dropped out."""

    def __init__(self, recipe: JudgeRecipe, step: int, rows: slice):
        sources = [generator(recipe.seed, step, DISTURBANCE, row) for row in range(rows.start, rows.stop)]
        bright, blur, noise, mirror = torch.stack([torch.rand(4, generator=source) for source in sources], dim=1)
        self.mirrored = mirror < 0.5
        self.brightness = 0.85 + 0.3 * bright
        self.blur = recipe.blur * (2 * blur - 1).clamp(min=0)  # half of the pictures stay sharp,
        self.noise = recipe.noise * (2 * noise - 1).clamp(min=0)  # and half of them clean
        self.grain = torch.stack([torch.randn(3, SIZE, SIZE, generator=source) for source in sources])
        chances = torch.stack([torch.rand(recipe.model.hidden, generator=source) for source in sources])
        self.kept = (chances >= recipe.model.dropout) / (1 - recipe.model.dropout)

    def disturb(self, pictures: Tensor) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1], those of the rows."""
        shape = (-1, 1, 1, 1)
        mirrored, brightness, blur, noise = (v.view(shape) for v in (self.mirrored, self.brightness, self.blur, self.noise))
        pictures = torch.where(mirrored, pictures.flip(-1), pictures) * brightness
        pictures = _blurred(_blurred(pictures, blur), blur, across=False)
        return pictures + noise * self.grain


def _blurred(pictures: Tensor, sigma: Tensor, *, across: bool = True) -> Tensor:
    """A Gaussian blur along one axis, five pixels wide: (b, 3, h, w), sigma (b, 1, 1, 1) in pixels."""
    kernel = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / sigma.clamp(min=0.1)) ** 2)
    kernel = (kernel / kernel.sum(-1, keepdim=True)).expand(-1, 3, -1, -1).reshape(-1, 1, 1, 5)
    if not across:
        kernel = kernel.transpose(2, 3)
    edges = (2, 2, 0, 0) if across else (0, 0, 2, 2)
    padded = F.pad(pictures, edges, mode="replicate").flatten(0, 1)[None]
    return F.conv2d(padded, kernel, groups=padded.shape[1]).view(pictures.shape)


def accuracy(judge: nn.Module, pictures: Tensor, scenes: list[Scene]) -> float:
    """The share of pictures of which the judge says layout, every colour and every shape as they are."""
    said = verdicts(judge, pictures)
    return sum(is_right(scene, *verdict) for scene, verdict in zip(scenes, said, strict=True)) / len(scenes)


def is_right(scene: Scene, layout: str, nouns: tuple) -> bool:
    """Whether a verdict names the scene's layout and contents, sizes aside."""
    return layout == scene.layout and [noun[1:] for noun in nouns] == [noun[1:] for noun in scene.nouns]
