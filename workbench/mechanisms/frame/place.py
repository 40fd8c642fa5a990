"""Where a mechanism stands in a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.checks import check_range
from workbench.mechanisms.frame.options import fits


@dataclass(frozen=True)
class Place:
    """All that a mechanism is told of the model around it.

    Attributes:
        d_model: width of what goes in and out. n_heads: those of the plain attention that it stands in for.
        length: the most tokens; of a grid, exactly as many.
        causal: no token may depend on a later one.
        grid: (rows, columns) where the tokens are patches of an image, row-major; None for a sequence.
        rotary: queries and keys are turned by their positions (RoFormer, arXiv 2104.09864), where there are any.

    Raises:
        WorkbenchError: heads that do not divide the width, a grid of another length, one that is causal, or an odd
            width of heads that are to be turned.

    >>> Place(64, 4, 63, causal=False, grid=(7, 9)).d_head
    16
    """

    d_model: int
    n_heads: int
    length: int
    causal: bool = True
    grid: tuple[int, int] | None = None
    rotary: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "length"):
            check_range(name, getattr(self, name), 1, None)
        if self.d_model % self.n_heads:
            raise WorkbenchError(
                f"{self.n_heads} heads do not divide d_model={self.d_model}", hint="take a multiple of the heads"
            )
        if self.rotary and self.d_head % 2:
            raise WorkbenchError(f"heads of width {self.d_head} cannot be turned in pairs", hint="an even width")
        for name in ("causal", "rotary"):
            if not isinstance(getattr(self, name), bool):
                raise WorkbenchError(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.grid is not None:
            self._check_grid(self.grid)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if not fits(grid, tuple[int, ...]) or len(grid) != 2:
            raise WorkbenchError(
                f"grid={grid!r} is not (rows, columns)", hint="two whole numbers, or None for a sequence"
            )
        object.__setattr__(self, "grid", tuple(grid))
        if min(grid) < 1 or grid[0] * grid[1] != self.length:
            raise WorkbenchError(
                f"{self.length} tokens are no grid of {' × '.join(map(str, grid))}", hint="length = rows · columns"
            )
        if self.causal or self.rotary:
            word = "causal" if self.causal else "rotary"
            raise WorkbenchError(
                f"a grid has no order of its tokens: {word}=True is for sequences", hint=f"{word}=False, or grid=None"
            )

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    def check(self, x: Tensor, *, exact: bool = False) -> None:
        """Check what a module in this place is given.

        Args:
            exact: only the place's own length fits, as on a grid.

        Raises:
            WorkbenchError: x is not [batch, token, d_model] of this place.
        """
        exact = exact or self.grid is not None
        fits = x.dim() == 3 and x.shape[2] == self.d_model and 1 <= x.shape[1] <= self.length
        if not fits or (exact and x.shape[1] != self.length):
            tokens = f"{self.length}" if exact else f"1 to {self.length}"
            raise WorkbenchError(
                f"x must be [batch, {tokens} tokens, {self.d_model}]", shape=x.shape,
                hint="the Place that the module was built for says so: build it for another one",
            )  # fmt: skip
