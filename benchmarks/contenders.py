"""The implementations that are timed beside each other, one a process: `benchmarks/measure.py` times them.

Every one loads the same diffusers folder and offers the same five things to time; None stands for what it does not offer.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

PROMPT = "a red cube on top of a blue sphere"
SIDE = 512
T = 500.0
CPP = "stable-diffusion.cpp"


class Ldm:
    """Ours, as it is read."""

    accelerated: Mapping | None = None  # what `accelerate` is told

    def __init__(self, folder: Path, dtype: str, device: str = "cpu"):
        import torch

        import ldm

        self.torch, self.ldm, self.dtype, self.device = torch, ldm, getattr(torch, dtype), device
        self.folder = folder

    def load(self) -> None:
        if self.accelerated is None:
            self.model = self._loaded(self.dtype)
            return
        import ldm.fast

        loaded = self._loaded(self.torch.float32)  # mapped from the file, and converted once
        self.model = ldm.fast.accelerate(loaded, dtype=self.dtype, **self.accelerated)

    def _loaded(self, dtype):
        """Without its safety checker, which nobody here is asked for."""
        return self.ldm.load(self.folder, dtype=dtype, device=self.device, safety=False)

    def prepare(self) -> None:
        torch, model = self.torch, self.model
        self.x = torch.randn(1, 4, SIDE // 8, SIDE // 8, device=self.device)
        self.ids = torch.cat([model.tokenizer(text).ids for text in ("", PROMPT)]).to(self.device)
        self.contexts = model.text_encoder(self.ids).chunk(2)
        self.widen(1)
        self.image = torch.randn(1, 3, SIDE, SIDE, device=self.device, dtype=self.dtype).clamp(-1, 1)

    def widen(self, batch: int) -> None:
        """Steps of so many pictures from now on."""
        from ldm.diffusion.guidance import guided

        self.x = self.x[:1].repeat(batch, 1, 1, 1)
        self.guided = guided(self.model.unet, *(context.repeat(batch, 1, 1) for context in self.contexts), 7.5)

    def text(self):
        return self.model.text_encoder(self.ids)

    def unet(self):
        return self.guided(self.x, T)

    def decode(self):
        return self.model.autoencoder.decode(self.x.to(self.dtype))

    def encode(self):
        return self.model.autoencoder.encode(self.image).mean

    def picture(self, steps: int):
        fields = {"steps": steps, "sampler": "ddim", "guidance_scale": 7.5, "safety": "off", "seed": 1}
        return self.ldm.txt2img(self.model, PROMPT, width=SIDE, height=SIDE, **fields).images[0]


class LdmFast(Ldm):
    """Ours, accelerated."""

    accelerated = MappingProxyType({})


class Diffusers:
    """diffusers as it is."""

    channels_last = False
    keep_pages = False

    def __init__(self, folder: Path, dtype: str, device: str = "cpu"):
        import torch
        from diffusers import StableDiffusionPipeline

        self.torch, self.pipeline, self.folder = torch, StableDiffusionPipeline, folder
        self.dtype, self.device = getattr(torch, dtype), device

    def load(self) -> None:
        from diffusers import DDIMScheduler

        if self.keep_pages:
            from ldm.fast.memory import keep_pages

            keep_pages()
        given = {"torch_dtype": self.dtype, "safety_checker": None, "requires_safety_checker": False}
        self.pipe = self.pipeline.from_pretrained(self.folder, **given).to(self.device)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        if self.channels_last:
            for part in (self.pipe.unet, self.pipe.vae):
                part.to(memory_format=self.torch.channels_last)

    def prepare(self) -> None:
        torch, pipe = self.torch, self.pipe
        given = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
        self.ids = pipe.tokenizer(["", PROMPT], **given).input_ids.to(self.device)
        self.context = pipe.text_encoder(self.ids)[0]
        self.t = torch.tensor(T, device=self.device)  # diffusers would make one at every call, and a GPU wait for it
        self.x = torch.randn(1, 4, SIDE // 8, SIDE // 8, device=self.device, dtype=self.dtype)
        self.image = torch.randn(1, 3, SIDE, SIDE, device=self.device, dtype=self.dtype).clamp(-1, 1)

    def widen(self, batch: int) -> None:
        """Steps of so many pictures from now on."""
        self.x = self.x[:1].repeat(batch, 1, 1, 1)
        self.context = self.pipe.text_encoder(self.ids)[0].repeat_interleave(batch, dim=0)

    def text(self):
        return self.pipe.text_encoder(self.ids)[0]

    def unet(self):
        both = self.torch.cat([self.x, self.x])
        uncond, cond = self.pipe.unet(both, self.t, encoder_hidden_states=self.context, return_dict=False)[0].chunk(2)
        return uncond + 7.5 * (cond - uncond)

    def decode(self):
        return self.pipe.vae.decode(self.x, return_dict=False)[0]

    def encode(self):
        return self.pipe.vae.encode(self.image).latent_dist.mean

    def picture(self, steps: int):
        random = self.torch.Generator().manual_seed(1)
        given = {"num_inference_steps": steps, "guidance_scale": 7.5, "height": SIDE, "width": SIDE}
        return self.pipe(PROMPT, generator=random, **given).images[0]


class DiffusersChannelsLast(Diffusers):
    """diffusers, channels_last."""

    channels_last = True


class DiffusersKeepingPages(DiffusersChannelsLast):
    """The same, in a process that keeps the pages it frees."""

    keep_pages = True


class DiffusersFrozen(DiffusersChannelsLast):
    """diffusers, channels_last, compiled with frozen weights."""

    def load(self) -> None:
        super().load()
        import torch._inductor.config as inductor

        inductor.freezing = True
        self.pipe.unet = self.torch.compile(self.pipe.unet)
        self.pipe.vae.decode = self.torch.compile(self.pipe.vae.decode)


class OpenVINO(Diffusers):
    """diffusers' UNet and decoder in OpenVINO."""

    picture = None  # its pipelines are of another library

    def load(self) -> None:
        import openvino

        torch = self.torch
        hint = {"INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]}
        self.dtype = torch.float32  # of what it converts; in which type it computes is its own affair
        super().load()

        class Decoder(torch.nn.Module):
            def __init__(self, vae):
                super().__init__()
                self.vae = vae

            def forward(self, z):
                return self.vae.decode(z, return_dict=False)[0]

        class Step(torch.nn.Module):
            def __init__(self, unet):
                super().__init__()
                self.unet = unet

            def forward(self, x, t, context):
                return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]

        core, side = openvino.Core(), SIDE // 8
        x, t, context = torch.randn(2, 4, side, side), torch.tensor(T), torch.randn(2, 77, 768)

        def compiled(module, *inputs):
            with torch.no_grad():
                made = openvino.convert_model(module, example_input=inputs, input=[list(one.shape) for one in inputs])
            return core.compile_model(made, "CPU", hint)

        self.step = compiled(Step(self.pipe.unet), x, t, context)
        self.decoder = compiled(Decoder(self.pipe.vae), x[:1])
        self.pipe.unet = None

    def prepare(self) -> None:
        super().prepare()
        self.context = self.context.float().numpy()

    def unet(self):
        both = self.torch.cat([self.x, self.x]).float().numpy()
        uncond, cond = self.torch.from_numpy(self.step([both, T, self.context])[0]).chunk(2)
        return uncond + 7.5 * (cond - uncond)

    def decode(self):
        return self.torch.from_numpy(self.decoder([self.x.float().numpy()])[0])


class StableDiffusionCpp:
    """stable-diffusion.cpp, from PyPI's stable-diffusion-cpp-python, which is built where it is installed.

    It offers whole pictures, and tells how long their steps took. Types other than float32 are of its weights alone.
    """

    text = unet = decode = encode = None

    def __init__(self, folder: Path, dtype: str, device: str = "cpu"):
        import stable_diffusion_cpp

        self.library, self.file = stable_diffusion_cpp, folder.with_suffix(".safetensors")
        self.type = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
        self.seconds: list[float] = []

    def load(self) -> None:
        self.model = self.library.StableDiffusion(
            model_path=str(self.file), wtype=self.type, vae_decode_only=True, flash_attn=True, diffusion_flash_attn=True
        )

    def prepare(self) -> None:
        pass

    def picture(self, steps: int):
        self.seconds = []
        given = {"sample_steps": steps, "sample_method": "ddim_trailing", "cfg_scale": 7.5, "width": SIDE, "height": SIDE}
        told = {"progress_callback": lambda step, steps, seconds: self.seconds.append(seconds)}
        return self.model.generate_image(PROMPT, seed=1, **given, **told)[0]


CONTENDERS = {
    "ldm, as it is read": Ldm,
    "ldm, accelerated": LdmFast,
    "diffusers": Diffusers,
    "diffusers, channels_last": DiffusersChannelsLast,
    "diffusers, channels_last, keeping pages": DiffusersKeepingPages,
    "diffusers, compiled and frozen": DiffusersFrozen,
    "OpenVINO": OpenVINO,
    CPP: StableDiffusionCpp,
}
