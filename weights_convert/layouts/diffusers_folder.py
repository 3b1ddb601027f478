"""The diffusers folder: one subfolder a component, with its weights and a `config.json` that says how to build it."""

from collections.abc import Sequence
from pathlib import Path

from weights_convert.architecture import Schedule
from weights_convert.checkpoint import Checkpoint, sampling_in_words
from weights_convert.component import Component, check_none_left, is_listed, match
from weights_convert.containers import open_tensors
from weights_convert.detect import components
from weights_convert.errors import CheckpointError, shown
from weights_convert.files import appearing_folder, read_json, write_json
from weights_convert.layouts import diffusers_config
from weights_convert.layouts.single_file import POSITION_IDS
from weights_convert.naming import to_foreign
from weights_convert.tokenizer_files import END, START, clip_vocabulary, read_vocabulary, write_vocabulary

FOLDERS = {"text_encoder": "text_encoder", "unet": "unet", "autoencoder": "vae", "safety": "safety_checker"}
REQUIRED = ("text_encoder", "unet", "autoencoder")
PIPELINES = (
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    *("StableDiffusionInpaintPipeline", "StableDiffusionInpaintPipelineLegacy"),
)


# -- Reading -----------------------------------------------------------------------------------------------------------


def read(path: Path, *, variant: str = "auto", ignore: Sequence[str] = ()) -> Checkpoint:
    """Read the model in folder `path`. `variant`: "fp16" for the files so marked, "" for the plain ones, "auto" for the
    plain ones where they are there."""
    if (path / "model_index.json").exists():
        pipeline = read_json(path / "model_index.json").get("_class_name")
        if pipeline not in PIPELINES:
            raise CheckpointError(
                f"{path / 'model_index.json'}: is a {shown(pipeline)}; expected one of {', '.join(PIPELINES)}"
            )
    absent = [FOLDERS[kind] for kind in REQUIRED if not (path / FOLDERS[kind]).is_dir()]
    if absent:
        expected = f"model.json, or folders {', '.join(FOLDERS[kind] for kind in REQUIRED)}"
        raise CheckpointError(f"{path}: no whole model here; expected {expected}; missing {', '.join(absent)}")
    present = [kind for kind, folder in FOLDERS.items() if (path / folder).is_dir()]
    read_components = {kind: read_component(path / FOLDERS[kind], kind, variant, ignore) for kind in present}
    return Checkpoint(path, "diffusers", read_components, _schedule(path / "scheduler"), read_vocabulary(path / "tokenizer"))


def read_component(folder: Path, kind: str, variant: str, ignore: Sequence[str]) -> Component:
    """Read the component of this kind from its subfolder."""
    stated = diffusers_config.architecture(kind, read_json(folder / "config.json"), folder / "config.json")
    file = open_tensors(weights_file(folder, variant))
    found = next((f for f in components(file.specs) if f.kind == kind), None)
    if found is None:
        names = ", ".join(name[:80] for name in list(file.specs)[:3])
        raise CheckpointError(f"{file.path}: holds no {kind}; its tensors are named {names}")
    tolerated = (*(p + POSITION_IDS for p in ("", "text_model.", "vision_model.", "vision_model.vision_model.")), *ignore)
    kept = {name: spec for name, spec in file.specs.items() if not is_listed(name, tolerated)}
    check_none_left(file, [name for name in kept if not name.startswith(found.prefix)])
    return match(file, found, {name.removeprefix(found.prefix): spec for name, spec in kept.items()}, stated=stated)


def weights_file(folder: Path, variant: str) -> Path:
    """The folder's file of weights. Raises CheckpointError where there is none."""
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


def _schedule(folder: Path) -> Schedule:
    """The noise schedule; v1's own where the folder has none."""
    where = folder / "scheduler_config.json"
    return diffusers_config.schedule(read_json(where), where) if where.exists() else Schedule()


# -- Writing -----------------------------------------------------------------------------------------------------------

NAMINGS = {"unet": "diffusers", "autoencoder": "diffusers", "text_encoder": "transformers", "safety": "transformers"}


def write(checkpoint: Checkpoint, path: Path, dtype: str | None = None) -> list[str]:
    """Write a folder that diffusers loads. Returns what was left out."""
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
            prefix = "text_model." if kind == "text_encoder" else ""
            foreign = to_foreign(component.architecture, NAMINGS[kind], cast(component, dtype))
            tensors = {prefix + name: tensor for name, tensor in foreign.items()}
            stem = "diffusion_pytorch_model" if kind in ("unet", "autoencoder") else "model"
            (folder / subfolder).mkdir()
            save(tensors, folder / subfolder / f"{stem}.safetensors", {})
            config = diffusers_config.CONFIGS[kind](component.architecture)
            if kind == "text_encoder":
                tokens = (checkpoint.vocabulary or clip_vocabulary()).tokens
                config |= {"bos_token_id": tokens[START], "eos_token_id": tokens[END], "pad_token_id": tokens[END]}
            write_json(folder / subfolder / "config.json", config)
        _write_rest(checkpoint, folder)
    left = [f"the {kind}" for kind in checkpoint.components if kind not in FOLDERS] + sampling_in_words(checkpoint)
    return [f"{what} (a diffusers folder has no place for it)" for what in left]


def _write_rest(checkpoint: Checkpoint, folder: Path) -> None:
    """Scheduler, tokenizer, image processor, and the index of it all."""
    unet, text = checkpoint.components["unet"].architecture, checkpoint.components["text_encoder"].architecture
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers_config.scheduler_config(checkpoint.schedule))
    (folder / "tokenizer").mkdir()
    write_vocabulary(folder / "tokenizer", checkpoint.vocabulary or clip_vocabulary())
    write_json(folder / "tokenizer" / "tokenizer_config.json", diffusers_config.tokenizer_config(text))
    safety = checkpoint.components.get("safety")
    if safety:
        (folder / "feature_extractor").mkdir()
        write_json(
            folder / "feature_extractor" / "preprocessor_config.json", diffusers_config.processor_config(safety.architecture)
        )
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
