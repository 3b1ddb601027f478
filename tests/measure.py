"""How far two tensors are apart."""

from torch import Tensor


def relative_error(found: Tensor, truth: Tensor) -> float:
    """max |found - truth| / max |truth|, in float64; infinite where the shapes differ."""
    if found.shape != truth.shape:
        return float("inf")
    found, truth = found.double(), truth.double()
    return float((found - truth).abs().max() / truth.abs().max())
