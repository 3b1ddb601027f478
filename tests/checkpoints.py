"""Checkpoints for the tests: architectures small and full, and ways to look into a file that was read or written."""

import csv
from pathlib import Path

import torch

import weights_convert
from weights_convert import architecture
from weights_convert.naming import TABLES

MANIFESTS = Path(__file__).parent / "references" / "manifests"
COMPONENTS = ("text_encoder", "unet", "autoencoder")
FULL = {
    "unet": architecture.UNet(),
    "autoencoder": architecture.Autoencoder(),
    "text_encoder": architecture.TextEncoder(),
    "image_encoder": architecture.ImageEncoder(),
    "safety": architecture.SafetyChecker(),
}
SMALL = {
    "unet": architecture.UNet(level_widths=(8, 16), attention_levels=(True, False), context_width=12),
    "autoencoder": architecture.Autoencoder(level_widths=(8, 8, 16)),
    "text_encoder": architecture.TextEncoder(vocabulary_size=60, width=16, layers=2, mlp_width=24),
    "image_encoder": architecture.ImageEncoder(image_size=28, width=16, layers=2, mlp_width=24, projection_width=12),
    "safety": architecture.SafetyChecker(image_size=28, width=16, layers=2, mlp_width=24, projection_width=12),
}
NAMINGS = [(kind, naming) for kind, one in SMALL.items() for naming in TABLES[type(one)][0]]


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name (after the component, where the file has one) -> shape."""
    with (MANIFESTS / name).open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    split = lambda shape: tuple(map(int, shape.split("x"))) if shape else ()  # noqa: E731
    return {f"{row['component'] + '/' if 'component' in row else ''}{row['key']}": split(row["shape"]) for row in rows}


def tensors_of(path: Path, **options) -> dict[str, torch.Tensor]:
    checkpoint = weights_convert.read(path, **options)
    return {f"{k}/{n}": t.clone() for k in COMPONENTS for n, t in checkpoint.components[k].tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def saved(path: Path, content: dict, **options) -> Path:
    torch.save(content, path, **options)
    return path
