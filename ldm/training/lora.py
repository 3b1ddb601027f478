"""Train a LoRA on a folder of pictures with captions: `ldm train lora`.

Hu et al. 2021, arXiv:2106.09685, section 4.1: of some of a model's layers, small factors beside the weights are trained and
nothing else, with the loss that the UNet was trained with. What comes out is one small file, in kohya's spelling, for any
program that knows Stable Diffusion v1.

Beside the file `NAME.safetensors`, the folder `NAME.run` has what `ledger.py` tells of, and `loras/`, the LoRA as it was
at every sheet. A sheet's rows are pictures that are trained on, and what the model makes of their captions without and with it.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters import lora
from ldm.checkpoint import Components
from ldm.diffusion.schedule import ScheduleConfig
from ldm.output.receipt import fingerprint
from ldm.processes import Processes, generator
from ldm.training.cache import Contexts, Latents, Tokens
from ldm.training.data import Data, DataConfig, to_unit
from ldm.training.denoising import DenoisingLoss, Draws, sample
from ldm.training.ledger import CHECKPOINT, Ledger
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig
from ldm.training.parallel import Together, shares
from weights_convert.lora import write_lora
from weights_convert.naming.lora import Layer, layer_shapes

LAYERS = {
    "attention": r".*attention\.(query|key|value|output)",
    "transformer": r".*\.attention\..*|layers\..*",  # and feed-forward layers, and what leads into and out of transformers
    "all": r".*",  # and every convolution
}
BEGINNING = 6  # purpose of the random numbers: what the factors begin as
ON_A_SHEET = 8  # pictures a row


@dataclass(frozen=True, kw_only=True)
class LoRARecipe:
    """A run's every setting. What is learned is (alpha / rank) up down, `rank` being the inner side of the factors.

    A step is of `batch` pictures in each of `accumulation` micro-batches, which all processes share, `parallel` "exact" or
    "ddp" (see `parallel.py`). `layers`: attention, transformer or all; of the UNet, and with `text_encoder` of the text
    encoder. `dropout`: the share of empty captions. `min_snr` 0 weighs all errors alike. The learning rate is kept after a
    warm-up of 50 steps, and the result is not averaged over steps, unless `optimiser` says so.
    """

    rank: int = 16
    alpha: float = 16.0
    layers: str = "attention"
    text_encoder: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(warm_up=50, clip=1.0, ema=0.0))
    steps: int = 1000
    batch: int = 4
    accumulation: int = 1
    parallel: str = "exact"
    dropout: float = 0.0
    min_snr: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    log_every: int = 10
    save_every: int = 250
    sheet_every: int = 250


def train(recipe: LoRARecipe, base: Components, out: Path, processes: Processes, *, quiet: bool = False) -> None:
    """Train, or resume what was begun, and write `out`, a `.safetensors` file that appears when it is whole.

    base: whose layers the LoRA is of; its modules are frozen, and never changed.
    """
    folder = out.with_suffix(".run")
    check(recipe, base, out)
    shared = shares(recipe.batch, recipe.accumulation, processes)
    data = recipe.data.open(folder / "data", processes, quiet=quiet)
    base.unet.to(memory_format=processes.layout)
    for module in (base.text_encoder, base.unet, base.autoencoder):
        module.requires_grad_(False).eval()
    latents = Latents(data, base.autoencoder, folder / "data", processes)
    if recipe.text_encoder:
        texts = Tokens(data, base.tokenizer)
    else:
        texts = Contexts(data, base.tokenizer, base.text_encoder, folder / "data", processes)

    random = generator(recipe.seed, 0, BEGINNING)
    model, pairs = lora.with_pairs(base, layers_of(recipe, base), recipe.rank, recipe.alpha, random)
    factors = nn.ModuleList(pairs.values())
    together = Together(_Loss(model, base.schedule, recipe), recipe.parallel, processes, shared, compiled=recipe.compile)
    optimiser = Optimiser(factors, recipe.optimiser, recipe.steps)
    average = MovingAverage(factors, recipe.optimiser.ema)
    modules = {"text_encoder": base.text_encoder, "unet": base.unet, "autoencoder": base.autoencoder}
    ledger = Ledger(folder, recipe, processes, given={"model": fingerprint(modules), "samples": data.listing}, quiet=quiet)
    ledger.resume(factors=factors, optimiser=optimiser, average=average)

    batch = recipe.batch * recipe.accumulation
    for step in range(ledger.step, recipe.steps):
        indices = data.batch(recipe.seed, step, batch)
        timesteps = base.schedule.train_steps
        for rows in together.parts():
            draws = Draws(recipe.seed, step, rows, latents.shape, timesteps=timesteps, dropout=recipe.dropout)
            x0 = latents.draw(indices[rows], draws.posterior)
            text = texts.rows(indices[rows], draws.dropped)
            x0, text, t, noise = (v.to(processes.device) for v in (x0, text, draws.t, draws.noise))
            with processes.precision(recipe.dtype), processes.attention():
                loss = together.loss_of(x0, t, noise, text)
            together.backward(loss, loss=loss)
        means = together.finish()
        norm = optimiser.step(step)
        average.update(step)

        done = step + 1
        ledger.advance()
        if done % recipe.log_every == 0:
            ledger.log(done, **means, gradient_norm=norm.item())
        if done % recipe.sheet_every == 0 or done == recipe.steps:
            if processes.leads:
                file = save(folder / "loras" / f"{done:07}.safetensors", recipe, base, list(pairs), average, done)
                ledger.sheet(f"{done:07}", sheet(recipe, base, file, data))
            processes.wait()
        if done % recipe.save_every == 0 or done == recipe.steps:
            ledger.save(done, factors=factors, optimiser=optimiser, average=average)
    ledger.close()

    if processes.leads:
        os.replace(save(folder / out.name, recipe, base, list(pairs), average, max(ledger.step, recipe.steps)), out)


def check(recipe: LoRARecipe, base: Components, out: Path) -> None:
    """Raises ValueError where nothing can be trained so, or something would be lost."""
    latents, coarsest = base.autoencoder.config, 2 ** (len(base.unet.config.level_widths) - 1)
    if base.unet.config.in_channels != latents.latent_channels:
        raise ValueError(
            f"the UNet takes {base.unet.config.in_channels} channels; expected {latents.latent_channels}: "
            "a LoRA for inpainting is trained on the model that inpainting was made from"
        )
    if recipe.data.size % (latents.downsampling * coarsest):
        raise ValueError(f"data.size {recipe.data.size}; expected a multiple of {latents.downsampling * coarsest}")
    if recipe.parallel == "fsdp":
        raise ValueError("parallel fsdp; expected exact or ddp: the factors of a LoRA are small, and the model does not change")
    if recipe.layers not in LAYERS:
        raise ValueError(f"layers {recipe.layers!r}; expected {', '.join(LAYERS)}")
    if not 0 <= recipe.dropout <= 1:
        raise ValueError(f"dropout {recipe.dropout}; expected 0 to 1")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: a LoRA is a .safetensors file; name one")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}; create it first")
    if out.exists() and not (out.with_suffix(".run") / CHECKPOINT).exists():
        raise ValueError(f"{out}: exists already, and is of no run that could go on; give another name or remove it first")


def layers_of(recipe: LoRARecipe, base: Components) -> list[Layer]:
    """The layers that are trained, (kind, path), in the order data flows through them."""
    kinds = ("text_encoder", "unet") if recipe.text_encoder else ("unet",)
    shapes = {kind: made for kind, made in lora.architectures(base).items() if kind in kinds}
    return [layer for layer, _ in layer_shapes(shapes) if re.fullmatch(LAYERS[recipe.layers], layer[1])]


class _Loss(nn.Module):
    """As the UNet's; where the text encoder is trained too, of token ids instead of contexts."""

    def __init__(self, model: Components, schedule: ScheduleConfig, recipe: LoRARecipe):
        super().__init__()
        self.text_encoder = model.text_encoder if recipe.text_encoder else nn.Identity()
        self.denoising = DenoisingLoss(model.unet, schedule, recipe.min_snr)

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        return self.denoising(x0, t, noise, self.text_encoder(text))


def save(path: Path, recipe: LoRARecipe, base: Components, layers: list[Layer], average: MovingAverage, step: int) -> Path:
    """Write the factors as they are on average, with what kohya's files and their readers tell of a LoRA."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # of a run that was killed between here and its checkpoint
    values = average.state_dict()
    factors = {layer: (values[f"{i}.down"], values[f"{i}.up"], recipe.alpha) for i, layer in enumerate(layers)}
    told = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": recipe.rank,
        "ss_network_alpha": recipe.alpha,
        "ss_base_model_version": "sd_v1",
        "ss_sd_model_name": base.name,
        "ss_resolution": f"({recipe.data.size}, {recipe.data.size})",
        "ss_learning_rate": recipe.optimiser.learning_rate,
        "ss_steps": step,
        "ss_seed": recipe.seed,
        "ldm_recipe": json.dumps(asdict(recipe) | {"data": {"size": recipe.data.size}}),
    }
    write_lora(path, factors, lora.architectures(base), {key: str(value) for key, value in told.items()})
    return path


@torch.no_grad()
def sheet(recipe: LoRARecipe, base: Components, file: Path, data: Data) -> list[Tensor]:
    """Rows of pictures (b, 3, h, w): of the data, and of its captions without the LoRA and with it, as it is in the file."""
    shown = list(range(min(ON_A_SHEET, len(data))))
    rows = [] if data.encoding else [to_unit(data.images(shown))]
    for model in (base, lora.attach(base, [(lora.read(file, base), 1.0)])):
        ids = base.tokenizer(["", *data.captions(shown)]).ids.to(model.unet.conv_in.weight.device)
        empty, *contexts = model.text_encoder(ids)
        side = recipe.data.size // base.autoencoder.config.downsampling
        how = {"side": side, "schedule": base.schedule, "scale": base.guidance_scale, "seed": recipe.seed}
        rows.append(sample(model.unet, base.autoencoder, torch.stack(contexts), empty, **how).cpu())
    return rows
