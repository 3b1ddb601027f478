"""Train a KL autoencoder on pictures alone: `ldm train autoencoder`.

The loss is the error of the reconstruction plus the KL divergence to N(0, 1) (Kingma & Welling 2013, arXiv:1312.6114), the
latter weighted so little that it does no more than keep the latents near unit scale. The error is a mix, because a plain L1
learns brightness long before it learns hue, and plain MSE leaves edges soft:

    3 MSE + 0.3 L1 + 3 MSE of the chroma + 0.15 L1 of the differences between neighbouring pixels

Stable Diffusion's own autoencoder also had a perceptual and an adversarial term (arXiv:2112.10752, appendix G), which
photographs need; the bundled model's scenes do without.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.processes import Processes, generator
from ldm.training import model_folder
from ldm.training.data import DataConfig, to_unit
from ldm.training.ledger import Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.parallel import Together, shares

NOISE = 2  # purpose of the posterior's random numbers


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """A run's every setting. A step is of `batch` pictures in each of `accumulation` micro-batches, which all processes share,
    `parallel` "exact", "ddp" or "fsdp" (see `parallel.py`). `unseen`: how many pictures that are not trained on the figures are
    of.
    """

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(warm_up=200, ema=0.999))
    steps: int = 10_000
    batch: int = 16
    accumulation: int = 1
    parallel: str = "exact"
    kl_weight: float = 1e-4
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    log_every: int = 50
    save_every: int = 1000
    sheet_every: int = 1000
    unseen: int = 256


def train(
    recipe: AutoencoderRecipe, folder: Path, processes: Processes, *, cache: Path | None = None, quiet: bool = False
) -> None:
    """Train, or resume what was begun in `folder`; its `model/autoencoder.safetensors` is the moving average at the end."""
    check(recipe)
    shared = shares(recipe.batch, recipe.accumulation, processes)
    data = recipe.data.open(cache or folder / "data", processes, quiet=quiet)
    unseen = recipe.data.open_unseen(recipe.unseen)
    shown = to_unit(unseen.images(range(len(unseen)))).to(processes.device)

    torch.manual_seed(recipe.seed)
    model = Autoencoder(recipe.model)
    loss = _Loss(model, recipe.kl_weight)
    together = Together(loss, recipe.parallel, processes, shared, compiled=recipe.compile)
    optimiser = Optimiser(model, recipe.optimiser, recipe.steps)
    average = MovingAverage(model, recipe.optimiser.ema)
    ledger = Ledger(folder, recipe, processes, given={"samples": data.listing}, quiet=quiet)
    ledger.resume(model=model, optimiser=optimiser, average=average)

    batch = recipe.batch * recipe.accumulation
    side = recipe.data.size // recipe.model.downsampling
    shape = (recipe.model.latent_channels, side, side)
    for step in range(ledger.step, recipe.steps):
        indices = data.batch(recipe.seed, step, batch)
        for rows in together.parts():
            noise = torch.stack(
                [torch.randn(shape, generator=generator(recipe.seed, step, NOISE, row)) for row in range(rows.start, rows.stop)]
            )
            images = to_unit(data.images(indices[rows])).to(processes.device, memory_format=processes.layout)
            with processes.precision(recipe.dtype):
                loss, mse, kl = together.loss_of(images, noise.to(processes.device))
            together.backward(loss, loss=loss, mse=mse, kl=kl)
        means = together.finish()
        norm = optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, **means, gradient_norm=norm.item())
        if done % recipe.sheet_every == 0 or done == recipe.steps:
            shadow = average.into(Autoencoder(recipe.model)).to(processes.device)
            if processes.leads:
                remade, latents = reconstruct(shadow, shown)
                spread = {f"latent_std_{c}": latents[:, c].std().item() for c in range(latents.shape[1])}
                ledger.log(done, psnr=psnr(remade, shown).mean().item(), **spread)
                ledger.sheet(f"{done:07}", [shown[:8], remade[:8], shown[8:16], remade[8:16]])
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, model=model, optimiser=optimiser, average=average)
    ledger.close()

    finished = average.into(Autoencoder(recipe.model)).to(processes.device)
    if processes.leads:
        finished.config = replace(finished.config, scaling_factor=scale_of(finished, shown))
        model_folder.write(folder / "model", {"autoencoder": finished})


def check(recipe: AutoencoderRecipe) -> None:
    """Raises ValueError where pictures of this size cannot be halved as often as the model does."""
    if recipe.data.size % recipe.model.downsampling:
        raise ValueError(f"data.size {recipe.data.size}; expected a multiple of {recipe.model.downsampling}")


class _Loss(nn.Module):
    """Images and N(0, 1) of the latents' shape -> loss, MSE, and KL a latent element."""

    def __init__(self, model: Autoencoder, kl_weight: float):
        super().__init__()
        self.model, self.kl_weight = model, kl_weight

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.model.encode(images)
        remade = self.model.decode(posterior.sample(noise)).float()
        kl = posterior.kl().float().mean() / noise[0].numel()
        error, mse = reconstruction_error(remade, images)
        return error + self.kl_weight * kl, mse, kl


def reconstruction_error(remade: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """The mix of this file's head, and the plain MSE; images (b, 3, h, w) in [-1, 1]."""
    error = remade - images
    chroma = error - error.mean(dim=1, keepdim=True)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mse = error.square().mean()
    return 3 * mse + 0.3 * error.abs().mean() + 3 * chroma.square().mean() + 0.15 * edges, mse


@torch.no_grad()
def reconstruct(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (b, 3, h, w) in [-1, 1], encoded to the posterior's mode and decoded; and those latents."""
    latents = torch.cat([model.encode(part).mode() for part in images.split(32)])
    return torch.cat([model.decode(part) for part in latents.split(32)]).clamp(-1, 1), latents


@torch.no_grad()
def scale_of(model: Autoencoder, images: Tensor) -> float:
    """The factor that gives these images' latents unit variance (arXiv:2112.10752, appendix G)."""
    return 1 / reconstruct(model, images)[1].std().item()


def psnr(remade: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (b,): 10 log10(2^2 / MSE), values being 2 apart at most."""
    return 10 * torch.log10(4 / F.mse_loss(remade, images, reduction="none").mean(dim=(1, 2, 3)))
