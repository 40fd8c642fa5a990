"""The map of depth-wise convolutions one after the other: a filter of an image for each channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern


class DepthwisePattern(Pattern):
    """A[c, i, j]: what a unit at patch j of channel c becomes at patch i; zero where no kernel reaches.

    Each convolution fills up with zeros around the image, so that near its border the map is not that of one kernel;
    inside, `composite_kernel` is. It is the same for every input.

    Args:
        weights: [channel, rows, columns] of each convolution in turn, odd edges.
        dilations: of each. grid: rows and columns of the image, row by row in the sequence.
        n_batch: of the map.
        values: [batch, channel, patch, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: no convolutions, even edges, sizes that do not fit, weights that are not finite.

    >>> kernel = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> DepthwisePattern([kernel], [1], (1, 3), 1).dense()[0, 0].tolist()
    [[2.0, 3.0, 0.0], [1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]
    """

    signed = True
    normalised = False

    def __init__(
        self,
        weights: Sequence[Tensor],
        dilations: Sequence[int],
        grid: tuple[int, int],
        n_batch: int,
        *,
        values: Tensor | None = None,
    ) -> None:
        _check(weights, dilations)
        n, first = grid[0] * grid[1], weights[0]
        if min(grid) < 1 or n_batch < 1:
            raise CaptureError(f"a grid of {grid[0]} × {grid[1]} patches, batch {n_batch}, has none")
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        super().__init__((n_batch, len(first), n, n), Mask(n, n), dtype, first.device)
        self.weights, self.dilations, self.grid = [own(w) for w in weights], list(dilations), grid
        self.values = None if values is None else own(values)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The sizes; the weights, and the values where they are kept."""
        tensors = {f"kernel{i}": weight for i, weight in enumerate(self.weights)}
        facts = {"dilations": self.dilations, "grid": list(self.grid), "n_batch": self.n_batch}
        return facts, tensors if self.values is None else tensors | {"values": self.values}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> DepthwisePattern:
        """The pattern from its `state`."""
        weights = [tensors[f"kernel{i}"] for i in range(len(facts["dilations"]))]
        rows, columns = facts["grid"]
        return cls(weights, facts["dilations"], (rows, columns), facts["n_batch"], values=tensors.get("values"))

    def _filtered(self, images: Tensor, heads: Sequence[int]) -> Tensor:
        """[batch, channel, patch] through all convolutions of these channels."""
        x = images.unflatten(2, self.grid)
        for weight, dilation in zip(self.weights, self.dilations, strict=True):
            kernel = weight[list(heads)].to(self.dtype)[:, None]
            pad = [dilation * (size // 2) for size in weight.shape[1:]]
            x = F.conv2d(x, kernel, padding=pad, dilation=dilation, groups=len(kernel))
        return x.flatten(2)

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A; a view of the same for every batch entry."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] for these batch entries."""
        n = len(range(self.n_batch)[batch])
        units = torch.eye(self.n_keys, dtype=self.dtype, device=self.device)[keys]
        made = self._filtered(units[:, None].expand(-1, len(heads), -1).contiguous(), heads)  # [key, head, query]
        return made[..., queries].permute(1, 2, 0).expand(n, -1, -1, -1)

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width], by the convolutions themselves."""
        v = self._checked_values(values)
        each = [self._filtered(v[..., i], range(self.n_heads)) for i in range(v.shape[-1])]
        return torch.stack(each, dim=-1)


def composite_kernel(weights: Sequence[Tensor], dilations: Sequence[int]) -> Tensor:
    """[channel, rows, columns] of the one kernel that convolutions one after the other make inside an image.

    Its edges are 1 + Σ dilation · (edge − 1).

    >>> composite_kernel([torch.ones(1, 5, 5), torch.ones(1, 7, 7)], [1, 3]).shape
    torch.Size([1, 23, 23])

    Raises:
        CaptureError: as `DepthwisePattern` does.
    """
    _check(weights, dilations)
    edges = [1 + sum(d * (w.shape[axis] - 1) for w, d in zip(weights, dilations, strict=True)) for axis in (1, 2)]
    x = weights[0].new_zeros(1, len(weights[0]), *edges)
    x[:, :, edges[0] // 2, edges[1] // 2] = 1
    for weight, dilation in zip(weights, dilations, strict=True):
        pad = [dilation * (size // 2) for size in weight.shape[1:]]
        x = F.conv2d(x, weight[:, None], padding=pad, dilation=dilation, groups=len(weight))
    return x[0].flip(1, 2)  # a unit is read by those around it the other way round


def _check(weights: Sequence[Tensor], dilations: Sequence[int]) -> None:
    if not weights or len(weights) != len(dilations):
        raise CaptureError(
            f"{len(weights)} kernels and {len(dilations)} dilations: there is one for each, at least one"
        )
    for weight, dilation in zip(weights, dilations, strict=True):
        odd = weight.dim() == 3 and all(size % 2 for size in weight.shape[1:])
        if not odd or weight.shape[0] != len(weights[0]) or not weight.is_floating_point():
            raise CaptureError(
                f"a kernel must be [{len(weights[0])} channels, rows, columns] of odd edges", shape=weight.shape
            )
        if not isinstance(dilation, int) or dilation < 1:
            raise CaptureError(f"dilation={dilation!r} is not one of 1 up")
        check_finite("kernel", weight)
