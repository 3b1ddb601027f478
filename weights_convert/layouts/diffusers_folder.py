"""The diffusers folder: one subfolder a component, with its weights and a `config.json` that says how to build it.

A config may describe models that are not Stable Diffusion v1. `FIXED` lists, for each component, the settings that decide
the function computed and the one value v1 has; a config that says otherwise is refused rather than loaded as something else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weights_convert.architecture import (
    Architecture,
    Autoencoder,
    ImageEncoder,
    SafetyChecker,
    Schedule,
    TextEncoder,
    UNet,
    from_json,
)
from weights_convert.checkpoint import Checkpoint
from weights_convert.component import Component, match
from weights_convert.containers import open_tensors
from weights_convert.detect import components
from weights_convert.errors import CheckpointError
from weights_convert.files import appearing_folder, read_json, write_json
from weights_convert.layouts.single_file import POSITION_IDS
from weights_convert.naming import to_foreign
from weights_convert.tokenizer_files import clip_vocabulary, read_vocabulary, write_vocabulary

FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "autoencoder": "vae", "safety": "safety_checker"}
REQUIRED = ("text_encoder", "unet", "autoencoder")
PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionInpaintPipeline", "StableDiffusionInpaintPipelineLegacy"),
)
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
}


# -- Reading -----------------------------------------------------------------------------------------------------------


def read(path: Path, *, variant: str = "auto", ignore: Sequence[str] = ()) -> Checkpoint:
    """Read the model in folder `path`. `variant`: "fp16" for the files so marked, "" for the plain ones, "auto" for the
    plain ones where they are there."""
    if (path / "model_index.json").exists():
        pipeline = read_json(path / "model_index.json").get("_class_name")
        if pipeline not in PIPELINES:
            raise CheckpointError(f"{path / 'model_index.json'}: is a {pipeline!r}; expected one of {', '.join(PIPELINES)}")
    absent = [FOLDERS[kind] for kind in REQUIRED if not (path / FOLDERS[kind]).is_dir()]
    if absent:
        raise CheckpointError(f"{path}: no model here; a diffusers folder has {', '.join(absent)} in it")
    present = [kind for kind, folder in FOLDERS.items() if (path / folder).is_dir()]
    read_components = {kind: read_component(path / FOLDERS[kind], kind, variant, ignore) for kind in present}
    return Checkpoint(path, "diffusers", read_components, _schedule(path / "scheduler"), read_vocabulary(path / "tokenizer"))


def read_component(folder: Path, kind: str, variant: str, ignore: Sequence[str]) -> Component:
    """Read the component of this kind from its subfolder."""
    stated = _architecture(kind, read_json(folder / "config.json"), folder / "config.json")
    file = open_tensors(_weights_file(folder, variant))
    found = next((f for f in components(file.specs) if f.kind == kind), None)
    if found is None:
        names = ", ".join(name[:80] for name in list(file.specs)[:3])
        raise CheckpointError(f"{file.path}: holds no {kind}; its tensors are named {names}")
    tolerated = (*(p + POSITION_IDS for p in ("", "text_model.", "vision_model.", "vision_model.vision_model.")), *ignore)
    specs = {name.removeprefix(found.prefix): spec for name, spec in file.specs.items() if name not in tolerated}
    return match(file, found, specs, stated=stated)


def _weights_file(folder: Path, variant: str) -> Path:
    variants = ("", "fp16") if variant == "auto" else (variant,)
    tried = [
        f"{stem}{'.' if v else ''}{v}.{suffix}"
        for v in variants
        for suffix in ("safetensors", "bin")
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    ]
    file = next((folder / name for name in tried if (folder / name).exists()), None)
    if file is None:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder}: no weights; expected {tried[0]} or {tried[-1]} or the like, found {there}")
    return file


def _architecture(kind: str, config: Mapping[str, Any], where: Path) -> Architecture:
    """Turn a component's config.json into our numbers. What it leaves out has the value of v1."""
    if kind == "safety":
        vision = config.get("vision_config") or config.get("vision_config_dict") or {}
        if not isinstance(vision, dict):
            raise CheckpointError(f"{where}: vision_config is no JSON object")
        text_width = config.get("projection_dim", 512)  # transformers' own default; v1's file says 768
        config = {"projection_dim": text_width, **{k: v for k, v in vision.items() if k != "projection_dim"}}
    for name, expected in FIXED[kind].items():
        if config.get(name, expected) != expected:
            raise CheckpointError(f"{where}: {name} is {config[name]!r}; Stable Diffusion v1 has {expected!r}")
    return {"unet": _unet, "autoencoder": _autoencoder, "text_encoder": _text_encoder, "safety": _safety}[kind](config, where)


def _fields(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename the fields that are there and not null."""
    return {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}


def _unet(config: Mapping[str, Any], where: Path) -> UNet:
    names = {
        **{"in_channels": "in_channels", "out_channels": "out_channels", "level_widths": "block_out_channels"},
        **{"residual_blocks": "layers_per_block", "context_width": "cross_attention_dim", "norm_groups": "norm_num_groups"},
    }
    fields = _fields(config, names)
    down = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = config.get("up_block_types") or ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    fields["attention_levels"] = [name == "CrossAttnDownBlock2D" for name in down]
    mirrored = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(fields["attention_levels"])]
    if not set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"} or list(up) != mirrored:
        raise CheckpointError(f"{where}: its blocks are {down} and {up}; expected CrossAttn and plain 2D blocks, mirrored")
    # The field misnamed attention_head_dim holds the number of heads, which num_attention_heads, if set, says properly.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    fields["heads"] = heads
    unet = from_json(UNet, fields, str(where))
    if len(unet.level_widths) != len(unet.attention_levels):
        raise CheckpointError(f"{where}: {len(unet.level_widths)} block_out_channels but {len(down)} down_block_types")
    return unet


def _autoencoder(config: Mapping[str, Any], where: Path) -> Autoencoder:
    names = {
        **{"image_channels": "in_channels", "latent_channels": "latent_channels", "level_widths": "block_out_channels"},
        **{"residual_blocks": "layers_per_block", "norm_groups": "norm_num_groups", "scaling_factor": "scaling_factor"},
    }
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if not blocks <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise CheckpointError(
            f"{where}: its blocks are {', '.join(sorted(map(str, blocks)))}; expected Down- and UpDecoderBlock2D"
        )
    return from_json(Autoencoder, _fields(config, names), str(where))


CLIP_FIELDS = {
    **{"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "mlp_width": "intermediate_size"},
}


def _text_encoder(config: Mapping[str, Any], where: Path) -> TextEncoder:
    names = {**CLIP_FIELDS, "vocabulary_size": "vocab_size", "context_length": "max_position_embeddings"}
    return from_json(TextEncoder, _fields(config, names), str(where))


def _safety(config: Mapping[str, Any], where: Path) -> SafetyChecker:
    names = {**CLIP_FIELDS, "image_size": "image_size", "patch_size": "patch_size", "projection_width": "projection_dim"}
    return from_json(SafetyChecker, _fields(config, names), str(where))


def _schedule(folder: Path) -> Schedule:
    """The noise schedule; v1's own where the folder has none."""
    where = folder / "scheduler_config.json"
    if not where.exists():
        return Schedule()
    config = read_json(where)
    if config.get("trained_betas") is not None:
        raise CheckpointError(f"{where}: trained_betas is set; expected a schedule given by beta_start and beta_end")
    names = {
        **{"beta_start": "beta_start", "beta_end": "beta_end", "train_steps": "num_train_timesteps"},
        **{"beta_schedule": "beta_schedule", "prediction": "prediction_type"},
    }
    schedule = from_json(Schedule, _fields(config, names), str(where))
    if schedule.beta_schedule not in ("scaled_linear", "linear") or schedule.prediction not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{where}: {schedule.beta_schedule} betas, {schedule.prediction} prediction; "
            "expected scaled_linear or linear, and epsilon or v_prediction"
        )
    return schedule


# -- Writing -----------------------------------------------------------------------------------------------------------

NAMINGS = {"unet": "diffusers", "autoencoder": "diffusers", "text_encoder": "transformers", "safety": "transformers"}


def write(checkpoint: Checkpoint, path: Path, dtype: str | None = None) -> list[str]:
    """Write a folder that diffusers loads. Returns what was left out: nothing."""
    from weights_convert.writing import cast, save

    missing = [kind for kind in REQUIRED if kind not in checkpoint.components]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: has no {' and no '.join(missing)}; a diffusers folder needs {', '.join(REQUIRED)}"
        )
    with appearing_folder(path) as folder:
        for kind, subfolder in FOLDERS.items():
            if kind not in checkpoint.components:
                continue
            component = checkpoint.components[kind]
            makers = to_foreign(component.architecture, NAMINGS[kind], cast(component, dtype))
            prefix = "text_model." if kind == "text_encoder" else ""
            tensors = {prefix + name: make() for name, make in makers.items()}
            stem = "diffusion_pytorch_model" if kind in ("unet", "autoencoder") else "model"
            (folder / subfolder).mkdir()
            save(tensors, folder / subfolder / f"{stem}.safetensors", {})
            write_json(folder / subfolder / "config.json", CONFIGS[kind](component.architecture))
        _write_rest(checkpoint, folder)
    return []


def _write_rest(checkpoint: Checkpoint, folder: Path) -> None:
    """Scheduler, tokenizer, image processor, and the index of it all."""
    unet, text = checkpoint.components["unet"].architecture, checkpoint.components["text_encoder"].architecture
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(checkpoint.schedule))
    (folder / "tokenizer").mkdir()
    write_vocabulary(folder / "tokenizer", checkpoint.vocabulary or clip_vocabulary())
    write_json(folder / "tokenizer" / "tokenizer_config.json", _tokenizer_config(text))
    safety = checkpoint.components.get("safety")
    if safety:
        (folder / "feature_extractor").mkdir()
        write_json(folder / "feature_extractor" / "preprocessor_config.json", _processor_config(safety.architecture))
    inpainting = unet.in_channels != unet.out_channels
    index = {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if safety else [None, None],
        "requires_safety_checker": safety is not None,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if safety else [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)


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
        "sample_size": 64,
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
        "bos_token_id": text.vocabulary_size - 2,
        "eos_token_id": text.vocabulary_size - 1,
        "pad_token_id": 1,
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


def _scheduler_config(schedule: Schedule) -> dict[str, Any]:
    """PNDM with the settings v1-4 was published with."""
    return {
        "_class_name": "PNDMScheduler",
        "beta_schedule": schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": schedule.prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def _tokenizer_config(text: TextEncoder) -> dict[str, Any]:
    start, end = "<|startoftext|>", "<|endoftext|>"
    marks = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.context_length, "do_lower_case": True, **marks}


def _processor_config(safety: SafetyChecker) -> dict[str, Any]:
    """CLIP's own preparation of images: bicubic to the shorter side, centre crop, mean and deviation of its training set."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_resize": True, "size": {"shortest_edge": safety.image_size}, "resample": 3, "do_convert_rgb": True},
        **{"do_center_crop": True, "crop_size": {"height": safety.image_size, "width": safety.image_size}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
