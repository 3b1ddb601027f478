"""Train the judge of scenes on renders: `ldm train judge`. What it is, and what it says: `ldm/scenes/judge.py`.

Plain supervised classification, of scenes of either split: it is a measuring instrument, and must know what the models that
it measures have not seen. Noise, blur and brightness are varied, so that it does not mind how a generated picture differs
in texture from a render.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.scenes.judge import Judge, JudgeConfig, labels, verdicts
from ldm.scenes.world import Scene
from ldm.training.data import Scenes, batch_of, to_unit
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.processes import Processes, generator

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
    noise: float = 0.1
    blur: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    log_every: int = 50
    save_every: int = 500
    test_every: int = 1000


def train(recipe: JudgeRecipe, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False) -> None:
    """Train, or resume what was begun in `folder`; the result is its `judge.safetensors`."""
    data = Scenes(
        SEED, recipe.count, 64, split="any", cache=(cache or folder / "data") / f"scenes-{SEED}-{recipe.count}-64.npy"
    )
    answers = labels([data.scene(i) for i in range(len(data))])
    unseen = Scenes(UNSEEN, 1000, 64, split="any")
    test_pictures = to_unit(unseen.images(range(len(unseen)))).to(processes.device)
    test_scenes = [unseen.scene(i) for i in range(len(unseen))]

    torch.manual_seed(recipe.seed)
    model = Judge(recipe.model).to(processes.device, memory_format=processes.layout)
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, quiet=quiet)
    if state := ledger.resume():
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.load_state_dict(state["average"])
    judge = processes.wrapped(model)

    batch = recipe.batch * recipe.accumulation * processes.count
    for step in range(ledger.step, recipe.steps):
        indices = batch_of(recipe.seed, step, batch, len(data))
        for part in range(recipe.accumulation):
            rows = processes.rows(batch, part, recipe.accumulation)
            pictures = disturbed(to_unit(data.images(indices[rows])), recipe, step, rows)
            pictures = pictures.to(processes.device, memory_format=processes.layout)
            with processes.precision(recipe.dtype):
                loss = loss_of(judge(pictures), [a[indices[rows]].to(processes.device) for a in answers])
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
        save_file(tensors, folder / "judge.safetensors", metadata={"format": "pt"})


def loss_of(logits: tuple[Tensor, ...], answers: list[Tensor]) -> Tensor:
    """Cross-entropy of layout, colours and shapes, each a mean."""
    return sum(F.cross_entropy(said.flatten(0, -2), right.flatten()) for said, right in zip(logits, answers, strict=True))


def disturbed(pictures: Tensor, recipe: JudgeRecipe, step: int, rows: slice) -> Tensor:
    """Pictures (b, 3, h, w), each a little brighter or darker, blurred and noisy, by numbers of its row of the batch."""
    found = []
    for row, picture in zip(range(rows.start, rows.stop), pictures, strict=True):
        random = generator(recipe.seed, step * 65536 + row, DISTURBANCE)
        bright, soft, noisy = torch.rand(3, generator=random).tolist()
        picture = picture * (0.85 + 0.3 * bright) + 0.1 * (bright - 0.5)
        if soft > 0.4:
            picture = _blurred(picture, recipe.blur * (soft - 0.4) / 0.6)
        found.append(picture + recipe.noise * max(noisy - 0.3, 0) * torch.randn(picture.shape, generator=random))
    return torch.stack(found)


def _blurred(picture: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of five pixels' width: (3, h, w) -> (3, h, w)."""
    kernel = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / max(sigma, 0.1)) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 5)
    padded = F.pad(picture[:, None], (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))[:, 0]


def accuracy(judge: nn.Module, pictures: Tensor, scenes: list[Scene]) -> float:
    """The share of pictures of which the judge says layout, every colour and every shape as they are."""
    said = verdicts(judge, pictures)
    return sum(is_right(scene, *verdict) for scene, verdict in zip(scenes, said, strict=True)) / len(scenes)


def is_right(scene: Scene, layout: str, nouns: tuple) -> bool:
    """Whether a verdict names the scene's layout and contents, sizes aside."""
    return layout == scene.layout and [noun[1:] for noun in nouns] == [noun[1:] for noun in scene.nouns]
