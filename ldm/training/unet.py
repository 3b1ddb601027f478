"""Train the UNet of a latent diffusion model: `ldm train unet`.

Ho et al. 2020, arXiv:2006.11239, algorithm 1, in the latents of a frozen autoencoder and conditioned on the states of a
frozen text encoder (Rombach et al. 2022, arXiv:2112.10752, eq. 3), as Stable Diffusion v1 was: noise at a random timestep, and
the mean squared error of what the network takes for the noise. One caption in ten is replaced by the empty text, which
guidance needs (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1). Timesteps may be weighted by their signal-to-noise
ratio, cut off at `min_snr` (Hang et al. 2023, arXiv:2303.09556, section 3.4).

Autoencoder and text encoder are asked once for every picture, before the first step; the posterior's noise and the
dropout are drawn anew each time.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.unet_blocks import ResidualBlock, SpatialTransformer
from ldm.output.receipt import fingerprint
from ldm.processes import Processes
from ldm.text.tokenizer import Tokenizer
from ldm.training import model_folder
from ldm.training.cache import Contexts, Latents
from ldm.training.data import DataConfig
from ldm.training.denoising import DenoisingLoss, Draws, sample
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.parallel import Together, shares
from weights_convert.tokenizer_files import Vocabulary

SHEET_SCALE = 4.0


@dataclass(frozen=True, kw_only=True)
class UNetRecipe:
    """A run's every setting. A step is of `batch` pictures in each of `accumulation` micro-batches, which all processes share,
    `parallel` "exact", "ddp" or "fsdp" (see `parallel.py`). `min_snr` 0 weighs all errors alike. `dropout`: the share of
    empty captions. `checkpointing`: compute blocks twice rather than keep what is inside them for the backward pass.
    """

    model: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    steps: int = 100_000
    batch: int = 64
    accumulation: int = 1
    parallel: str = "exact"
    dropout: float = 0.1
    min_snr: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    checkpointing: bool = False
    log_every: int = 50
    save_every: int = 1000
    sheet_every: int = 1000


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a UNet is trained on top of, and, for fine-tuning, the UNet to begin with."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    unet: UNet | None = None

    def __post_init__(self):
        for module in (self.text_encoder, self.autoencoder):
            module.requires_grad_(False).eval()

    def fingerprint(self) -> str:
        """Of all weights: a run goes on with the networks that it was begun with."""
        modules = {"text_encoder": self.text_encoder, "autoencoder": self.autoencoder, "unet": self.unet}
        return fingerprint({name: module for name, module in modules.items() if module is not None})


def train(
    recipe: UNetRecipe, base: Base, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False
) -> None:
    """Train, or resume what was begun in `folder`; `model/` is the whole model, its UNet the moving average, at the end.

    base: gives tokenizer, text encoder and autoencoder, all frozen, and its UNet to begin with, if it has one.
    """
    check(recipe, base.autoencoder.config, base.text_encoder.config)
    shared = shares(recipe.batch, recipe.accumulation, processes)
    cache = cache or folder / "data"
    data = recipe.data.open(cache, processes, quiet=quiet)
    latents = Latents(data, base.autoencoder, cache, processes)
    contexts = Contexts(data, base.tokenizer, base.text_encoder, cache, processes)

    torch.manual_seed(recipe.seed)
    model = UNet(recipe.model)
    if base.unet is None:
        initialise(model)
    else:
        model.load_state_dict(base.unet.state_dict())
    model.checkpoint_gradients(recipe.checkpointing)
    loss = DenoisingLoss(model, recipe.schedule, recipe.min_snr)
    together = Together(loss, recipe.parallel, processes, shared, compiled=recipe.compile)
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, given={"base": base.fingerprint(), "samples": data.listing}, quiet=quiet)
    ledger.resume(model=model, optimiser=optimiser, average=average)

    batch = recipe.batch * recipe.accumulation
    for step in range(ledger.step, recipe.steps):
        indices = data.batch(recipe.seed, step, batch)
        timesteps = recipe.schedule.train_steps
        for rows in together.parts():
            draws = Draws(recipe.seed, step, rows, latents.shape, timesteps=timesteps, dropout=recipe.dropout)
            x0 = latents.draw(indices[rows], draws.posterior)
            context = contexts.rows(indices[rows], draws.dropped)
            x0, context, t, noise = (v.to(processes.device) for v in (x0, context, draws.t, draws.noise))
            with processes.precision(recipe.dtype), processes.attention():
                loss = together.loss_of(x0, t, noise, context)
            together.backward(loss, loss=loss)
        means = together.finish()
        norm = optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, **means, gradient_norm=norm.item())
        if done % recipe.sheet_every == 0 or done == recipe.steps:
            shadow = average.into(UNet(recipe.model)).to(processes.device)
            if processes.leads:
                rows = 24 * [0] if len(data) < 24 else list(range(24))
                shown = contexts.rows(rows, torch.zeros(24, dtype=torch.bool))
                how = {"side": recipe.model.sample_size, "schedule": recipe.schedule, "scale": SHEET_SCALE, "seed": recipe.seed}
                made = sample(shadow, base.autoencoder, shown, contexts.empty, **how)
                ledger.sheet(f"{done:07}", list(made.split(8)))
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, model=model, optimiser=optimiser, average=average)
    ledger.close()

    finished = average.into(UNet(recipe.model))
    if processes.leads:
        modules = {"text_encoder": base.text_encoder, "unet": finished, "autoencoder": base.autoencoder}
        vocabulary = Vocabulary(dict(base.tokenizer.vocabulary), tuple(base.tokenizer.merges))
        model_folder.write(folder / "model", modules, schedule=recipe.schedule, vocabulary=vocabulary)


def check(recipe: UNetRecipe, autoencoder: AutoencoderConfig, text: TextConfig) -> None:
    """Raises ValueError where the recipe does not fit what it is to be trained on top of."""
    side = recipe.data.size // autoencoder.downsampling
    if side != recipe.model.sample_size or recipe.data.size % autoencoder.downsampling:
        raise ValueError(
            f"data.size {recipe.data.size} with model.sample_size {recipe.model.sample_size}; "
            f"expected {autoencoder.downsampling} pixels a latent"
        )
    if recipe.model.context_width != text.width:
        widths = (recipe.model.context_width, text.width)
        raise ValueError(f"model.context_width {widths[0]} with a text encoder {widths[1]} wide; expected the same")


def initialise(model: UNet) -> None:
    """Every block begins as the identity: the last layer of each branch is zero, as in CompVis's UNet."""
    last = [model.conv_out]
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            last.append(module.conv2)
        elif isinstance(module, SpatialTransformer):
            last.append(module.proj_out)
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
