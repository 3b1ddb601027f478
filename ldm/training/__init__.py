"""Training: one linear script a network, `autoencoder`, `clip`, `unet` and `judge`, and `bundled`, which runs them in turn.

What they share: `data` (pictures with captions, and in which order), `optimiser`, `processes` (one or many, and where random
numbers come from), `ledger` (metrics, sheets, checkpoints), `recipe` (settings from files) and `model_folder` (the result).
"""
