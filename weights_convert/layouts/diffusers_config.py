"""The `config.json` of each component of a diffusers folder, and the folder's other configurations, in both directions.

A config may describe models that are not Stable Diffusion v1. `FIXED` lists, for each component, the settings that decide
the function computed and the one value v1 has; a config that says otherwise is refused rather than loaded as something else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weights_convert.architecture import (
    COMPONENTS,
    Architecture,
    Autoencoder,
    ImageEncoder,
    SafetyChecker,
    Schedule,
    TextEncoder,
    UNet,
    from_json,
)
from weights_convert.errors import CheckpointError, shown

FIXED: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        **{"act_fn": "silu", "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5},
        **{"downsample_padding": 1, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "dropout": 0.0},
        **{"transformer_layers_per_block": 1, "only_cross_attention": False, "dual_cross_attention": False},
        **{"use_linear_projection": False, "class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None},
        **{"encoder_hid_dim": None, "encoder_hid_dim_type": None, "resnet_time_scale_shift": "default"},
        **{"resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional"},
        **{"time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None},
        **{"conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False},
        **{"mid_block_only_cross_attention": None, "cross_attention_norm": None},
        **{"reverse_transformer_layers_per_block": None},
    },
    "autoencoder": {
        **{"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None},
        **{"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True},
    },
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "safety": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
    "image_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3},
}

# What diffusers and transformers call our fields.
CLIP_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}
IMAGE_FIELDS = {
    **CLIP_FIELDS,
    **{"image_size": "image_size", "patch_size": "patch_size", "projection_width": "projection_dim"},
}
FIELDS: Mapping[type, Mapping[str, str]] = {
    UNet: {
        **{"in_channels": "in_channels", "out_channels": "out_channels", "level_widths": "block_out_channels"},
        **{"residual_blocks": "layers_per_block", "context_width": "cross_attention_dim", "norm_groups": "norm_num_groups"},
        "sample_size": "sample_size",
    },
    Autoencoder: {
        **{"image_channels": "in_channels", "latent_channels": "latent_channels", "level_widths": "block_out_channels"},
        **{"residual_blocks": "layers_per_block", "norm_groups": "norm_num_groups", "scaling_factor": "scaling_factor"},
    },
    TextEncoder: {**CLIP_FIELDS, "vocabulary_size": "vocab_size", "context_length": "max_position_embeddings"},
    ImageEncoder: IMAGE_FIELDS,
    SafetyChecker: IMAGE_FIELDS,
    Schedule: {
        **{"beta_start": "beta_start", "beta_end": "beta_end", "train_steps": "num_train_timesteps"},
        **{"beta_schedule": "beta_schedule", "prediction": "prediction_type"},
    },
}

COSINE = "squaredcos_cap_v2"  # what diffusers calls the cosine schedule


# -- Reading -----------------------------------------------------------------------------------------------------------


def architecture(kind: str, config: Mapping[str, Any], where: Path) -> Architecture:
    """Turn a component's config.json into our numbers. What it leaves out has the value of v1."""
    if kind == "safety":
        vision = config.get("vision_config") or config.get("vision_config_dict") or {}
        if not isinstance(vision, dict):
            raise CheckpointError(f"{where}: vision_config is {shown(vision)}; expected a JSON object")
        text_width = config.get("projection_dim", 512)  # transformers' own default; v1's file says 768
        config = {"projection_dim": text_width, **{k: v for k, v in vision.items() if k != "projection_dim"}}
    for name, expected in FIXED[kind].items():
        if config.get(name, expected) != expected:
            raise CheckpointError(f"{where}: {name} is {shown(config[name])}; Stable Diffusion v1 has {expected!r}")
    if kind == "unet":
        return _unet(config, where)
    if kind == "autoencoder":
        _check_blocks(_blocks(config, "down_block_types", where), ("DownEncoderBlock2D",), "down_block_types", where)
        _check_blocks(_blocks(config, "up_block_types", where), ("UpDecoderBlock2D",), "up_block_types", where)
    built = COMPONENTS[kind]
    return from_json(built, _renamed(built, config), str(where), FIELDS[built])


def _renamed(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `kind` that are there and not null, by our names."""
    return {ours: config[theirs] for ours, theirs in FIELDS[kind].items() if config.get(theirs) is not None}


def _unet(config: Mapping[str, Any], where: Path) -> UNet:
    down = _blocks(config, "down_block_types", where) or ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = _blocks(config, "up_block_types", where) or ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    _check_blocks(down, ("CrossAttnDownBlock2D", "DownBlock2D"), "down_block_types", where)
    mirrored = [name.replace("Down", "Up") for name in reversed(down)]
    if up != mirrored:
        raise CheckpointError(f"{where}: up_block_types is {shown(up)}; expected the way down mirrored, {shown(mirrored)}")
    # The field misnamed attention_head_dim holds the number of heads, which num_attention_heads, if set, says properly.
    heads = "num_attention_heads" if config.get("num_attention_heads") else "attention_head_dim"
    attention = [name == "CrossAttnDownBlock2D" for name in down]
    fields = {**_renamed(UNet, config), "attention_levels": attention, "heads": config.get(heads) or 8}
    size = fields.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size):  # height and width
        fields["sample_size"] = max(size)
    return from_json(UNet, fields, str(where), {**FIELDS[UNet], "attention_levels": "down_block_types", "heads": heads})


def _blocks(config: Mapping[str, Any], name: str, where: Path) -> list[str]:
    """A list of block types; empty where the config has none."""
    blocks = config.get(name) or []
    if not isinstance(blocks, list) or not all(isinstance(block, str) for block in blocks):
        raise CheckpointError(f"{where}: {name} is {shown(blocks)}; expected a list of names")
    return blocks


def _check_blocks(blocks: list[str], known: tuple[str, ...], name: str, where: Path) -> None:
    unknown = [block for block in blocks if block not in known]
    if unknown:
        raise CheckpointError(f"{where}: {name} has {shown(unknown[0])}; Stable Diffusion v1 has {' and '.join(known)}")


def schedule(config: Mapping[str, Any], where: Path) -> Schedule:
    """Turn scheduler_config.json into our numbers. What it leaves out has the value of v1."""
    for name, usual in (("trained_betas", None), ("rescale_betas_zero_snr", False)):
        if config.get(name, usual) != usual:
            raise CheckpointError(
                f"{where}: {name} is {shown(config[name])}; expected a schedule of beta_start and beta_end alone"
            )
    fields = _renamed(Schedule, config)
    if fields.get("beta_schedule") == COSINE:
        fields["beta_schedule"] = "cosine"
    return from_json(Schedule, fields, str(where), FIELDS[Schedule])


# -- Writing -----------------------------------------------------------------------------------------------------------


def _unet_config(unet: UNet) -> dict[str, Any]:
    attends = unet.attention_levels
    return {
        "_class_name": "UNet2DConditionModel",
        **FIXED["unet"],
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": list(unet.level_widths),
        "layers_per_block": unet.residual_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": unet.heads,
        "cross_attention_dim": unet.context_width,
        "norm_num_groups": unet.norm_groups,
        "sample_size": unet.sample_size,
    }


def _autoencoder_config(autoencoder: Autoencoder) -> dict[str, Any]:
    levels = len(autoencoder.level_widths)
    return {
        "_class_name": "AutoencoderKL",
        **FIXED["autoencoder"],
        "in_channels": autoencoder.image_channels,
        "out_channels": autoencoder.image_channels,
        "latent_channels": autoencoder.latent_channels,
        "block_out_channels": list(autoencoder.level_widths),
        "layers_per_block": autoencoder.residual_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": autoencoder.norm_groups,
        "scaling_factor": autoencoder.scaling_factor,
        "sample_size": 64 * 2 ** (levels - 1),
    }


def _clip_fields(clip: TextEncoder | ImageEncoder) -> dict[str, Any]:
    return {
        **{theirs: getattr(clip, ours) for ours, theirs in CLIP_FIELDS.items()},
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _text_config(text: TextEncoder) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **_clip_fields(text),
        "vocab_size": text.vocabulary_size,
        "max_position_embeddings": text.context_length,
        "projection_dim": text.width,
    }


def _safety_config(safety: SafetyChecker) -> dict[str, Any]:
    vision = {**_clip_fields(safety), "image_size": safety.image_size, "patch_size": safety.patch_size}
    return {
        "architectures": ["StableDiffusionSafetyChecker"],
        "model_type": "clip",
        "projection_dim": safety.projection_width,
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }


CONFIGS = {"unet": _unet_config, "autoencoder": _autoencoder_config, "text_encoder": _text_config, "safety": _safety_config}


def scheduler_config(schedule: Schedule) -> dict[str, Any]:
    """PNDM with the settings v1-4 was published with."""
    return {
        "_class_name": "PNDMScheduler",
        "beta_schedule": COSINE if schedule.beta_schedule == "cosine" else schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": schedule.prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def tokenizer_config(text: TextEncoder) -> dict[str, Any]:
    start, end = "<|startoftext|>", "<|endoftext|>"
    marks = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, "do_lower_case": True, **marks}


def processor_config(safety: SafetyChecker) -> dict[str, Any]:
    """The configuration of CLIP's image processor."""
    return {"image_processor_type": "CLIPImageProcessor", **preparation(safety.image_size)}


def preparation(size: int) -> dict[str, Any]:
    """CLIP's own preparation of images: bicubic to the shorter side, centre crop, mean and deviation of its training set."""
    return {
        **{"do_resize": True, "size": {"shortest_edge": size}, "resample": 3, "do_convert_rgb": True},
        **{"do_center_crop": True, "crop_size": {"height": size, "width": size}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
