"""Named models: the configs of a whole model, defaults = SD v1-4."""

from dataclasses import dataclass

from ldm.diffusion.schedule import ScheduleConfig
from ldm.models import unet
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.clip import TextConfig
from ldm.models.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's tensors and what they compute."""

    text_encoder: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    schedule: ScheduleConfig = ScheduleConfig()


PRESETS = {
    "sd-v1": ModelConfig(),
    # The UNet also sees the mask (1 channel) and the latents of the image without what it hides (4).
    "sd-v1-inpainting": ModelConfig(unet=UNetConfig(in_channels=9)),
    # Every part of SD v1 at the smallest size that still tells them apart, for tests and for reading along in a debugger.
    "tiny": ModelConfig(
        text_encoder=TextConfig(width=32, layers=2, heads=4, mlp_width=64),
        unet=UNetConfig(
            level_widths=(16, 32, 48), attention_levels=(True, True, False), heads=4, context_width=32, norm_groups=8
        ),
        autoencoder=AutoencoderConfig(level_widths=(8, 16, 16, 24), norm_groups=4),
    ),
}


def preset(name: str) -> ModelConfig:
    """The model of this name. Raises ValueError naming those there are."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def table(name: str, size: int = 64) -> str:
    """The UNet of a preset, block by block, for latents size x size."""
    return unet.table(preset(name).unet, size)
