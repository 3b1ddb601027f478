"""From nothing to the bundled model: `ldm train bundled`. Each stage is one of the other scripts, in this order:

    judge         a classifier of scenes, which decides whether the rest is any good
    autoencoder   must pass the gate below, or nothing further is trained: what it blurs, no UNet can sharpen
    clip          text encoder, by contrast with an image tower
    unet          on the latents of the one and the states of the other

and the result is one folder, float16, that `ldm.load` reads. Stopped anywhere and started again, it goes on.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.processes import Processes
from ldm.scenes.judge import load as load_judge
from ldm.training import autoencoder, clip, judge, model_folder, unet
from ldm.training.data import Scenes, to_unit
from ldm.training.emissions import PowerRecipe, emissions
from ldm.training.ledger import METRICS, write
from ldm.training.recipe import make, read
from weights_convert.architecture import Sampling

RECIPE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True, kw_only=True)
class GateRecipe:
    """What an autoencoder must do on `count` unseen scenes before a UNet is trained on it: reconstruct them with `psnr` dB,
    and so that the judge loses at most `lost` of its accuracy on renders."""

    psnr: float = 30.0
    lost: float = 0.03
    count: int = 1000
    seed: int = 902


class GateError(ValueError):
    """The autoencoder is not good enough to train a UNet on."""


def train(folder: Path, processes: Processes, *, recipe: Path = RECIPE, quiet: bool = False) -> Path:
    """Train all stages in `folder`; returns the finished model's folder. Raises GateError after a poor autoencoder."""
    tables = read(recipe)
    judging = make(judge.JudgeRecipe, tables.get("judge", {}), f"{recipe}, judge")
    coding = make(autoencoder.AutoencoderRecipe, tables.get("autoencoder", {}), f"{recipe}, autoencoder")
    wording = make(clip.CLIPRecipe, tables.get("clip", {}), f"{recipe}, clip")
    painting = make(unet.UNetRecipe, tables.get("unet", {}), f"{recipe}, unet")

    power = make(PowerRecipe, tables.get("power", {}), f"{recipe}, power")
    sampling = make(Sampling, tables.get("sampling", {}), f"{recipe}, sampling")
    passing = make(GateRecipe, tables.get("gate", {}), f"{recipe}, gate")

    autoencoder.check(coding)
    clip.check(wording)
    unet.check(painting, coding.model, wording.text)

    done, cache = folder / "bundled", folder / "data"
    stages = {name: folder / name for name in ("judge", "autoencoder", "clip", "unet")}
    if not (stages["judge"] / "judge.safetensors").exists():
        judge.train(judging, stages["judge"], processes, cache=cache, quiet=quiet)
    if not (stages["autoencoder"] / "model").exists():
        autoencoder.train(coding, stages["autoencoder"], processes, cache=cache, quiet=quiet)
    processes.wait()
    figures = gate(passing, stages["autoencoder"] / "model", stages["judge"] / "judge.safetensors", coding.data.size, processes)
    if not (stages["clip"] / "model").exists():
        clip.train(wording, stages["clip"], processes, cache=cache, quiet=quiet)
    processes.wait()

    base = unet.Base(
        tokenizer=model_folder.read_tokenizer(stages["clip"] / "model", wording.text.context_length),
        text_encoder=model_folder.read(stages["clip"] / "model", "text_encoder", device=processes.device),
        autoencoder=model_folder.read(stages["autoencoder"] / "model", "autoencoder", device=processes.device),
    )
    if not (stages["unet"] / "model").exists():
        unet.train(painting, base, stages["unet"], processes, cache=cache, quiet=quiet)
    processes.wait()
    if processes.leads:
        modules = {
            "text_encoder": base.text_encoder,
            "unet": model_folder.read(stages["unet"] / "model", "unet"),
            "autoencoder": base.autoencoder,
            "image_encoder": model_folder.read(stages["clip"] / "model", "image_encoder"),
        }
        vocabulary = model_folder.read_vocabulary(stages["clip"] / "model")
        model_folder.write(done, modules, schedule=painting.schedule, vocabulary=vocabulary, sampling=sampling, dtype="float16")
        (done / "judge.safetensors").write_bytes((stages["judge"] / "judge.safetensors").read_bytes())
        write(done / "training.json", json.dumps(log(stages, figures, power, processes.count), indent=1) + "\n")
    return done


def gate(recipe: GateRecipe, model: Path, judge_file: Path, size: int, processes: Processes) -> dict[str, float]:
    """How well the autoencoder does on unseen scenes. Raises GateError where that is not well enough."""
    coder = model_folder.read(model, "autoencoder", device=processes.device)
    referee = load_judge(judge_file).to(processes.device)
    unseen = Scenes(recipe.seed, recipe.count, size, split="any")
    scenes = [unseen.scene(i) for i in range(len(unseen))]
    pictures = to_unit(unseen.images(range(len(unseen)))).to(processes.device)
    remade, latents = autoencoder.reconstruct(coder, pictures)
    right = [judge.accuracy(referee, shown, scenes) for shown in (pictures, remade)]
    figures = {
        "psnr": autoencoder.psnr(remade, pictures).mean().item(),
        "judge_on_renders": right[0],
        "judge_on_reconstructions": right[1],
        **{f"latent_std_{c}": std for c, std in enumerate((latents * coder.config.scaling_factor).std((0, 2, 3)).tolist())},
    }
    if figures["psnr"] < recipe.psnr or right[0] - right[1] > recipe.lost:
        raise GateError(
            f"the autoencoder reaches {figures['psnr']:.1f} dB, and the judge is right on {right[1]:.1%} of its "
            f"reconstructions against {right[0]:.1%} of the renders; a UNet needs {recipe.psnr} dB and at most "
            f"{recipe.lost:.0%} lost: train it for longer"
        )
    return figures


def log(stages: Mapping[str, Path], figures: Mapping[str, float], power: PowerRecipe, count: int) -> dict[str, Any]:
    """The run's record: what was asked for, what came out, on what machine and in what time. count: of processes, each of which
    draws the power of one."""
    machine = {"processor": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__, "processes": count}
    found: dict[str, Any] = {
        "machine": machine,
        "gate": dict(figures),
        "stages": {},
    }
    for name, folder in stages.items():
        lines = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        found["stages"][name] = {"recipe": recipe, "seconds": lines[-1]["seconds"], "curve": _thinned(lines)}
    found["seconds"] = sum(stage["seconds"] for stage in found["stages"].values())
    hours = count * found["seconds"] / 3600
    kg = emissions(hours, power).kg
    found["emissions"] = {"hours": round(hours, 2), **dataclasses.asdict(power), "kg": float(f"{kg:.3g}")}
    return found


def _thinned(lines: list[dict[str, float]], most: int = 60) -> list[dict[str, float]]:
    """Every test, and of the other lines about `most`, evenly."""
    plain = [line for line in lines if "loss" in line]
    every = max(len(plain) // most, 1)
    kept = {id(line) for line in plain[every - 1 :: every]}
    return [line for line in lines if "loss" not in line or id(line) in kept]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
