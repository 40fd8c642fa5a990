"""A linear dynamical system whose matrices change with the position: what DSF writes every layer as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import CaptureError


@dataclass(frozen=True)
class DynamicalSystem:
    """h_t = Λ_t h_{t−1} + B_t v_t and y_t = C_t h_t + D_t v_t, for each head, from h = 0 (arXiv 2405.15731, eq. 3).

    The n rows of the state are the same for every channel of the values, so that h_t is [n, width], which the paper
    writes as one vector of n · width numbers with B_t = (I ⊗ b_t) W_V and C_t = I ⊗ c_tᵀ. Layers whose channels differ
    have a head for each.

    Attributes:
        decay: Λ, or its diagonal part: [batch, head, position, 1] for a number times the identity, or
            [batch, head, position, n].
        B: [batch, head, position, n], what is written. C: like it, what is read.
        D: [batch, head, position], what passes by the state; None for nothing.
        erased, along: [batch, head, position, n] each, of the rank-one part: Λ_t = diag(decay_t) − erased_t along_tᵀ.
        block: Λ itself [position or 1, n, n] where it is neither; then `decay` is not used.
        error: [batch, head, position], at most how far a row of the map is from what the system stands for, in the sum
            of its absolute differences; None where it is that map.

    Raises:
        CaptureError: sizes that do not fit.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> DynamicalSystem(one / 2, one, one).map()[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    decay: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    erased: Tensor | None = None
    along: Tensor | None = None
    block: Tensor | None = None
    error: Tensor | None = None

    def __post_init__(self) -> None:
        b, h, t, n = self.B.shape
        wanted: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
            "C": (self.C, [(b, h, t, n)]),
            "decay": (self.decay, [(b, h, t, n), (b, h, t, 1)]),
            "D": (self.D, [(b, h, t)]),
            "erased": (self.erased, [(b, h, t, n)]),
            "along": (self.along, [(b, h, t, n)]),
            "block": (self.block, [(t, n, n), (1, n, n)]),
            "error": (self.error, [(b, h, t)]),
        }
        for name, (tensor, shapes) in wanted.items():
            if tensor is not None and tuple(tensor.shape) not in shapes:
                told = " or ".join(str(list(shape)) for shape in shapes)
                raise CaptureError(f"{name} must be {told}, where B is {list(self.B.shape)}", shape=tensor.shape)
        if (self.erased is None) != (self.along is None):
            raise CaptureError("a rank-one part needs both erased and along")

    @property
    def n(self) -> int:
        """How many numbers the state has for each channel of the values: DSF's state expansion."""
        return self.B.shape[-1]

    @property
    def kind(self) -> str:
        """What Λ is: "scalar", "diagonal", "diagonal plus rank one" or "block"."""
        if self.block is not None:
            return "block"
        if self.erased is not None:
            return "diagonal plus rank one"
        return "scalar" if self.decay.shape[-1] == 1 else "diagonal"

    def transition(self, position: int) -> Tensor:
        """Λ of a position, [batch, head, n, n]."""
        b, h, _, n = self.B.shape
        if self.block is not None:
            return self.block[position if len(self.block) > 1 else 0].expand(b, h, n, n)
        whole = torch.diag_embed(self.decay[:, :, position].expand(b, h, n))
        if self.erased is None or self.along is None:
            return whole
        return whole - self.erased[:, :, position, :, None] * self.along[:, :, position, None, :]

    def stepped(self, state: Tensor, position: int) -> Tensor:
        """Λ_t h for a state [batch, head, n, width], without making Λ."""
        if self.block is not None:
            return self.transition(position) @ state
        kept = self.decay[:, :, position, :, None] * state
        if self.erased is None or self.along is None:
            return kept
        return kept - self.erased[:, :, position, :, None] * (self.along[:, :, position, None, :] @ state)

    def run(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence itself, position by position.

        Args:
            values: [batch, head, position, width].

        Returns: y [batch, head, position, width], and the states [batch, head, position, n, width].
        """
        b, h, t, n = self.B.shape
        if values.dim() != 4 or values.shape[:3] != (b, h, t):
            raise CaptureError(f"values must be [{b}, {h}, {t}, width]", shape=values.shape)
        state = values.new_zeros(b, h, n, values.shape[-1])
        states = []
        for i in range(t):
            state = self.stepped(state, i) + self.B[:, :, i, :, None] * values[:, :, i, None, :]
            states.append(state)
        found = torch.stack(states, dim=2)
        y = (self.C[..., None] * found).sum(-2)
        return (y if self.D is None else y + self.D[..., None] * values), found

    def map(self) -> Tensor:
        """Φ [batch, head, query, key]: Φ[i, j] = C_i Λ_i … Λ_{j+1} B_j for j < i, and C_i B_i + D_i; zero above.

        It holds n · position² numbers: for examples, not for long sequences.
        """
        b, h, t, _ = self.B.shape
        units = torch.eye(t, dtype=self.B.dtype, device=self.B.device).expand(b, h, t, t)
        return self.run(units)[0]
