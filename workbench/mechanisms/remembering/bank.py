"""SAM2Act's memory: a bank of past frames for each view, read by attention and written with what was decided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError

_THETA = 100.0  # of the rotary positions, as SAM2 takes it for small grids
_PLACE, _CONTENT = 3.0, 0.2  # how much the place counts at first, and what is there


class _Attention(nn.Module):
    """One head: queries of the frame, keys and values of the memory; both turned by row and column.

    Biases begin so large that a cell reads its own place in each frame most, with two thirds of its weight. SAM2's
    layers come trained; from biases of 1 it is 6 %, and what was where is not learnt in 450 steps.
    """

    angles: Tensor

    def __init__(self, width: int, memory: int, grid: tuple[int, int]) -> None:
        super().__init__()
        rates = _THETA ** -(torch.arange(width // 4) / (width // 4))
        row, column = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).T.float()
        self.register_buffer("angles", torch.cat([row[:, None] * rates, column[:, None] * rates], 1), persistent=False)
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(memory, width), nn.Linear(memory, width)
        for one in (self.q_proj, self.k_proj):
            nn.init.constant_(one.bias, _PLACE)
            nn.init.xavier_uniform_(one.weight, _CONTENT)

    def turned(self, x: Tensor) -> Tensor:
        """[view, key, width] turned in pairs by the place of each cell, frame after frame."""
        angles = self.angles.repeat(x.shape[1] // len(self.angles), 1)
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[view, cell, width] of [view, cell, width] and [view, key, memory]."""
        q, k = self.turned(self.q_proj(x)), self.turned(self.k_proj(keys))
        q, k, v = (one[:, None] for one in (q, k, self.v_proj(values)))
        found: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return found


class _Layer(nn.Module):
    def __init__(self, width: int, memory: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = _Attention(width, width, grid)
        self.cross_attn = _Attention(width, memory, grid)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        given = self.first(x)
        x = x + self.self_attn(given, given, given)
        x = x + self.cross_attn(self.second(x), keys, values)
        made: Tensor = x + self.down(F.relu(self.up(self.third(x))))
        return made


class MemoryBank(nn.Module):
    """Past frames of each view: what was seen with where it was acted, `size` of them at most, the newest stay.

    Reading is `layers` times self-attention over the frame and attention to all cells of all remembered frames, with
    rotary positions of rows and columns. Keys have the place in the frame and how long ago it was added, values have
    not. Views are rows of the batch, and do not see each other.

    Args:
        width: of the cells, a multiple of 4. grid: rows and columns. memory: width of what is kept. size: frames kept.

    Raises:
        WorkbenchError: a size below 1, or a width that is no multiple of 4.
    """

    def __init__(self, width: int, grid: tuple[int, int], memory: int = 16, size: int = 7, layers: int = 2) -> None:
        super().__init__()
        if size < 1:
            raise WorkbenchError(f"a bank of {size} frames remembers nothing", hint="at least 1")
        if width % 4:
            raise WorkbenchError(f"cells of width {width} cannot be turned by row and column", hint="a multiple of 4")
        self.size, self.grid = size, grid
        self.memory_attention = nn.ModuleList(_Layer(width, memory, grid) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.place = nn.Parameter(0.1 * torch.randn(grid[0] * grid[1], memory))
        self.ago = nn.Parameter(0.1 * torch.randn(size, 1, memory))
        self.mask = nn.Linear(1, memory)
        self.content = nn.Linear(width, memory)
        self.fuse = nn.Conv2d(memory, memory, 3, padding=1)

    def written(self, x: Tensor, heat: Tensor) -> Tensor:
        """[view, cell, memory] what is kept of cells x and the logits [view, row, column] of where was acted."""
        # SAM2 takes the mask from −10 to 10 and brings it down by norms; here it is from −1 to 1.
        mask = F.adaptive_avg_pool2d(heat.sigmoid()[:, None] * 2 - 1, self.grid).flatten(2).transpose(1, 2)
        made = (self.content(x) + self.mask(mask)).transpose(1, 2).unflatten(2, self.grid)
        found: Tensor = (made + self.fuse(F.gelu(made))).flatten(2).transpose(1, 2)
        return found

    def kept(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """The frames that are remembered of those that were written, oldest first."""
        return list(frames)[-self.size :]

    def forward(self, x: Tensor, frames: Sequence[Tensor]) -> Tensor:
        """[view, cell, width] with what was recalled; x itself where nothing was written.

        Args:
            frames: of `written`, oldest first.
        """
        kept = self.kept(frames)
        if not kept:
            return x
        # The newest is the first of `ago`.
        keys = torch.cat([one + self.place + self.ago[len(kept) - 1 - i] for i, one in enumerate(kept)], 1)
        values = torch.cat(kept, 1)
        for layer in self.memory_attention:
            x = layer(x, keys, values)
        found: Tensor = self.norm(x)
        return found


def frame_weights(weights: Tensor, n_frames: int) -> Tensor:
    """[..., frame] how much is read of each frame, of weights [..., frame · cell].

    >>> frame_weights(torch.tensor([0.1, 0.2, 0.3, 0.4]), 2).tolist()
    [0.3..., 0.7...]
    """
    return weights.unflatten(-1, (n_frames, -1)).sum(-1)
