"""Tensor peek: any tensor as a map with statistics."""

from workbench.views.base.kinds import register_kind
from workbench.views.tensor_peek.view import TensorPeek, tensor_peek

__all__ = ["TensorPeek", "tensor_peek"]

register_kind("tensor_peek", __package__)
