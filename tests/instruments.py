"""What the tests of instruments share: pictures of noise, an error, and torch-fidelity without what it does not need."""

import importlib.util
import sys
import types

import numpy as np
from PIL import Image

from tests import seeded

SIZES = ((64, 64), (50, 33), (33, 50), (28, 28), (61, 300))
HAS_TORCH_FIDELITY = importlib.util.find_spec("torch_fidelity") is not None


def torch_fidelity_module():
    """torch-fidelity's Inception. The package imports torchvision for other things; where that is absent, a stand-in will do,
    and it does for torchmetrics, which imports torch-fidelity where it finds it."""
    names = ["torchvision", *(f"torchvision.{part}" for part in ("datasets", "transforms", "transforms.functional"))]
    absent = importlib.util.find_spec("torchvision") is None
    for name in names if absent else ():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(dict.fromkeys(("CIFAR10", "STL10", "CIFAR100"), object))
    try:
        from torch_fidelity import feature_extractor_inceptionv3
    finally:
        for name in names if absent else ():
            del sys.modules[name]
    return feature_extractor_inceptionv3


def pictures(sizes=SIZES):
    values = [seeded.values(f"picture {i}", (h, w, 3)).view(np.uint32) % 256 for i, (w, h) in enumerate(sizes)]
    return [Image.fromarray(x.astype(np.uint8)) for x in values]


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()
