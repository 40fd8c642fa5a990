"""Associative memories with one interface: keys are conditional stimuli, values unconditional ones, queries tests.

A memory holds a state for each head, writes pairs and reads with queries. The rules are those of arXiv 2508.08289
(Understanding Transformers through the Lens of Pavlovian Conditioning); softmax attention (modern Hopfield network,
arXiv 2008.02217) is the non-linear reference. Vectors are rows: S is [d_k, d_v], a retrieval is q S.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.analysis.conditioning.associations import write_block
from workbench.analysis.conditioning.features import feature_map
from workbench.errors import WorkbenchError, nearest


class Memory(ABC):
    """Associative memories of several heads at once, empty at first.

    Args:
        d_k, d_v: width of keys and values.
        heads: leading shape of all tensors, such as (12,) or (batch, head).
        features: feature map of keys and queries, by name; see `features.FEATURES`.
        dtype, device: of the state.

    Attributes:
        rule: name of the learning rule.
        d_features: width after the feature map.
    """

    rule: ClassVar[str]

    def __init__(
        self,
        d_k: int,
        d_v: int,
        heads: Sequence[int] = (),
        *,
        features: str = "identity",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if d_k < 1 or d_v < 1:
            raise WorkbenchError(f"keys of width {d_k} and values of width {d_v} hold nothing")
        self.d_k, self.d_v, self.heads, self.features = d_k, d_v, tuple(heads), features
        self.dtype, self.device = dtype, device
        self.phi, self.d_features = feature_map(features, d_k)

    @property
    @abstractmethod
    def state(self) -> Tensor:
        """What is held: [*heads, d_features, d_v]; for softmax the pairs themselves, [*heads, n, d_features + d_v]."""

    def write(self, k: Tensor, v: Tensor) -> None:
        """Store one pair per head ([*heads, d_k] and [*heads, d_v]) or n one after the other ([*heads, n, d_k] …).

        Raises:
            WorkbenchError: shapes that do not fit, or keys for which the rule is unstable (the bound is named).
        """
        single = k.dim() == len(self.heads) + 1
        k, v = (k.unsqueeze(-2), v.unsqueeze(-2)) if single else (k, v)
        if k.shape != (*self.heads, k.shape[-2], self.d_k) or v.shape != (*k.shape[:-1], self.d_v):
            raise WorkbenchError(
                f"keys {list(k.shape)} and values {list(v.shape)} do not fit a memory of {list(self.heads)} heads, "
                f"keys of {self.d_k} and values of {self.d_v}"
            )
        if k.shape[-2]:
            self._write(self.phi(k.to(self.dtype)), v.to(self.dtype))

    def read(self, q: Tensor) -> Tensor:
        """What queries [*heads, m, d_k] (or [*heads, d_k]) retrieve: [*heads, m, d_v] (or [*heads, d_v])."""
        single = q.dim() == len(self.heads) + 1
        found = self._read(self.phi(q.to(self.dtype)).unsqueeze(-2) if single else self.phi(q.to(self.dtype)))
        return found.squeeze(-2) if single else found

    @abstractmethod
    def _write(self, k: Tensor, v: Tensor) -> None: ...

    @abstractmethod
    def _read(self, q: Tensor) -> Tensor: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.heads)} heads, d_k={self.d_k}, d_v={self.d_v}, {self.features})"


class _Linear(Memory):
    """A memory whose retrieval is φ(q) S."""

    def __init__(self, d_k: int, d_v: int, heads: Sequence[int] = (), **options: Any) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self._state = torch.zeros(*self.heads, self.d_features, d_v, dtype=self.dtype, device=self.device)

    @property
    def state(self) -> Tensor:
        """S, [*heads, d_features, d_v]."""
        return self._state

    def _read(self, q: Tensor) -> Tensor:
        return q @ self._state


class Hebb(_Linear):
    """S ← S + α kᵀ v: associations add up.

    Args:
        rate: α > 0.

    >>> memory = Hebb(2, 1)
    >>> memory.write(torch.eye(2), torch.tensor([[3.0], [5.0]]))
    >>> memory.read(torch.tensor([0.0, 1.0]))
    tensor([5.])
    """

    rule = "hebb"

    def __init__(self, d_k: int, d_v: int, heads: Sequence[int] = (), *, rate: float = 1.0, **options: Any) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self.rate = _positive("rate", rate)

    def _write(self, k: Tensor, v: Tensor) -> None:
        self._state = write_block(self._state, k, v, self.rate, 1.0, erase=False)


class Decay(_Linear):
    """S ← γ S + α kᵀ v: a stimulus trace, RetNet's and lightning attention's forgetting.

    Args:
        decay: γ in (0, 1]. rate: α > 0.
    """

    rule = "decay"

    def __init__(
        self, d_k: int, d_v: int, heads: Sequence[int] = (), *, decay: float = 0.98, rate: float = 1.0, **options: Any
    ) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self.decay, self.rate = _fraction("decay", decay), _positive("rate", rate)

    def _write(self, k: Tensor, v: Tensor) -> None:
        self._state = write_block(self._state, k, v, self.rate, self.decay, erase=False)


class Delta(_Linear):
    """S ← S + α kᵀ (v − k S): error correction, Rescorla and Wagner's rule; DeltaNet's.

    Args:
        rate: α, with 0 < α‖φ(k)‖² < 2 for every key that is written.
    """

    rule = "delta"
    decay = 1.0

    def __init__(self, d_k: int, d_v: int, heads: Sequence[int] = (), *, rate: float = 1.0, **options: Any) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self.rate = _positive("rate", rate)

    def _write(self, k: Tensor, v: Tensor) -> None:
        # Along k a write multiplies by γ(1 − α‖k‖²), which must stay within (−1, 1).
        bound = 1 + 1 / self.decay
        largest = self.rate * (k * k).sum(-1).max().item()
        if not largest < bound:
            raise WorkbenchError(
                f"the {self.rule} rule is unstable: rate·‖k‖² reaches {largest:.4g} and must stay below {bound:.4g}",
                hint=f"with these keys the rate must be below {self.rate * bound / largest:.4g}; or scale keys to 1",
            )
        self._state = write_block(self._state, k, v, self.rate, self.decay, erase=True)


class GatedDelta(Delta):
    """S ← γ (S − α kᵀ k S) + α kᵀ v: error correction and forgetting (Gated DeltaNet, arXiv 2412.06464, eq. 10).

    Args:
        rate: α, with 0 < α‖φ(k)‖² < 1 + 1/γ for every key. decay: γ in (0, 1].
    """

    rule = "gated_delta"

    def __init__(
        self, d_k: int, d_v: int, heads: Sequence[int] = (), *, rate: float = 1.0, decay: float = 0.98, **options: Any
    ) -> None:
        super().__init__(d_k, d_v, heads, rate=rate, **options)
        self.decay = _fraction("decay", decay)


class Oja(_Linear):
    """S ← S (I − α diag(v²)) + α kᵀ v: column c shrinks by 1 − α v_c², which bounds what it can grow to.

    With one pair over and over, column c settles at kᵀ / v_c.

    Args:
        rate: α, with 0 < α v_c² < 2 for every component of every value.
    """

    rule = "oja"

    def __init__(self, d_k: int, d_v: int, heads: Sequence[int] = (), *, rate: float = 0.1, **options: Any) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self.rate = _positive("rate", rate)

    def _write(self, k: Tensor, v: Tensor) -> None:
        largest = self.rate * (v * v).max().item()
        if not largest < 2:
            raise WorkbenchError(
                f"Oja's rule is unstable: rate·v² reaches {largest:.4g} and must stay below 2",
                hint=f"with these values the rate must be below {2 * self.rate / largest:.4g}",
            )
        kept = (1 - self.rate * v * v).flip(-2).cumprod(-2).flip(-2)  # of what was there before write i, to the end
        after = torch.cat([kept[..., 1:, :], torch.ones_like(kept[..., :1, :])], dim=-2)
        self._state = self._state * kept[..., :1, :] + self.rate * k.transpose(-1, -2) @ (v * after)


class BCM(_Linear):
    """S ← S + α kᵀ v(v − θ), where θ ← ρθ + (1 − ρ)v² runs behind the activity (per component).

    What is above its threshold is strengthened, what is below weakened. A write uses the θ of the writes before it.
    The paper leaves the recursion of θ open; this is the usual one.

    Args:
        rate: α > 0. average: ρ in [0, 1). threshold: θ before the first write.

    Attributes:
        theta: θ, [*heads, d_v].
    """

    rule = "bcm"

    def __init__(
        self,
        d_k: int,
        d_v: int,
        heads: Sequence[int] = (),
        *,
        rate: float = 1.0,
        average: float = 0.9,
        threshold: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self.rate = _positive("rate", rate)
        if not 0 <= average < 1:
            raise WorkbenchError(f"average is {average}, outside its range [0, 1)", hint="0.9 remembers ten writes")
        self.average = average
        self.theta = torch.full((*self.heads, d_v), float(threshold), dtype=self.dtype, device=self.device)

    def _write(self, k: Tensor, v: Tensor) -> None:
        seen = []
        for i in range(v.shape[-2]):
            seen.append(self.theta)
            self.theta = self.average * self.theta + (1 - self.average) * v[..., i, :] ** 2
        driven = v * (v - torch.stack(seen, dim=-2))
        self._state = write_block(self._state, k, driven, self.rate, 1.0, erase=False)


class Softmax(Memory):
    """Keeps every pair and reads softmax(β q Kᵀ) V: softmax attention, or a modern Hopfield network's one step.

    Args:
        scale: β > 0; 1/√d_features if None. softcap: scores become softcap · tanh(score / softcap).
    """

    rule = "softmax"

    def __init__(
        self,
        d_k: int,
        d_v: int,
        heads: Sequence[int] = (),
        *,
        scale: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_k, d_v, heads, **options)
        self.scale = _positive("scale", self.d_features**-0.5 if scale is None else scale)
        self.softcap = None if softcap is None else _positive("softcap", softcap)
        self._n = 0
        self._room_k, self._room_v = self._room(0)

    def _room(self, n: int) -> tuple[Tensor, Tensor]:
        made = [
            torch.zeros(*self.heads, n, d, dtype=self.dtype, device=self.device) for d in (self.d_features, self.d_v)
        ]
        return made[0], made[1]

    @property
    def _k(self) -> Tensor:
        return self._room_k[..., : self._n, :]

    @property
    def _v(self) -> Tensor:
        return self._room_v[..., : self._n, :]

    @property
    def state(self) -> Tensor:
        """The pairs, [*heads, n, d_features + d_v]."""
        return torch.cat([self._k, self._v], dim=-1)

    def _write(self, k: Tensor, v: Tensor) -> None:
        n = self._n + k.shape[-2]
        if n > self._room_k.shape[-2]:  # twice the room each time: pairs are copied once on average
            room_k, room_v = self._room(max(n, 2 * self._n))
            room_k[..., : self._n, :], room_v[..., : self._n, :] = self._k, self._v
            self._room_k, self._room_v = room_k, room_v
        self._room_k[..., self._n : n, :], self._room_v[..., self._n : n, :] = k, v
        self._n = n

    def _read(self, q: Tensor) -> Tensor:
        scores = (self.scale * q) @ self._k.transpose(-1, -2)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores.softmax(-1) @ self._v  # an empty memory gives zeros, as the linear ones do


_KINDS: tuple[type[Memory], ...] = (Hebb, Decay, Delta, GatedDelta, Oja, BCM, Softmax)
RULES: dict[str, type[Memory]] = {kind.rule: kind for kind in _KINDS}
"""The memories by name of their rule."""


def memory(rule: str, d_k: int, d_v: int, heads: Sequence[int] = (), **options: Any) -> Memory:
    """An empty memory of a rule; the options are those of its class in `RULES`.

    Raises:
        WorkbenchError: there is no such rule, it has no such option, or a rate is outside its stable range.

    >>> memory("delta", 8, 4, heads=(12,), rate=0.5)
    Delta([12] heads, d_k=8, d_v=4, identity)
    """
    if rule not in RULES:
        raise WorkbenchError(f'there is no learning rule "{rule}"', hint=nearest(rule, list(RULES)))
    try:
        return RULES[rule](d_k, d_v, heads, **options)
    except TypeError as error:
        raise WorkbenchError(f'the rule "{rule}" does not take these options: {error}') from None


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise WorkbenchError(f"{name} is {value}; it must be above 0 and finite")
    return float(value)


def _fraction(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise WorkbenchError(f"{name} is {value}, outside its stable range (0, 1]", hint="1 forgets nothing")
    return float(value)
