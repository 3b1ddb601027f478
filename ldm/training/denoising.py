"""What scripts that train a denoiser share: the loss, a step's random numbers, and pictures to look at in between.

Ho et al. 2020, arXiv:2006.11239, algorithm 1: noise at a random timestep, and the mean squared error of what the network takes
for the noise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.conventions import make_grid
from ldm.diffusion.guidance import guided, levels_of
from ldm.diffusion.schedule import ScheduleConfig, alpha_bar
from ldm.models.autoencoder import Autoencoder
from ldm.models.unet import UNet
from ldm.processes import generator
from ldm.samplers import ddim

NOISE = 4  # purpose of the random numbers: posterior, timestep, noise, dropout
SHEET = 5  # of the noise that sample sheets begin with
SHEET_STEPS = 25


class DenoisingLoss(nn.Module):
    """x0 (b, c, h, w), t (b,), noise as x0, context (b, n, d) -> the mean of the weighted squared errors.

    min_snr: where timesteps' weights by signal-to-noise ratio are cut off (Hang et al. 2023, arXiv:2303.09556, section 3.4); 0
    weighs all errors of what the model predicts alike.
    """

    def __init__(self, model: UNet, schedule: ScheduleConfig, min_snr: float):
        super().__init__()
        self.model = model
        remaining = alpha_bar(schedule)
        self.v_prediction = schedule.prediction == "v_prediction"
        snr = remaining / (1 - remaining)
        cut = snr.clamp(max=min_snr)
        weight = cut / (snr + 1) if self.v_prediction else cut / snr  # of an error of v, of eps
        if not min_snr:
            weight = torch.ones_like(snr)
        for name, table in (("signal", remaining.sqrt()), ("noise_std", (1 - remaining).sqrt()), ("weight", weight)):
            self.register_buffer(name, table.float().to(model.conv_in.weight.device), persistent=False)

    def forward(self, x0: Tensor, t: Tensor, noise: Tensor, context: Tensor) -> Tensor:
        signal, noise_std = self.signal[t][:, None, None, None], self.noise_std[t][:, None, None, None]
        x = signal * x0 + noise_std * noise  # arXiv:2006.11239, eq. 4
        wanted = signal * noise - noise_std * x0 if self.v_prediction else noise
        error = F.mse_loss(self.model(x, t, context).float(), wanted, reduction="none")
        return (self.weight[t] * error.mean(dim=(1, 2, 3))).mean()


class Draws:
    """The random numbers of some rows of one step's batch, each a function of seed, step and row.

    shape: of one picture's latents. t (rows,); dropped (rows,), whether the caption is; posterior and noise (rows, *shape).
    """

    def __init__(self, seed: int, step: int, rows: slice, shape: tuple[int, ...], *, timesteps: int, dropout: float):
        sources = [generator(seed, step, NOISE, row) for row in range(rows.start, rows.stop)]
        self.t = torch.cat([torch.randint(timesteps, (1,), generator=source) for source in sources])
        self.dropped = torch.cat([torch.rand(1, generator=source) for source in sources]) < dropout
        self.posterior = torch.stack([torch.randn(shape, generator=source) for source in sources])
        self.noise = torch.stack([torch.randn(shape, generator=source) for source in sources])


@torch.no_grad()
def sample(
    unet: UNet,
    autoencoder: Autoencoder,
    contexts: Tensor,
    empty: Tensor,
    *,
    side: int,
    schedule: ScheduleConfig,
    scale: float,
    seed: int,
) -> Tensor:
    """Pictures (b, 3, h, w) in [-1, 1] of contexts (b, n, d), from noise that is the same every time.

    empty: the context of the empty text, (n, d). side: of the latents. scale: of the guidance.
    """
    device = unet.conv_in.weight.device
    shape = (len(contexts), unet.config.out_channels, side, side)
    x = torch.randn(shape, generator=generator(seed, 0, SHEET)).to(device)
    grid = make_grid(schedule, SHEET_STEPS, "ddim")
    contexts, empty = contexts.to(device), empty.to(device).expand(len(contexts), -1, -1)
    v_levels = levels_of(grid) if schedule.prediction == "v_prediction" else None
    model = guided(unet, empty, contexts, scale, v_levels=v_levels)
    x = ddim.sample(model, x * grid.noise_scale, grid, noise=lambda: torch.randn_like(x))
    return torch.cat([autoencoder.decode(part / autoencoder.config.scaling_factor) for part in x.split(8)])
