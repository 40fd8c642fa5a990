"""What a linear function is applied to, so that heads can be found in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def projected(func: Any, args: Sequence[Any]) -> Tensor | None:
    """What a linear function is applied to, as [..., feature]; None for functions that are no projection.

    Linear layers, products with a matrix, convolutions of one position, and einsum with a parameter.
    """
    if func in _LINEAR:
        return args[0] if args and isinstance(args[0], Tensor) else None
    if func in _MATRIX and len(args) > 1 and all(isinstance(t, Tensor) for t in args[:2]):
        return args[0] if args[1].dim() == 2 and args[0].dim() > 1 else None
    if func is torch.addmm and len(args) > 2 and isinstance(args[1], Tensor):
        return args[1]
    if func in _CONVOLUTIONS and len(args) > 1 and all(isinstance(t, Tensor) for t in args[:2]):
        x, weight = args[:2]
        return x.movedim(1, -1) if set(weight.shape[2:]) == {1} and x.dim() == weight.dim() else None
    if func is torch.einsum:
        return _einsum(args)
    return None


def _einsum(args: Sequence[Any]) -> Tensor | None:
    """einsum("bqhd,hdm->bqm", z, parameter): its features are what is summed over."""
    if len(args) != 3 or not isinstance(args[0], str) or not isinstance(args[2], nn.Parameter):
        return None
    terms, _, out = args[0].replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    summed = [letter for letter in left if letter in right and letter not in out]
    rows = [letter for letter in left if letter in out and letter not in right]
    if (
        not isinstance(args[1], Tensor)
        or not summed
        or len(rows) + len(summed) != len(left)
        or len(set(left)) != len(left)
    ):
        return None
    summed.sort(key=right.index)
    return args[1].permute([left.index(letter) for letter in (*rows, *summed)]).flatten(len(rows))


_LINEAR = {torch.nn.functional.linear}
_MATRIX = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_CONVOLUTIONS = {torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d}
LINEAR_FUNCTIONS = {*_LINEAR, *_MATRIX, *_CONVOLUTIONS, torch.addmm, torch.einsum}
"""Functions of which `projected` may say what they project."""
