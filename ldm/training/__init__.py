"""Training: one linear script a network, `autoencoder`, `clip`, `unet` and `judge`, and `bundled`, which runs them in turn.

What they share: `data` (pictures with captions, and in which order), `optimiser`, `ledger` (metrics, sheets, checkpoints),
`recipe` (settings from files) and `model_folder` (the result).
"""
