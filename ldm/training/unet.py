"""Train the UNet of a latent diffusion model: `ldm train unet`.

Ho et al. 2020, arXiv:2006.11239, algorithm 1, in the latents of a frozen autoencoder and conditioned on the states of a
frozen text encoder (Rombach et al. 2022, arXiv:2112.10752, eq. 3), as Stable Diffusion v1 was: noise at a random timestep, and
the mean squared error of what the network takes for the noise. One caption in ten is replaced by the empty text, which
guidance needs (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1). Timesteps may be weighted by their signal-to-noise
ratio, cut off at `min_snr` (Hang et al. 2023, arXiv:2303.09556, section 3.4).

Autoencoder and text encoder are asked once for every picture, before the first step; the posterior's noise and the
dropout are drawn anew each time.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conventions import make_grid
from ldm.diffusion.guidance import guided
from ldm.diffusion.schedule import ScheduleConfig, alpha_bar
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig, Posterior
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.unet_blocks import ResidualBlock, SpatialTransformer
from ldm.samplers import ddim
from ldm.text.tokenizer import Tokenizer
from ldm.training import model_folder
from ldm.training.data import DataConfig, Folder, Scenes, batch_of, keep, to_unit
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.processes import Processes, generator
from weights_convert.tokenizer_files import Vocabulary

NOISE = 4  # purpose of the random numbers: posterior, timestep, noise, dropout
SHEET = 5  # of the noise that sample sheets begin with
SHEET_STEPS, SHEET_SCALE = 25, 4.0


@dataclass(frozen=True, kw_only=True)
class UNetRecipe:
    """A run's every setting. `min_snr` 0 weighs all timesteps alike. `dropout`: the share of empty captions."""

    model: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    steps: int = 100_000
    batch: int = 64
    accumulation: int = 1
    dropout: float = 0.1
    min_snr: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
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


def train(
    recipe: UNetRecipe, base: Base, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False
) -> None:
    """Train, or resume what was begun in `folder`; `model/` is the whole model, its UNet the moving average, at the end.

    base: gives tokenizer, text encoder and autoencoder, all frozen, and its UNet to begin with, if it has one.
    """
    check(recipe, base.autoencoder.config, base.text_encoder.config)
    data = recipe.data.open(cache or folder / "data", processes)
    cache = Cache(data, base, cache or folder / "data", processes)

    torch.manual_seed(recipe.seed)
    model = UNet(recipe.model).to(processes.device, memory_format=processes.layout)
    if base.unet is None:
        initialise(model)
    else:
        model.load_state_dict(base.unet.state_dict())
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, quiet=quiet)
    ledger.resume(model=model, optimiser=optimiser, average=average)
    loss_of = processes.wrapped(_Loss(model, recipe))
    if recipe.compile:
        loss_of = torch.compile(loss_of)

    batch = recipe.batch * recipe.accumulation * processes.count
    for step in range(ledger.step, recipe.steps):
        indices = batch_of(recipe.seed, step, batch, len(data))
        draws = Draws(recipe, step, batch, cache.shape)
        for part in range(recipe.accumulation):
            rows = processes.rows(batch, part, recipe.accumulation)
            x0 = cache.latents(indices[rows], draws.posterior[rows])
            context = cache.contexts(indices[rows], draws.dropped[rows])
            t, noise = draws.t[rows], draws.noise[rows]
            x0, context, t, noise = (v.to(processes.device) for v in (x0, context, t, noise))
            with processes.precision(recipe.dtype), processes.attention():
                loss = loss_of(x0, t, noise, context)
            (loss / recipe.accumulation).backward()
        norm = optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, loss=processes.mean(loss), gradient_norm=norm.item())
        if done % recipe.sheet_every == 0 or done == recipe.steps:
            shadow = UNet(recipe.model).to(processes.device).eval()
            average.into(shadow)
            rows = 24 * [0] if len(data) < 24 else list(range(24))
            made = sample(shadow, base, cache.contexts(rows, torch.zeros(24, dtype=torch.bool)), recipe, processes)
            ledger.sheet(f"{done:07}", list(made.split(8)))
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, model=model, optimiser=optimiser, average=average)
    ledger.close()

    if processes.leads:
        average.into(model)
        modules = {"text_encoder": base.text_encoder, "unet": model.eval(), "autoencoder": base.autoencoder}
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


class _Loss(nn.Module):
    """x0 (b, c, h, w), t (b,), noise as x0, context (b, n, d) -> the mean of the weighted squared errors."""

    def __init__(self, model: UNet, recipe: UNetRecipe):
        super().__init__()
        self.model = model
        remaining = alpha_bar(recipe.schedule)
        self.v_prediction = recipe.schedule.prediction == "v_prediction"
        snr = remaining / (1 - remaining)
        weight = snr.clamp(max=recipe.min_snr) if recipe.min_snr else snr
        weight = weight / (snr + 1) if self.v_prediction else weight / snr  # of an error of v, of eps
        for name, table in (("signal", remaining.sqrt()), ("noise_std", (1 - remaining).sqrt()), ("weight", weight)):
            self.register_buffer(name, table.float().to(model.conv_in.weight.device), persistent=False)

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, context: Tensor) -> Tensor:
        signal, noise_std = self.signal[t][:, None, None, None], self.noise_std[t][:, None, None, None]
        x = signal * x0 + noise_std * noise  # arXiv:2006.11239, eq. 4
        wanted = signal * noise - noise_std * x0 if self.v_prediction else noise
        error = F.mse_loss(self.model(x, t, context).float(), wanted, reduction="none")
        return (self.weight[t] * error.mean(dim=(1, 2, 3))).mean()


class Draws:
    """The random numbers of one step's whole batch, a function of seed and step."""

    def __init__(self, recipe: UNetRecipe, step: int, batch: int, shape: tuple[int, ...]):
        random = generator(recipe.seed, step, NOISE)
        self.t = torch.randint(recipe.schedule.train_steps, (batch,), generator=random)
        self.dropped = torch.rand(batch, generator=random) < recipe.dropout
        self.posterior = torch.randn(batch, *shape, generator=random)
        self.noise = torch.randn(batch, *shape, generator=random)


class Cache:
    """What the frozen networks make of the data: the posterior of every picture, the states of every caption, in files."""

    def __init__(self, data: Scenes | Folder, base: Base, folder: Path, processes: Processes):
        autoencoder, device = base.autoencoder, processes.device
        side = data.size // autoencoder.config.downsampling
        self.shape = (autoencoder.config.latent_channels, side, side)
        self.scale = autoencoder.config.scaling_factor
        self.encode_texts = lambda texts: base.text_encoder(base.tokenizer(texts).ids.to(device)).cpu()
        with torch.no_grad():
            self.empty = self.encode_texts([""])[0]

        def moments(indices: list[int]) -> Tensor:
            posterior = autoencoder.encode(to_unit(data.images(indices)).to(device))
            return torch.stack([posterior.mean, posterior.log_variance], dim=1).cpu()

        def states(indices: list[int]) -> Tensor:
            return self.encode_texts(data.captions(indices))

        count, size = len(data), data.size
        latents = folder / f"latents-{fingerprint(autoencoder)}-{count}-{size}.npy"
        texts = folder / f"texts-{fingerprint(base.text_encoder)}-{count}.npy"
        if processes.leads:
            keep(latents, count, (2, *self.shape), moments)
            keep(texts, count, tuple(self.empty.shape), states)
        processes.wait()
        self.moments, self.states = np.load(latents, mmap_mode="r"), np.load(texts, mmap_mode="r")

    def latents(self, indices: list[int], noise: Tensor) -> Tensor:
        """A draw from each picture's posterior, scaled as the UNet wants it."""
        mean, log_variance = torch.from_numpy(self.moments[np.asarray(indices)]).float().unbind(1)
        return Posterior(mean, log_variance).sample(noise) * self.scale

    def contexts(self, indices: list[int], dropped: Tensor) -> Tensor:
        """The states of each caption; of the empty text where it is dropped."""
        states = torch.from_numpy(self.states[np.asarray(indices)]).float()
        return torch.where(dropped[:, None, None], self.empty, states)


def fingerprint(module: nn.Module) -> str:
    """A short name for a module's weights, so that what was made with others is not taken for theirs."""
    total = sum(p.detach().double().abs().sum().item() * (1 + i % 7) for i, p in enumerate(module.parameters()))
    return f"{math.frexp(total)[0]:.12f}"[2:]


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


@torch.no_grad()
def sample(unet: UNet, base: Base, contexts: Tensor, recipe: UNetRecipe, processes: Processes) -> Tensor:
    """Pictures (b, 3, h, w) of these contexts, from noise that is the same every time."""
    side = recipe.model.sample_size
    x = torch.randn(len(contexts), recipe.model.out_channels, side, side, generator=generator(recipe.seed, 0, SHEET))
    empty = base.text_encoder(base.tokenizer([""]).ids.to(processes.device)).expand(len(contexts), -1, -1)
    grid = make_grid(recipe.schedule, SHEET_STEPS, "ddim")
    model = guided(unet, empty, contexts.to(processes.device), SHEET_SCALE)
    x = ddim.sample(model, x.to(processes.device) * grid.noise_scale, grid, noise=lambda: torch.randn_like(x))
    autoencoder: Autoencoder = base.autoencoder
    return torch.cat([autoencoder.decode(part / autoencoder.config.scaling_factor) for part in x.split(8)])
