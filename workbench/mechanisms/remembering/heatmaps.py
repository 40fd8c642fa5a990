"""Heat maps that are made finer: each new pixel is a mean of nine old ones, with weights of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_SOFTEN = 0.1  # of the logits of the weights


class ConvexUp(nn.Module):
    """Twice as many rows and columns: every new pixel is a convex combination of the 3 x 3 around its old one.

    Args:
        width: channels that go in. out: channels that come out.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.content, self.weights = nn.Conv2d(width, out, 3, padding=1), nn.Conv2d(width, 9 * 4, 3, padding=1)

    def shares(self, x: Tensor) -> Tensor:
        """[batch, 9, 4, row, column] of each of four new pixels, how much of each neighbour: 1 together."""
        return (_SOFTEN * self.weights(x)).unflatten(1, (9, 4)).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, out, 2 row, 2 column] of [batch, width, row, column]."""
        return combined(self.content(x), self.shares(x))


def combined(values: Tensor, shares: Tensor) -> Tensor:
    """[batch, channel, 2 row, 2 column] of values [batch, channel, row, column], each mixed of its 3 x 3 neighbours.

    Beyond the border stands what is at the border.

    >>> import torch
    >>> even = torch.full((1, 9, 4, 2, 2), 1 / 9)
    >>> combined(torch.ones(1, 1, 2, 2), even).shape
    torch.Size([1, 1, 4, 4])
    """
    batch, channels, rows, columns = values.shape
    near = F.unfold(F.pad(values, (1, 1, 1, 1), mode="replicate"), 3).view(batch, channels, 9, 1, rows, columns)
    mixed = (near * shares[:, None]).sum(2)  # [batch, channel, 4, row, column]
    return F.pixel_shuffle(mixed.flatten(1, 2), 2)
