"""Latent diffusion (Stable Diffusion v1), written to be read, trusted and run.

    components = ldm.load("path/to/any/checkpoint")   # any layout; see `ldm.checkpoint`
    components = ldm.build("tiny", seed=0)            # random weights, for experiments and tests
    print(ldm.table("sd-v1"))                         # the UNet, block by block

Read from below: `models/`, then `text/` and `diffusion/`. Importing this package imports no torch until something is used.
"""

from importlib import import_module

_HOMES = {
    "load": "ldm.checkpoint",
    "load_module": "ldm.checkpoint",
    "build": "ldm.checkpoint",
    "Components": "ldm.checkpoint",
    "CheckpointError": "ldm.checkpoint",
    "txt2img": "ldm.pipelines.text_to_image",
    "img2img": "ldm.pipelines.image_to_image",
    "inpaint": "ldm.pipelines.inpaint",
    "replay": "ldm.pipelines.replay",
    "pictures": "ldm.pipelines.autoencoding",
    "Settings": "ldm.pipelines.settings",
    "Result": "ldm.pipelines.result",
    "read_receipt": "ldm.output.files",
    "PRESETS": "ldm.presets",
    "table": "ldm.presets",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
