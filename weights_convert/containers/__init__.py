"""Containers: a file of named tensors, opened without loading it. See `open_tensors`."""

from weights_convert.containers.tensor_file import Spec, TensorFile, open_tensors

__all__ = ["Spec", "TensorFile", "open_tensors"]
