"""Train a text encoder by contrast with pictures: `ldm train clip`.

Radford et al. 2021, arXiv:2103.00020, section 2.3: of a batch of pictures and captions, say which belong together. Two things
are different here. Where the data are scenes, every picture brings a second caption that is almost true (Yuksekgonul et al.
2022, arXiv:2210.01936, section 5), for otherwise a bag of words would do and word order would be learnt late or never. And
captions that are true of several pictures of the batch count for all of them.

The embedding of a text is its state at the first end token, without a further projection; the image tower projects into
its width. What the UNet will see, all the states, is trained only through that one.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip import ImageConfig, ImageEncoder, TextConfig, TextEncoder, normalised, pool
from ldm.processes import Processes
from ldm.scenes import captions
from ldm.scenes.captions import Statement
from ldm.scenes.world import Scene
from ldm.text.cut import cut_vocabulary
from ldm.text.tokenizer import Tokenizer
from ldm.training import model_folder
from ldm.training.data import Data, DataConfig, Scenes
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.parallel import Together, shares
from weights_convert.tokenizer_files import Vocabulary

SHARPEST = math.log(100.0)  # the most that the logits' scale may grow to (section 2.5)


@dataclass(frozen=True, kw_only=True)
class CLIPRecipe:
    """A run's every setting. `vocabulary`: "clip" for CLIP's own, "scenes" for what captions of scenes need of it.

    `batch`: of all processes together, each of which embeds a part of it. `parallel`: "exact", "ddp" or "fsdp" (`parallel.py`).
    `unseen`: how many pictures that are not trained on the tests are of.
    """

    text: TextConfig = field(default_factory=TextConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    vocabulary: str = "clip"
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(
            learning_rate=5e-4, warm_up=500, cool_down=0.5, beta2=0.98, weight_decay=0.1, clip=1.0, ema=0.998
        )
    )
    steps: int = 10_000
    batch: int = 128
    accumulation: int = 1
    parallel: str = "exact"
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    log_every: int = 50
    save_every: int = 500
    test_every: int = 500
    unseen: int = 512


class CLIP(nn.Module):
    """Both towers, and the scale of their cosines."""

    def __init__(self, text: TextConfig, image: ImageConfig):
        super().__init__()
        self.text = TextEncoder(text)
        self.image = ImageEncoder(image)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        _initialise(self.text)
        _initialise(self.image)

    def forward(self, pixels: Tensor, ids: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (b, 3, s, s) and token ids (n, m) -> unit embeddings (b, d), (n, d), and the scale."""
        return self.pictures(pixels), self.texts(ids, end), self.log_scale.clamp(max=SHARPEST).exp()

    def pictures(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.image(pixels).float(), dim=-1)

    def texts(self, ids: Tensor, end: int) -> Tensor:
        return F.normalize(pool(self.text(ids), ids, end).float(), dim=-1)


def train(recipe: CLIPRecipe, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False) -> None:
    """Train, or resume what was begun in `folder`; `model/` has the moving average of both towers at the end."""
    check(recipe)
    shared = shares(recipe.batch, recipe.accumulation, processes)
    vocabulary = Vocabulary(*cut_vocabulary(captions.grammar_words())) if recipe.vocabulary == "scenes" else None
    length = recipe.text.context_length
    tokenizer = Tokenizer(vocabulary.tokens, vocabulary.merges, length) if vocabulary else Tokenizer.clip(length)
    if len(tokenizer.vocabulary) > recipe.text.vocabulary_size:
        sizes = (recipe.text.vocabulary_size, len(tokenizer.vocabulary))
        raise ValueError(f"text.vocabulary_size {sizes[0]} for {sizes[1]} tokens; expected at least that many")
    data = recipe.data.open(cache or folder / "data", processes, quiet=quiet)
    unseen = recipe.data.open_unseen(recipe.unseen)

    torch.manual_seed(recipe.seed)
    model = CLIP(recipe.text, recipe.image)
    together = Together(model, recipe.parallel, processes, shared, compiled=recipe.compile)
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, given={"samples": data.listing}, quiet=quiet)
    ledger.resume(model=model, optimiser=optimiser, average=average)

    for step in range(ledger.step, recipe.steps):
        pairs = Pairs(data, data.batch(recipe.seed, step, recipe.batch), (recipe.seed, step))
        (rows,) = together.parts()
        pixels = normalised(data.images(pairs.indices[rows]).to(processes.device) / 255)
        ids = _short(tokenizer(pairs.texts[rows] + pairs.false_texts[rows]).ids, tokenizer.end).to(processes.device)
        with processes.precision(recipe.dtype), processes.attention():
            pictures, texts, scale = together.loss_of(pixels, ids, tokenizer.end)
        true, false = texts[: len(pictures)], texts[len(pictures) :]
        pictures, true, false = (_gathered(part, processes) for part in (pictures, true, false))
        loss, right = contrast(pictures, true, false, scale, pairs.matches.to(processes.device))
        together.backward(loss, loss=loss, right=right, scale=scale)
        means = together.finish()
        norm = optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, **means, gradient_norm=norm.item())
        if done % recipe.test_every == 0 or done == recipe.steps:
            shadow = average.into(CLIP(recipe.text, recipe.image)).to(processes.device)
            if processes.leads:
                ledger.log(done, **_test(shadow, unseen, tokenizer, processes))
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, model=model, optimiser=optimiser, average=average)
    ledger.close()

    finished = average.into(CLIP(recipe.text, recipe.image))
    if processes.leads:
        modules = {"text_encoder": finished.text, "image_encoder": finished.image}
        model_folder.write(folder / "model", modules, vocabulary=vocabulary)


def check(recipe: CLIPRecipe) -> None:
    """Raises ValueError where parts of the recipe do not fit each other."""
    if recipe.accumulation != 1:
        raise ValueError(f"accumulation {recipe.accumulation}; contrasts are within a micro-batch, so it must be 1 here")
    if recipe.data.size != recipe.image.image_size:
        raise ValueError(f"data.size {recipe.data.size} with image.image_size {recipe.image.image_size}; expected the same")
    if recipe.image.width % 4:
        raise ValueError(f"image.width {recipe.image.width}; expected a multiple of 4, for the waves that places begin as")
    if recipe.image.projection_width != recipe.text.width:
        widths = (recipe.image.projection_width, recipe.text.width)
        raise ValueError(f"image.projection_width {widths[0]} with text.width {widths[1]}; expected the same")
    if recipe.vocabulary not in ("clip", "scenes"):
        raise ValueError(f"vocabulary {recipe.vocabulary!r}; expected clip or scenes")


def contrast(pictures: Tensor, true: Tensor, false: Tensor, scale: Tensor, matches: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of unit embeddings, (b, d) each, `false` possibly (0, d); and how often a picture's best text is a true one.

    matches (b, b): whether text j is true of picture i. All texts that are share the picture's probability, and the other
    way round.
    """
    to_texts = scale * pictures @ torch.cat([true, false]).T
    to_pictures = scale * true @ pictures.T
    wanted = matches.float()
    padded = F.pad(wanted, (0, len(false)))
    loss = F.cross_entropy(to_texts, padded / padded.sum(1, keepdim=True))
    loss = loss + F.cross_entropy(to_pictures, (wanted / wanted.sum(0, keepdim=True)).T)
    right = padded.gather(1, to_texts.argmax(1, keepdim=True)).mean()
    return loss / 2, right


class Pairs:
    """A batch: `indices` of pictures, a true text each, of scenes an almost true one too, and who matches whom."""

    def __init__(self, data: Data, indices: list[int], key: tuple[int, ...]):
        self.indices = indices
        if not isinstance(data, Scenes):
            self.texts, self.false_texts = data.captions(indices), []
            self.matches = torch.tensor([[a == b for b in self.texts] for a in self.texts])
            return
        rng = np.random.default_rng((*key, 2))
        scenes = [data.scene(i) for i in indices]
        statements = [captions.state(scene, rng) for scene in scenes]
        self.texts = [captions.words(statement, rng) for statement in statements]
        self.false_texts = [
            captions.words(captions.confused(statement, scene, rng), rng)
            for statement, scene in zip(statements, scenes, strict=True)
        ]
        self.matches = _matches(scenes, statements)


def _matches(scenes: list[Scene], statements: list[Statement]) -> Tensor:
    """(b, b): whether statement j holds of scene i. Only those of the same colours and shapes need to be looked at."""
    found = torch.eye(len(scenes), dtype=torch.bool)
    alike: dict[tuple, list[int]] = {}
    for i, scene in enumerate(scenes):
        alike.setdefault(tuple(sorted(noun[1:] for noun in scene.nouns)), []).append(i)
    for group in alike.values():
        for i in group:
            for j in group:
                found[i, j] = captions.holds(statements[j], scenes[i].layout, scenes[i].nouns)
    return found


@torch.no_grad()
def _test(model: CLIP, unseen: Data, tokenizer: Tokenizer, processes: Processes) -> dict[str, float]:
    """On pictures that are not trained on: how often the true text beats all others of the set; the almost true one; and, by
    the axis that two solids stand along, the one that says the opposite."""
    pairs = Pairs(unseen, list(range(len(unseen))), (0,))

    def embedded(texts: list[str]) -> Tensor:
        return model.texts(_short(tokenizer(texts).ids, tokenizer.end).to(processes.device), tokenizer.end)

    pictures = model.pictures(normalised(unseen.images(pairs.indices).to(processes.device) / 255))
    count = len(pictures)
    cosines = pictures @ embedded(pairs.texts + pairs.false_texts).T
    own = cosines[:, :count].diagonal()
    matches = pairs.matches.to(processes.device)
    found = {"test_retrieval": matches.gather(1, cosines[:, :count].argmax(1, keepdim=True)).float().mean().item()}
    if not pairs.false_texts:
        return found
    found["test_true_over_false"] = (own > cosines[:, count:].diagonal()).float().mean().item()
    scenes = [unseen.scene(i) for i in pairs.indices]
    for layout in ("side by side", "stacked", "in depth"):
        chosen = [i for i, scene in zip(pairs.indices, scenes, strict=True) if scene.layout == layout]
        if not chosen:  # of a few pictures that are looked at
            continue
        said = [captions.plain(scenes[i], np.random.default_rng(i)) for i in chosen]
        both = [captions.words(s) for s in said] + [captions.words(captions.opposite(s)) for s in said]
        true, false = ((pictures[chosen] * part).sum(1) for part in embedded(both).chunk(2))
        found[f"test_{layout.replace(' ', '_')}"] = (true > false).float().mean().item()
    return found


def _short(ids: Tensor, end: int) -> Tensor:
    """Without the padding that all share. The transformer looks backwards only, so the states that count stay the same."""
    longest = int((ids == end).int().argmax(dim=1).max())
    return ids[:, : longest + 1]


def _gathered(rows: Tensor, processes: Processes) -> Tensor:
    """All processes' rows, in the order of the whole batch."""
    return rows if processes.count == 1 else _Gather.apply(rows, processes.rank, processes.count)


class _Gather(torch.autograd.Function):
    """Every process computes the same loss from all rows. A row's gradient is the sum of what it is in each, so that after
    the weights' gradients are averaged over the processes, each row has counted once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, count: int) -> Tensor:
        ctx.own = slice(rank * len(rows), (rank + 1) * len(rows))
        parts = [torch.empty_like(rows) for _ in range(count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.own], None, None


def _initialise(tower: TextEncoder | ImageEncoder) -> None:
    """Radford et al.'s: small embeddings, and projections into the residual stream the smaller the deeper the tower. But the
    places of patches begin as waves about as large as what patches hold; from small noise, left and right were never learnt."""
    width, layers = tower.config.width, tower.config.layers
    normal = nn.init.normal_
    if isinstance(tower, TextEncoder):
        normal(tower.position_embedding.weight, std=0.01)
        normal(tower.token_embedding.weight, std=0.02)
    else:
        normal(tower.class_embedding, std=width**-0.5)
        tower.position_embedding.weight.data[0] = 0
        tower.position_embedding.weight.data[1:] = 0.5 * waves(tower.config.image_size // tower.config.patch_size, width)
        normal(tower.projection.weight, std=width**-0.5)
    into_residual = width**-0.5 * (2 * layers) ** -0.5
    for layer in tower.layers:
        for linear in (layer.attention.query, layer.attention.key, layer.attention.value):
            normal(linear.weight, std=width**-0.5)
        normal(layer.attention.output.weight, std=into_residual)
        normal(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)
        normal(layer.mlp.fc2.weight, std=into_residual)


def waves(side: int, width: int) -> Tensor:
    """Embeddings (side * side, width) of the places of a square of patches: sine and cosine of row and column at width / 4
    frequencies, of wavelengths from 2 pi patches to 2 pi sides (after Beyer et al. 2022, arXiv:2205.01580, section 2)."""
    frequencies = side ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)
