"""The independent implementations that this project is compared with, built from the same configs, and folders of their making.

Needs the extra `reference`. Nothing here imports our models: what it writes to disk is theirs alone.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests import seeded


def text_encoder(config) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            projection_dim=config.width,
        )
    ).eval()


def image_encoder(config) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(_vision_config(config)).eval()


def safety_checker(config) -> StableDiffusionSafetyChecker:
    vision = _vision_config(config).to_dict()
    return StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=config.projection_width)).eval()


def _vision_config(config) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        projection_dim=config.projection_width,
    )


def unet(config) -> UNet2DConditionModel:
    attends = config.attention_levels
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.level_widths,
        layers_per_block=config.residual_blocks,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_width,
        norm_num_groups=config.norm_groups,
        sample_size=config.sample_size,
    ).eval()


def autoencoder(config) -> AutoencoderKL:
    levels = len(config.level_widths)
    return AutoencoderKL(
        block_out_channels=config.level_widths,
        layers_per_block=config.residual_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scaling_factor,
        sample_size=64 * 2 ** (levels - 1),
    ).eval()


class ExactTimesteps(nn.Module):
    """A float64 version of diffusers' sinusoids, for use in the float64 truth: theirs stay float32 in a float64 model."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(
            -torch.log(torch.tensor(1e4, dtype=torch.float64)) * torch.arange(self.width // 2) / (self.width // 2)
        )
        angles = t.double()[:, None] * frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def exact_timesteps(peer: UNet2DConditionModel) -> UNet2DConditionModel:
    """The peer with its sinusoids in float64."""
    peer.time_proj = ExactTimesteps(peer.config.block_out_channels[0])
    return peer


def write_folder(path: Path, model, vocabulary: Path, safety=None, seed: int = 0, **options) -> Path:
    """Write a diffusers folder of seeded random weights, by diffusers and transformers themselves.

    model: an `ldm.presets.ModelConfig`; vocabulary: a folder with vocab.json and merges.txt; safety: a SafetyConfig or None.
    """
    processor = CLIPImageProcessor(size=safety.image_size, crop_size=safety.image_size) if safety else None
    pipeline = StableDiffusionPipeline(
        vae=seeded.fill(autoencoder(model.autoencoder), seed),
        text_encoder=seeded.fill(text_encoder(model.text_encoder), seed),
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary, model_max_length=model.text_encoder.context_length),
        unet=seeded.fill(unet(model.unet), seed),
        scheduler=scheduler(model.schedule),
        safety_checker=seeded.fill(safety_checker(safety), seed) if safety else None,
        feature_extractor=processor,
        requires_safety_checker=safety is not None,
    )
    pipeline.save_pretrained(path, **options)
    return path


def scheduler(schedule) -> PNDMScheduler:
    fields = asdict(schedule)
    return PNDMScheduler(
        beta_schedule=fields["beta_schedule"],
        beta_start=fields["beta_start"],
        beta_end=fields["beta_end"],
        num_train_timesteps=fields["train_steps"],
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
