"""Make the golden trajectories again: `python -m tests.references.make_samplers K_DIFFUSION COMPVIS`, from the repository's
root, with the extra `reference`; the arguments are git checkouts of crowsonkb/k-diffusion and CompVis/stable-diffusion.

`samplers.safetensors` holds the latents after every step of their samplers, in float64, under v1-4's schedule with the
stand-in for a network below; what the network was told; and the inputs. Both repositories compute tables and interpolate in
float32, whatever the latents' type, and CompVis puts its tables on a GPU. Here they are held to float64 on the CPU from
outside, so that what is recorded is the method and not its rounding. What they import and these samplers do not use is
stubbed. Nothing of our package is imported: CompVis's has the same name.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import cycle
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import seeded

HERE = Path(__file__).parent
PACKAGES = ("torch", "numpy", "scipy", "safetensors")
SOURCES = {
    "k-diffusion": ("k_diffusion/sampling.py", "k_diffusion/external.py"),
    "CompVis": (
        *(f"ldm/models/diffusion/{name}.py" for name in ("ddim", "plms", "ddpm")),
        "ldm/modules/diffusionmodules/util.py",
    ),
}
UNUSED = ("torchdiffeq", "torchsde", "torchvision", "torchvision.transforms", "torchvision.utils", "pytorch_lightning")
UNUSED += ("pytorch_lightning.utilities", "pytorch_lightning.utilities.distributed", "ldm.models.autoencoder")

SHAPE = (1, 4, 3, 4)
STEPS = (1, 2, 3, 7, 20, 50)
COMPVIS_STEPS = (1, 2, 7, 20, 50, 30)  # 7 runs 8, 30 runs 31
IN_SIGMA_STEPS = (3, 7, 20)
K_SAMPLERS = ("euler", "euler_ancestral", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde")
IMG2IMG = ((50, 0.3), (50, 0.8), (30, 0.97))
INPAINT_STEPS = 7
NOTES = {
    "kdiffusion/SPACING/STEPS/SAMPLER": "latents after every step as k-diffusion has them, x / signal; the run begins with "
    "x_T times the first sigma. dpmpp_2m_sde at 1 step is left out: k-diffusion's raises UnboundLocalError there.",
    "compvis/METHOD/STEPS": "latents after every step, begun with x_T; STEPS as asked for, the run may have more.",
    "compvis/img2img/STEPS/STRENGTH": "`start` is `image` noised with the first of `noise`; eta 0.",
    ".../timesteps": "what the network was told, one entry a call.",
    "compvis/steps_run": "how many steps CompVis runs where 1, 2, ... 512 are asked for; 0 where it raises IndexError.",
    "noise": "the draws of the stochastic samplers, used in this order from the first.",
    "compvis/inpaint": "DDIM, eta 0, asked for 7 steps and runs 8; image/x_T are its `x0` and `x_T`; mask 1 keeps the image. "
    "Before each call of the network x is replaced by mask * noised image + (1 - mask) * x, the image noised to the level "
    "of that call; nothing is blended after the last step. `draws` are all its N(0, 1) in order, two a step: the image's "
    "noise, then the noise of the DDIM step, which is drawn and multiplied by 0. `blended` is x as the network saw it, "
    "`latents` x after each step, `timesteps` what the network was told.",
}


def network(x: Tensor, t: float) -> Tensor:
    """A stand-in for the UNet: smooth, not linear, and sensitive to t."""
    return torch.tanh(0.7 * x + 0.3 * torch.sin(3.0 * x.flip(-1)) + float(t) / 700 - 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("k_diffusion", type=Path)
    parser.add_argument("compvis", type=Path)
    folders = parser.parse_args()
    torch.set_num_threads(1)
    golden = {
        "x_T": seeded.tensor("x_T", *SHAPE).double(),
        "image": seeded.tensor("image", *SHAPE).double(),
        "noise": seeded.tensor("noise", max(STEPS), *SHAPE).double(),
    }
    with float64(), torch.inference_mode():
        import_without_unused(folders.k_diffusion, folders.compvis)
        model = compvis_model()
        golden |= k_diffusion(model, golden) | compvis(model, golden) | inpainting(model, golden)
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, HERE / "samplers.safetensors")
    manifest = json.loads((HERE / "manifest.json").read_text())
    manifest["samplers"] = {
        "run": "python -m tests.references.make_samplers K_DIFFUSION COMPVIS",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "k-diffusion": described(folders.k_diffusion, "k-diffusion"),
        "CompVis": described(folders.compvis, "CompVis"),
        "notes": NOTES,
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def described(folder: Path, name: str) -> dict:
    """The commit of a checkout, and fingerprints of the files that were run."""
    commit = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {"commit": commit, "sha256": {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in SOURCES[name]}}


# -- Running them here


@contextmanager
def float64() -> Iterator[None]:
    """float32 is float64, by whatever name it is asked for, and nothing is printed."""
    torch.set_default_dtype(torch.float64)
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.float32", torch.float64))
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(redirect_stderr(StringIO()))
        yield
    torch.set_default_dtype(torch.float32)


def import_without_unused(k_diffusion: Path, compvis: Path) -> None:
    """Make `k_diffusion` and `ldm` mean these checkouts, without running what their packages would import."""
    for name, folder in (("k_diffusion", k_diffusion), ("ldm", compvis)):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder / name)]
    for name in UNUSED:
        sys.modules[name] = mock.MagicMock()
    sys.modules["pytorch_lightning"].LightningModule = torch.nn.Module


@contextmanager
def drawing(draws: Tensor, *, again: bool = False) -> Iterator[Iterator[Tensor]]:
    """torch.randn and torch.randn_like give `draws` in turn, which are also yielded; from the first again where so asked."""
    turn = cycle(draws) if again else iter(draws)

    def draw(*arguments, **options):
        return next(turn)

    with mock.patch("torch.randn", draw), mock.patch("torch.randn_like", draw):
        yield turn


class Recorder:
    """`network`, asked as CompVis's model is, with t (b,); it keeps what it was given."""

    def __init__(self):
        self.seen, self.timesteps = [], []

    def __call__(self, x: Tensor, t: Tensor, context: None = None) -> Tensor:
        self.seen.append(x)
        self.timesteps.append(float(t[0]))
        return network(x, self.timesteps[-1])

    def told(self) -> Tensor:
        return torch.tensor(self.timesteps, dtype=torch.float64)


def compvis_model():
    """CompVis's own model class with v1-4's schedule, and no networks. `apply_model` is for each run to set."""
    ddpm = importlib.import_module("ldm.models.diffusion.ddpm").DDPM

    class Model(ddpm):
        device = torch.device("cpu")

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.v_posterior, self.parameterization = 0.0, "eps"
            self.register_schedule(linear_start=0.00085, linear_end=0.012)

    return Model()


# -- The cases


def k_diffusion(model, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    sampling, external = (importlib.import_module(f"k_diffusion.{name}") for name in ("sampling", "external"))
    schedule, made = external.CompVisDenoiser(model), {}
    for spacing, steps in [("default", s) for s in STEPS] + [(n, s) for n in ("karras", "exponential") for s in IN_SIGMA_STEPS]:
        if spacing == "default":
            sigmas = schedule.get_sigmas(steps)
        else:
            sigmas = getattr(sampling, f"get_sigmas_{spacing}")(steps, schedule.sigma_min, schedule.sigma_max)
        made[f"kdiffusion/{spacing}/{steps}/sigmas"], x = sigmas, golden["x_T"] * sigmas[0]
        for name in K_SAMPLERS:
            if (name, steps) == ("dpmpp_2m_sde", 1):
                continue
            sample, model.apply_model, trace, options = getattr(sampling, f"sample_{name}"), Recorder(), [], {"disable": True}
            if name in ("euler_ancestral", "dpmpp_2m_sde"):
                options["noise_sampler"] = sampling.default_noise_sampler(x)
            with drawing(golden["noise"], again=name in ("euler", "heun")):  # these draw noise for a churn of zero
                last = sample(schedule, x, sigmas, callback=lambda state, kept=trace: kept.append(state["x"]), **options)
            made[f"kdiffusion/{spacing}/{steps}/{name}"] = torch.stack([*trace[1:], last])
            made[f"kdiffusion/{spacing}/{steps}/{name}/timesteps"] = model.apply_model.told()
    return made


def compvis(model, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    ddim, plms = traced("ddim", "DDIMSampler"), traced("plms", "PLMSSampler")
    made = {"compvis/steps_run": torch.tensor([steps_run(ddim(model), steps) for steps in range(1, 513)])}
    for steps in COMPVIS_STEPS:
        for method, kind, eta in (("ddim", ddim, 0.0), ("ddim_eta_1", ddim, 1.0), ("plms", plms, 0.0)):
            sampler, model.apply_model = kind(model), Recorder()
            with drawing(golden["noise"], again=eta == 0):
                sampler.sample(steps, SHAPE[0], SHAPE[1:], x_T=golden["x_T"], eta=eta, verbose=False)
            made[f"compvis/{method}/{steps}"] = torch.stack(sampler.trace)
            made[f"compvis/{method}/{steps}/timesteps"] = model.apply_model.told()
    for steps, strength in IMG2IMG:
        sampler, model.apply_model, name = ddim(model), Recorder(), f"compvis/img2img/{steps}/{strength}"
        with drawing(golden["noise"], again=True):
            sampler.make_schedule(steps, verbose=False)
            kept = int(strength * steps)
            start = sampler.stochastic_encode(golden["image"], torch.tensor([kept]))
            sampler.decode(start, None, kept)
        made |= {f"{name}/start": start, name: torch.stack(sampler.trace), f"{name}/timesteps": model.apply_model.told()}
    return made


def inpainting(model, golden: dict[str, Tensor]) -> dict[str, Tensor]:
    sampler, model.apply_model = traced("ddim", "DDIMSampler")(model), Recorder()
    count = steps_run(sampler, INPAINT_STEPS)
    mask, draws = torch.zeros(1, 1, *SHAPE[2:]), seeded.tensor("inpaint/draws", 2 * count, *SHAPE).double()
    mask[..., : SHAPE[3] // 2] = mask[..., 0, :] = 1.0
    with drawing(draws) as turn:
        given = {"x_T": golden["x_T"], "x0": golden["image"], "mask": mask}
        sampler.sample(INPAINT_STEPS, SHAPE[0], SHAPE[1:], **given, eta=0.0, verbose=False)
    if next(turn, None) is not None:
        raise RuntimeError("CompVis drew less noise than there is")
    made = {"mask": mask, "draws": draws, "blended": torch.stack(model.apply_model.seen), "latents": torch.stack(sampler.trace)}
    made |= {"image": golden["image"].clone(), "x_T": golden["x_T"].clone(), "timesteps": model.apply_model.told()}
    return {f"compvis/inpaint/{name}": tensor for name, tensor in made.items()}


def traced(module: str, name: str) -> type:
    """CompVis's sampler, with its tables where they are made, and x after every step in `trace`."""
    kind, step = getattr(importlib.import_module(f"ldm.models.diffusion.{module}"), name), f"p_sample_{module}"

    class Traced(kind):
        def __init__(self, model):
            super().__init__(model)
            self.trace = []

        def register_buffer(self, name, attr):
            setattr(self, name, attr)

    def traced_step(self, *arguments, **options):
        made = getattr(kind, step)(self, *arguments, **options)
        self.trace.append(made[0])
        return made

    setattr(Traced, step, traced_step)
    return Traced


def steps_run(sampler, steps: int) -> int:
    try:
        sampler.make_schedule(steps, verbose=False)
    except IndexError:
        return 0
    return len(sampler.ddim_timesteps)


if __name__ == "__main__":
    main()
