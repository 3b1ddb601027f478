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
from ldm.training.data import Scenes, batch_of, drawn, to_unit
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig

DISTURBANCE = 3  # purpose of the random numbers that disturb the pictures
SEED = 900  # of the scenes, apart from those that models are trained on
UNSEEN = 901  # of those that it is tested on


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """A run's every setting. `noise`: the most that is added, of pictures in [-1, 1]; `blur`: the most, in pixels."""

    model: JudgeConfig = field(default_factory=JudgeConfig)
    count: int = 40_000
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(learning_rate=2e-3, warm_up=200, cool_down=0.5, weight_decay=0.05, ema=0.998)
    )
    steps: int = 4000
    batch: int = 128
    accumulation: int = 1
    noise: float = 0.08
    blur: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    log_every: int = 50
    save_every: int = 500
    test_every: int = 1000


def train(recipe: JudgeRecipe, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False) -> None:
    """Train, or resume what was begun in `folder`; the result is its `judge.safetensors`."""
    data = drawn(Scenes(SEED, recipe.count, 64, split="any"), cache or folder / "data", processes)
    scenes = [data.scene(i) for i in range(len(data))]
    answers, mirrored_answers = labels(scenes), labels([mirrored(scene) for scene in scenes])
    unseen = Scenes(UNSEEN, 1000, 64, split="any")
    test_pictures = to_unit(unseen.images(range(len(unseen)))).to(processes.device)
    test_scenes = [unseen.scene(i) for i in range(len(unseen))]

    torch.manual_seed(recipe.seed)
    model = Judge(recipe.model).to(processes.device, memory_format=processes.layout)
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, quiet=quiet)
    ledger.resume(model=model, optimiser=optimiser, average=average)
    judge = processes.wrapped(model)

    batch = recipe.batch * recipe.accumulation * processes.count
    for step in range(ledger.step, recipe.steps):
        indices, draws = batch_of(recipe.seed, step, batch, len(data)), Draws(recipe, step, batch)
        for part in range(recipe.accumulation):
            rows = processes.rows(batch, part, recipe.accumulation)
            pictures = draws.disturb(to_unit(data.images(indices[rows])), rows)
            pictures = pictures.to(processes.device, memory_format=processes.layout)
            turned = draws.mirrored[rows]
            right = [
                torch.where(turned.view(-1, *[1] * (a.ndim - 1)), b[indices[rows]], a[indices[rows]]).to(processes.device)
                for a, b in zip(answers, mirrored_answers, strict=True)
            ]
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # of the dropout
            with processes.precision(recipe.dtype):
                loss = loss_of(judge(pictures), right)
            (loss / recipe.accumulation).backward()
        optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, loss=processes.mean(loss))
        if done % recipe.test_every == 0 or done == recipe.steps:
            shadow = Judge(recipe.model).to(processes.device).eval()
            average.into(shadow)
            ledger.log(done, accuracy=accuracy(shadow, test_pictures, test_scenes))
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, model=model, optimiser=optimiser, average=average)
    ledger.close()

    if processes.leads:
        average.into(model)
        tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "judge.partial", metadata={"format": "pt"})
        os.replace(folder / "judge.partial", folder / "judge.safetensors")


def loss_of(logits: tuple[Tensor, ...], answers: list[Tensor]) -> Tensor:
    """Cross-entropy of layout, colours and shapes, each a mean."""
    return sum(F.cross_entropy(said.flatten(0, -2), right.flatten()) for said, right in zip(logits, answers, strict=True))


class Draws:
    """The random numbers of one step's whole batch: which pictures are mirrored, and how each is disturbed."""

    def __init__(self, recipe: JudgeRecipe, step: int, batch: int):
        random = generator(recipe.seed, step, DISTURBANCE)
        bright, blur, noise, mirror = torch.rand(4, batch, generator=random)
        self.mirrored = mirror < 0.5
        self.brightness = 0.85 + 0.3 * bright
        self.blur = recipe.blur * (2 * blur - 1).clamp(min=0)  # half of the pictures stay sharp,
        self.noise = recipe.noise * (2 * noise - 1).clamp(min=0)  # and half of them clean
        self.grain = torch.randn(batch, 3, SIZE, SIZE, generator=random)

    def disturb(self, pictures: Tensor, rows: slice) -> Tensor:
        """Pictures (b, 3, h, w) in [-1, 1], those of `rows` of the batch."""
        shape = (-1, 1, 1, 1)
        mirrored, brightness, blur, noise = (
            v[rows].view(shape) for v in (self.mirrored, self.brightness, self.blur, self.noise)
        )
        pictures = torch.where(mirrored, pictures.flip(-1), pictures) * brightness
        pictures = _blurred(_blurred(pictures, blur), blur, across=False)
        return pictures + noise * self.grain[rows]


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
