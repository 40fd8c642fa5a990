"""The map of a linear recurrence, tile by tile: gated linear attention, delta rules, gated recurrent units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.errors import CaptureError
from workbench.kernels.checks import ask_later, check_attention, check_finite
from workbench.kernels.history import own
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.recurrent.autograd import run
from workbench.kernels.recurrent.chunk_maps import Chunks, map_chunks
from workbench.kernels.recurrent.chunked import Inputs, chunk_length
from workbench.kernels.recurrent.fades import SMALLEST_LOG
from workbench.kernels.recurrent.magnitudes import Magnitudes, sums_of_logs
from workbench.kernels.source import FusedMagnitudes


class RecurrentPattern(Pattern):
    """A[i, j] = q_i · Λ_i … Λ_{j+1} β_j k_j for j ≤ i: what y_t = q_t·h_t reads from h_t = Λ_t h_{t−1} + β_t k_t v_tᵀ.

    Λ_t is diag(exp g_t), or with β the delta rule's (I − β_t k_t k_tᵀ) diag(exp g_t): a dynamical system whose B is
    β k and whose C is q, as arXiv 2405.15731 writes attention, state spaces and recurrent networks. Without g and β it
    is causal linear attention. A is what the layer applies with its gates, keys and steps held fixed: entries have
    either sign and rows do not sum to one, so statistics are those of |A| normalised per row.

    Memory grows with the length alone, a tile costs two small products, and `apply` runs chunk by chunk. What is
    made of the chunks, some times the size of q and k, is kept from the first use on; files and copies do not have it.

    Args:
        q, k: [batch, group, position, d]; the heads are split evenly among the groups.
        log_decay: g, at most zero: [batch, head, position], or for each channel of the state
            [batch, head, position, d]; None for no decay. −inf forgets everything before.
        beta: [batch, head, position], the step of a delta rule; None for a recurrence that erases nothing.
        values: [batch, head, position, width], kept for `value_weighted`; optional.
        n_heads: where neither log_decay nor beta says it; the groups by default.

    Raises:
        CaptureError: sizes that do not fit, inputs that are not finite, a log_decay above zero.

    >>> one = torch.ones(1, 1, 3, 1)
    >>> RecurrentPattern(one, one, torch.full((1, 1, 3), 0.5).log()).dense()[0, 0].tolist()
    [[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 1.0]]
    >>> RecurrentPattern(one, one, beta=torch.ones(1, 1, 3)).dense()[0, 0].tolist()  # each write erases the last
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    grade = "frozen"
    signed = True
    normalised = False
    position_axes: ClassVar[Mapping[str, int]] = {"q": 2, "k": 2, "log_decay": 2, "beta": 2, "values": 2}

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        values: Tensor | None = None,
        n_heads: int | None = None,
    ) -> None:
        n_heads = next((t.shape[1] for t in (log_decay, beta) if t is not None and t.dim() > 1), n_heads or q.shape[1])
        check_recurrence(q, k, log_decay, beta, n_heads)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        n = q.shape[2]
        super().__init__((q.shape[0], n_heads, n, n), Mask(n, n, causal=True), dtype, q.device)
        self.q, self.k = own(q), own(k)
        self.log_decay = None if log_decay is None else own(log_decay).clamp(min=SMALLEST_LOG)
        self.beta = None if beta is None else own(beta)
        self.values = None if values is None else own(values)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The number of heads; q, k, and log_decay, beta and values where there are any."""
        held = {"q": self.q, "k": self.k, "log_decay": self.log_decay, "beta": self.beta, "values": self.values}
        return {"n_heads": self.n_heads}, {name: t for name, t in held.items() if t is not None}

    @classmethod
    def rebuild(cls, facts: dict[str, Any], tensors: dict[str, Tensor]) -> RecurrentPattern:
        """The pattern from its `state`."""
        optional = {name: tensors.get(name) for name in ("log_decay", "beta", "values")}
        return cls(tensors["q"], tensors["k"], n_heads=facts["n_heads"], **optional)

    def fused_magnitudes(self) -> FusedMagnitudes | None:
        """On a GPU the kernels of softmaxes, for decays of whole heads."""
        return None if self.device.type == "cpu" or self.beta is not None or self._of_channels else self.magnitudes()

    @property
    def why_unfused(self) -> str:
        """What of the recurrence no fused kernel knows."""
        known = "fused kernels of |A| know decays of whole heads"
        return f"{known}, and no delta rule" if self.beta is not None else f"{known}, not of channels"

    @property
    def _of_channels(self) -> bool:
        return self.log_decay is not None and self.log_decay.dim() == 4

    def magnitudes(self) -> Magnitudes:
        """|A| for the kernels, wherever its tensors are."""
        return Magnitudes(self.q, self.k, self.n_heads, lambda: sums_of_logs(self.log_decay), self._row_sums)

    def _row_sums(self) -> Tensor:
        """[batch, head, query] Σ A, in linear time."""
        ones = torch.ones(*self.shape[:2], self.n_keys, 1, dtype=self.q.dtype, device=self.device)
        return self.apply(ones).squeeze(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: held for name, held in self.__dict__.items() if name not in ("_chunks", "_part", "_strip")}

    # The recurrence.

    def _of_head(self, t: Tensor) -> Tensor:
        """[batch, head, position, d] of q or k, in the pattern's dtype."""
        return t.to(self.dtype).repeat_interleave(self.n_heads // t.shape[1], dim=1)

    @cached_property
    def _chunks(self) -> Chunks:
        length = min(chunk_length(self.q.shape[-1], self.log_decay), self.n_keys)
        with torch.autocast(self.device.type, enabled=False):
            return map_chunks(self._of_head(self.q), self._of_head(self.k), self.log_decay, self.beta, length)

    def apply(self, values: Tensor) -> Tensor:
        """A·V, [batch, head, query, width], chunk by chunk in linear time; see `Pattern.apply`."""
        return self._run(self._checked_values(values), None, slice(0, self.n_keys))[0]

    def from_state(self, state: Tensor) -> Tensor:
        """[batch, head, query, width] that the rows read of a state [batch, head, d, width] from before the first one.

        >>> one = torch.ones(1, 1, 3, 1)
        >>> RecurrentPattern(one, one, torch.full((1, 1, 3), 0.5).log()).from_state(one[:, :, :1]).flatten().tolist()
        [0.5, 0.25, 0.125]
        """
        wanted = (self.n_batch, self.n_heads, self.q.shape[-1])
        if state.dim() != 4 or tuple(state.shape[:3]) != wanted:
            raise CaptureError(f"a state must be {list(wanted)} with a width", shape=state.shape)
        state = state.to(self.dtype)
        nothing = state.new_zeros(self.n_batch, self.n_heads, self.n_keys, state.shape[-1])
        return self._run(nothing, state, slice(0, self.n_keys))[0]

    def _run(self, v: Tensor, state: Tensor | None, at: slice) -> tuple[Tensor, Tensor]:
        """What some positions read, of the values there and of a state before them, and the state after them."""
        q, k = (self._of_head(t[:, :, at]) for t in (self.q, self.k))
        log_decay, beta = (None if t is None else t[:, :, at] for t in (self.log_decay, self.beta))
        return run(Inputs(q, k, v[:, :, at], log_decay, beta), state)

    def state_at(self, position: int, values: Tensor | None = None, *, initial_state: Tensor | None = None) -> Tensor:
        """The state h after a position, [batch, head, d, width].

        Args:
            values: as `apply` takes them; by default those that the pattern has kept.
            initial_state: [batch, head, d, width] from before the first position; None where there was none.

        Raises:
            CaptureError: there is no such position, there are no values, or the pattern goes on from a state (see
                `before`) that is not given.

        >>> one = torch.ones(1, 1, 3, 1)
        >>> RecurrentPattern(one, one, torch.full((1, 1, 3), 0.5).log(), values=one).state_at(-1).item()
        1.75
        """
        if not -self.n_keys <= position < self.n_keys:
            raise CaptureError(f"there are {self.n_keys} positions, no position {position}")
        v, initial = self._start_of(values, initial_state)
        return self._run(v, initial, slice(0, position % self.n_keys + 1))[1]

    def states(self, values: Tensor | None = None, *, every: int = 1, initial_state: Tensor | None = None) -> Tensor:
        """The states after positions every − 1, 2·every − 1, …, [batch, head, time, d, width], in one pass.

        Args:
            values, initial_state: as `state_at` takes them.

        >>> one = torch.ones(1, 1, 4, 1)
        >>> RecurrentPattern(one, one, torch.full((1, 1, 4), 0.5).log(), values=one).states(every=2).flatten().tolist()
        [1.5, 1.875]
        """
        if every < 1:
            raise CaptureError(f"there is no state every {every} positions", hint="1 or more")
        v, state = self._start_of(values, initial_state)
        found = []
        for start in range(0, self.n_keys - every + 1, every):
            _, state = self._run(v, state, slice(start, start + every))
            found.append(state)
        if not found:
            return v.new_zeros(*v.shape[:2], 0, self.q.shape[-1], v.shape[-1])
        return torch.stack(found, dim=2)

    def _start_of(self, values: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a state is made of: values [batch, head, key, width], and the state before the first position."""
        kept = self.values if values is None else values
        if kept is None:
            raise CaptureError("a state is made of values", hint="pass values=, or capture with values=True")
        v = self._checked_values(kept)
        wanted = (self.n_batch, self.n_heads, self.q.shape[-1], v.shape[-1])
        if initial is None:
            if self.before is not None:
                raise CaptureError(
                    "the recurrence goes on from an earlier state, of which only what its rows read is kept",
                    hint="begin the capture before the prompt is run, or pass initial_state=: zeros for what these "
                    "positions alone have written",
                )
            return v, None
        if tuple(initial.shape) != wanted:
            raise CaptureError(f"an initial state must be {list(wanted)}", shape=initial.shape)
        return v, initial.to(v)

    # How fast it forgets, and what of the map is due to that.

    @property
    def half_life(self) -> Tensor:
        """[batch, head, d or 1] positions in which the decay halves what is held, on average; inf without decay.

        Of the mean of g over positions. What a delta rule erases is not counted.

        >>> one = torch.ones(1, 1, 3, 1)
        >>> round(RecurrentPattern(one, one, torch.full((1, 1, 3), 0.5).log()).half_life.item(), 4)
        1.0
        """
        if self.log_decay is None:
            return torch.full((self.n_batch, self.n_heads, 1), torch.inf, dtype=self.dtype, device=self.device)
        g = self.log_decay if self.log_decay.dim() == 4 else self.log_decay[..., None]
        return math.log(2) / g.to(self.dtype).mean(2).abs()

    def as_recurrence(self) -> RecurrentPattern:
        """Itself."""
        return self

    def content(self) -> RecurrentPattern:
        """The map without decay: what queries and keys alone, and a delta rule's steps, would make of it.

        Where a head has one decay and no delta rule, A is `content()` times `decay()`, entry by entry.
        """
        return RecurrentPattern(self.q, self.k, None, self.beta, values=self.values, n_heads=self.n_heads)

    def decay(self) -> RecurrentPattern:
        """What is left of position j at position i by decay alone, of several channels on average."""
        d = 1 if self.log_decay is None or self.log_decay.dim() == 3 else self.q.shape[-1]
        same = torch.full((self.n_batch, 1, self.n_keys, d), d**-0.5, dtype=self.dtype, device=self.device)
        return RecurrentPattern(same, same, self.log_decay, values=self.values, n_heads=self.n_heads)

    # Tiles.

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Tensor:
        """[batch, head, q, k] of A, in a fresh tensor."""
        which = range(self.n_heads) if heads is None else self._checked(heads)
        return self.tile_of(slice(None), queries, keys, which)

    def tile_of(self, batch: slice, queries: slice, keys: slice, heads: Sequence[int]) -> Tensor:
        """[b, h, q, k] of A for these batch entries and heads."""
        index = torch.tensor(list(heads), dtype=torch.long, device=self.device)
        shape = (len(range(self.n_batch)[batch]), len(index), queries.stop - queries.start, keys.stop - keys.start)
        out = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if out.numel() == 0 or keys.start >= queries.stop:
            return out
        chunks = self._chunks_of(batch, index)
        length = chunks.length
        first, last = keys.start // length, (min(keys.stop, queries.stop) - 1) // length
        readings = self._readings(chunks, queries, first)
        for number in range(first, last + 1):
            start, stop = number * length, (number + 1) * length
            k = slice(max(start, keys.start), min(stop, keys.stop))
            columns = slice(k.start - keys.start, k.stop - keys.start)
            inside = slice(k.start - start, k.stop - start)
            later = max(stop, queries.start)
            if later < queries.stop:
                rows = slice(later - queries.start, None)
                out[:, :, rows, columns] = readings[number][:, :, rows] @ chunks.writes[:, :, number, inside].mT
            own = slice(max(start, queries.start), min(stop, queries.stop))
            if own.start < own.stop:
                rows, r = (slice(own.start - at, own.stop - at) for at in (queries.start, start))
                out[:, :, rows, columns] = chunks.within[:, :, number, r, inside]
        return out

    def _chunks_of(self, batch: slice, heads: Tensor) -> Chunks:
        """The chunks of some heads; those of the last call are kept, since a strip of tiles asks for them again."""
        wanted = (*batch.indices(self.n_batch), *heads.tolist())
        known = self.__dict__.get("_part")
        if known is None or known[0] != wanted:
            known = self.__dict__["_part"] = (wanted, self._chunks.of(batch, heads))
        found: Chunks = known[1]
        return found

    def _readings(self, chunks: Chunks, queries: slice, first: int) -> dict[int, Tensor]:
        """What the rows read of the state after each chunk from `first` on, [b, h, row, d]; zero for earlier rows.

        They are carried back chunk by chunk, and kept as `_chunks_of` keeps its chunks.
        """
        rows_of, known = (queries.start, queries.stop), self.__dict__.get("_strip")
        if known is not None and known[0] is chunks and known[1] == rows_of and known[2] <= first:
            kept: dict[int, Tensor] = known[3]
            return kept
        length, found = chunks.length, dict[int, Tensor]()
        rows = chunks.reads.new_zeros(*chunks.reads.shape[:2], queries.stop - queries.start, chunks.reads.shape[-1])
        for number in range((queries.stop - 1) // length, first, -1):
            if number * length + length < queries.stop:  # rows after this chunk
                rows = chunks.pulled(rows, number)
            own = slice(max(number * length, queries.start), min((number + 1) * length, queries.stop))
            if own.start < own.stop:
                r = slice(own.start - number * length, own.stop - number * length)
                rows = rows.clone()
                rows[:, :, own.start - queries.start : own.stop - queries.start] = chunks.reads[:, :, number, r]
            found[number - 1] = rows
        self.__dict__["_strip"] = (chunks, rows_of, first, found)
        return found

    def check(self) -> None:
        """Raise a CaptureError that names the first NaN or inf among the pattern's tensors.

        On a device the sums of rows tell of them, without reading them.
        """
        if self.device.type != "cpu":
            return
        for name, tensor in self.state()[1].items():
            check_finite(name, tensor)


def check_recurrence(q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor | None, n_heads: int) -> None:
    """Raise a CaptureError that names what of a recurrence's inputs does not fit or is not finite."""
    check_attention(q, k)
    if q.shape != k.shape or n_heads % q.shape[1]:
        raise CaptureError(
            f"q {list(q.shape)} and k {list(k.shape)} must both be [batch, group, position, d]",
            hint=f"the {n_heads} heads are split evenly among the groups",
        )
    b, _, n, d = q.shape
    for name, tensor, shapes in (
        ("log_decay", log_decay, ((b, n_heads, n), (b, n_heads, n, d))),
        ("beta", beta, ((b, n_heads, n),)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CaptureError(f"{name} must be {wanted}", shape=tensor.shape)
        if not tensor.is_floating_point():
            raise CaptureError(f"{name} must be floating point, not {tensor.dtype}", shape=tensor.shape)
        if tensor.device != q.device:
            raise CaptureError(f"q is on {q.device} and {name} on {tensor.device}", hint="move them together")
    if log_decay is not None and log_decay.device.type != "cpu":  # the host would have to wait
        above = torch.where(log_decay.detach() <= 0, 0.0, torch.nan)
        ask_later("a log_decay, which must be at most zero,", above.sum, log_decay)
    elif log_decay is not None and not bool((log_decay <= 0).all()):  # NaN too
        raise CaptureError(
            f"a log_decay is {log_decay.max():.3g}, where it must be at most zero",
            hint="pass the logarithm of the decay, as -exp(A_log) · softplus(...)",
        )
    if beta is not None:
        check_finite("beta", beta)
