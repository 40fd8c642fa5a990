"""The maps that Mamba and Mamba-2 apply, tile by tile: decayed products of C and B, signed and not normalised.

How much is left of position j at position i is exp(A Σ_{t=j+1..i} Δ_t). The sums are differences of one running sum,
taken in float64 within the positions that a tile needs, so that none of them is lost far from the start; no decay is
ever divided by another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import threshold

from workbench.errors import CaptureError
from workbench.kernels.checks import check_finite
from workbench.kernels.history import differentiable, own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent.pattern import RecurrentPattern

_ROWS = (
    16  # rows at a time where the diagonal crosses a tile: larger corners cost more exps, smaller ones more products
)
_NUMBERS = 1 << 21  # of [head, position, state] held at once: 8 MiB in float32


class _StatePattern(Pattern):
    """What the two families share: their tensors, and that statistics are those of |M| normalised per row."""

    grade = "frozen"
    signed = True
    normalised = False
    position_axes: ClassVar[Mapping[str, int]] = {"delta": 2, "B": 2, "C": 2, "values": 2}
    _per_state: bool  # whether A has a number for each state

    def __init__(self, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, values: Tensor | None = None) -> None:
        _check(delta, A, B, C, values, per_state=self._per_state)
        dtype = torch.float64 if torch.float64 in (delta.dtype, B.dtype, C.dtype) else torch.float32
        b, h, n = delta.shape
        super().__init__((b, h, n, n), Mask(n, n, causal=True), dtype, delta.device)
        self.delta, self.A, self.B, self.C = own(delta), own(A), own(B), own(C)
        self.values = None if values is None else own(values)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """No facts; delta, A, B and C, and the values where they are kept."""
        tensors = {"delta": self.delta, "A": self.A, "B": self.B, "C": self.C}
        return {}, tensors if self.values is None else tensors | {"values": self.values}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The pattern from its `state`."""
        return cls(*(tensors[name] for name in ("delta", "A", "B", "C")), values=tensors.get("values"))

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of M, in a fresh tensor."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] of M for these batch entries and heads, a few heads at a time."""
        index = torch.tensor(list(heads), dtype=torch.long, device=self.device)
        n_batch, n_rows, n_columns = len(range(self.n_batch)[batch]), _length(queries), _length(keys)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (self.delta, self.A, self.B, self.C)):
            steps = self.delta[batch, index, None, keys].to(self.dtype)  # what follows writes into its own tensors
            return self.recurrence(heads).tile_of(batch, queries, keys, range(len(index))) * steps
        out = torch.zeros(n_batch, len(index), n_rows, n_columns, dtype=self.dtype, device=self.device)
        if out.numel() == 0 or keys.start >= queries.stop:
            return out
        at_once = max(1, _NUMBERS // (n_batch * self._numbers(n_rows, n_columns)))
        for start in range(0, len(index), at_once):
            some = slice(start, start + at_once)
            self._fill(out[:, some], batch, queries, keys, index[some])
        return out

    @abstractmethod
    def _numbers(self, n_rows: int, n_columns: int) -> int:
        """How many numbers `_fill` holds for one head of one batch entry."""

    @abstractmethod
    def _fill(self, out: Tensor, batch: slice, queries: slice, keys: slice, heads: Tensor) -> None:
        """Write M into `out`, zeros [b, len(heads), q, k]."""

    def recurrence(self, heads: Sequence[int] | None = None) -> RecurrentPattern:
        """Some heads as the recurrence that they are: M is its map times Δ_j, and M·V what it makes of Δ·V."""
        which = list(range(self.n_heads) if heads is None else heads)
        index = torch.tensor(which, dtype=torch.long, device=self.device)
        everywhere = slice(None), slice(0, self.n_keys)
        C, B = (self._of_group(t, *everywhere, index) for t in (self.C, self.B))
        delta, A = self.delta[:, index].double(), self.A[index].double()
        decay = delta[..., None] * A[:, None] if self._per_state else delta * A[:, None]
        with differentiable():
            return RecurrentPattern(C, B, decay)

    def as_recurrence(self) -> RecurrentPattern:
        """With Δ in the keys, so that its map is M itself."""
        plain = self.recurrence()
        k = plain.k * self.delta[..., None].to(plain.k)
        made = RecurrentPattern(plain.q, k, plain.log_decay, values=self.values)
        made.before = self.before
        return made

    def apply(self, values: Tensor) -> Tensor:
        """M·V [batch, head, query, width], some heads at a time, chunk by chunk in linear time; see `Pattern.apply`."""
        v = self._checked_values(values)
        per_head = self.n_batch * self.n_keys * self.A.shape[-1] * (3 if self._per_state else 1)
        at_once = max(1, _NUMBERS // per_head) if self._per_state else self.n_heads
        parts = []
        for start in range(0, self.n_heads, at_once):
            heads = range(start, min(start + at_once, self.n_heads))
            part = slice(heads.start, heads.stop)
            parts.append(self.recurrence(heads).apply(v[:, part] * self.delta[:, part, :, None].to(self.dtype)))
        return torch.cat(parts, dim=1)

    def from_state(self, state: Tensor) -> Tensor:
        """[batch, head, query, width] that the rows read of a state from before the first one.

        Args:
            state: [batch, head, width, state], of S6 [batch, channel, state].
        """
        held = (state[:, :, None] if state.dim() == 3 else state).to(self.dtype)
        everything = slice(0, self.n_queries)
        total = self.delta.double().cumsum(-1)
        rate = self.A.double() if self._per_state else self.A.double()[:, None]
        left = _exp((total[..., None] * rate[:, None]).to(self.dtype))  # [b, h, query, state or 1]
        heads = torch.arange(self.n_heads, device=self.device)
        return (self._of_group(self.C, slice(None), everything, heads) * left) @ held.mT

    def _of_group(self, tensor: Tensor, batch: slice, where: slice, heads: Tensor) -> Tensor:
        """[b, head, len(where), state] of B or C, in the pattern's dtype."""
        return tensor[batch, :, where][:, heads // (self.n_heads // tensor.shape[1])].to(self.dtype)

    def check(self) -> None:
        """Raise a CaptureError that names the first NaN or inf among the pattern's tensors."""
        for name in ("delta", "A", "B", "C"):
            check_finite(name, getattr(self, name))


class SelectivePattern(_StatePattern):
    """M[i, j] = Σ_s C_i[s] exp(A[s] Σ_{t=j+1..i} Δ_t) Δ_j B_j[s] for j ≤ i: Mamba's S6, a map for each channel.

    The channels are the heads. M is what the layer applies with its Δ, B and C held fixed (arXiv 2312.00752; as
    attention arXiv 2403.01590): entries have either sign and rows do not sum to one, so statistics are those of |M|
    normalised per row.

    Args:
        delta: [batch, channel, position], step sizes after softplus, at least zero.
        A: [channel, state], at most zero.
        B, C: [batch, group, position, state]; the channels are split evenly among the groups.
        values: [batch, channel, position, 1], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, negative Δ, positive A.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> SelectivePattern(one[..., 0], torch.tensor([[0.5]]).log(), one, one).dense()[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    _per_state = True

    def _numbers(self, n_rows: int, n_columns: int) -> int:
        return max(n_rows + n_columns, _ROWS * _ROWS) * self.A.shape[-1]

    def _fill(self, out: Tensor, batch: slice, queries: slice, keys: slice, heads: Tensor) -> None:
        first = min(queries.start, keys.start)
        delta, A = self.delta[batch, heads], self.A[heads].to(self.dtype)
        total = delta[..., first : queries.stop].double().cumsum(-1)
        read = self._of_group(self.C, batch, queries, heads)
        write = self._of_group(self.B, batch, keys, heads) * delta[..., keys, None]
        # Below the diagonal all rows can share one place to meet at: what is written decays until there and what is
        # read from there on, so that no factor exceeds one and the sum over states is a matrix product.
        step = _length(queries) if keys.stop <= queries.start + 1 else _ROWS
        for start in range(queries.start, queries.stop, step):
            rows, r = _part(queries, start, start + step)
            past, p = _part(keys, keys.start, start + 1)
            near, c = _part(keys, start + 1, rows.stop)
            since = total[..., rows.start - first : rows.stop - first]
            if _length(past):
                since_past = total[..., past.start - first : past.stop - first]
                reads = self._faded(since - since[..., :1], A) * read[:, :, r]
                writes = self._faded(since[..., :1] - since_past, A) * write[:, :, p]
                out[:, :, r, p] = reads @ writes.mT
            if _length(near):
                away = since[..., None] - total[..., None, near.start - first : near.stop - first]
                left = self._faded(away.clamp_(min=0), A)
                corner = left.mul_(read[:, :, r, None]).mul_(write[:, :, None, c]).sum(-1)
                out[:, :, r, c] = corner.tril_(rows.start - near.start)

    def _faded(self, away: Tensor, A: Tensor) -> Tensor:
        """exp(A · away), [b, h, ..., state] for float64 sums `away` [b, h, ...]."""
        shape = (len(A), *[1] * (away.dim() - 2), A.shape[-1])
        return _exp(away.to(self.dtype)[..., None] * A.view(shape))


class DualPattern(_StatePattern):
    """M[i, j] = (C_i·B_j) exp(A Σ_{t=j+1..i} Δ_t) Δ_j for j ≤ i: Mamba-2's SSD, a map for each head (arXiv 2405.21060).

    C asks and B answers as queries and keys do, and a decay stands in place of the softmax. M is what the layer applies
    with its Δ, B and C held fixed: entries have either sign and rows do not sum to one, so statistics are those of |M|
    normalised per row.

    Args:
        delta: [batch, head, position], step sizes after softplus and limits, at least zero.
        A: [head], at most zero.
        B, C: [batch, group, position, state]; the heads are split evenly among the groups.
        values: [batch, head, position, width], kept for `value_weighted`; optional.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, negative Δ, positive A.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> DualPattern(one[..., 0], torch.tensor([0.5]).log(), one, one).dense()[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    """

    _per_state = False

    def _numbers(self, n_rows: int, n_columns: int) -> int:
        return 3 * n_rows * n_columns  # decays in float64, and scores

    def _fill(self, out: Tensor, batch: slice, queries: slice, keys: slice, heads: Tensor) -> None:
        first = min(queries.start, keys.start)
        delta = self.delta[batch, heads]
        total = (delta[..., first : queries.stop].double() * self.A[heads, None].double()).cumsum(-1)
        columns, c = _part(keys, keys.start, queries.stop)
        at_query = total[..., queries.start - first :, None]
        at_key = total[..., None, columns.start - first : columns.stop - first]
        left = _exp((at_query - at_key).clamp_(max=0).to(self.dtype))
        groups, of_head = (heads // (self.n_heads // self.C.shape[1])).unique(return_inverse=True)
        read, write = (
            tensor[batch, :, where][:, groups].to(self.dtype)
            for tensor, where in ((self.C, queries), (self.B, columns))
        )
        scores = (read @ write.mT)[:, of_head]
        out[..., c] = left.mul_(scores).mul_(delta[..., None, columns]).tril_(queries.start - keys.start)


def _exp(exponents: Tensor) -> Tensor:
    """exp in place; what is too small for a normal number is zero, since a CPU takes far longer over subnormal ones."""
    return threshold(exponents.exp_(), torch.finfo(exponents.dtype).tiny, 0.0, inplace=True)


def _length(part: slice) -> int:
    return max(0, part.stop - part.start)


def _part(whole: slice, start: int, stop: int) -> tuple[slice, slice]:
    """The positions of `whole` from `start` up to `stop`, and where they lie in it."""
    start = min(max(start, whole.start), whole.stop)
    stop = max(min(stop, whole.stop), start)
    return slice(start, stop), slice(start - whole.start, stop - whole.start)


def _check(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, values: Tensor | None, per_state: bool) -> None:
    if delta.dim() != 3 or delta.shape[2] == 0:
        raise CaptureError("delta must be [batch, head, position], with at least one position", shape=delta.shape)
    b, h, n = delta.shape
    fits = B.dim() == 4 and B.shape[0] == b and B.shape[2] == n and B.shape[1] > 0 and h % B.shape[1] == 0
    if not fits or C.shape != B.shape:
        raise CaptureError(
            f"B {list(B.shape)} and C {list(C.shape)} must both be [batch {b}, group, position {n}, state]",
            hint=f"the {h} heads are split evenly among the groups",
        )
    if A.shape != ((h, B.shape[3]) if per_state else (h,)):
        wanted = f"[head {h}, state {B.shape[3]}]" if per_state else f"[head {h}]"
        raise CaptureError(f"A must be {wanted}", shape=A.shape)
    if values is not None and (values.dim() != 4 or values.shape[:3] != delta.shape):
        raise CaptureError(f"values must be [batch {b}, head {h}, position {n}, width]", shape=values.shape)
    for name, tensor in {"delta": delta, "A": A, "B": B, "C": C}.items():
        if not tensor.is_floating_point():
            raise CaptureError(f"{name} must be floating point, not {tensor.dtype}", shape=tensor.shape)
        if tensor.device != delta.device:
            raise CaptureError(f"delta is on {delta.device} and {name} on {tensor.device}", hint="move them together")
        check_finite(name, tensor)
    if bool((delta < 0).any()):
        raise CaptureError(f"a step size delta is {delta.min():.3g}, below zero", hint="pass Δ after its softplus")
    if bool((A > 0).any()):
        raise CaptureError(f"a rate A is {A.max():.3g}, above zero", hint="pass A itself, such as -exp(A_log)")
