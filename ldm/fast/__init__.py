"""Speed: a loaded model rewritten into one that computes the same, sooner. Delete this folder and all else still runs."""

from ldm.fast.accelerate import accelerate

__all__ = ["accelerate"]
