"""Layouts: how a whole model lies on disk. Each module has `read` and `write` between a path and a `Checkpoint`."""
