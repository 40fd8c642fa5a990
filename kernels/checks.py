"""Checks of queries, keys and values before a kernel runs: every complaint names the tensor and what is wrong."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from workbench.errors import CaptureError

LARGEST = (1 << 31) - 1
"""Positions have 31 bits in every kernel."""


def check_range(name: str, value: object, least: int, most: int | None, hint: str | None = None) -> None:
    """Raise a CaptureError unless a value, as from a file, is a whole number from `least` to `most` (None: any)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise CaptureError(f"{name} is a whole number, not {value!r}", hint=hint)
    if value < least or (most is not None and value > most):
        upper = "up" if most is None else f"to {most}"
        raise CaptureError(f"{name}={value} is not one of {least} {upper}", hint=hint)


def check_sizes(**sizes: object) -> None:
    """Raise a CaptureError unless all are whole numbers from 0 on that fit 31 bits."""
    for name, value in sizes.items():
        check_range(name, value, 0, LARGEST)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str, device: torch.device) -> None:
    """Raise a CaptureError unless a tensor is floating point, of this shape and on this device."""
    if tuple(tensor.shape) != shape:
        raise CaptureError(f"{name} must be [{axes}] = {list(shape)}", shape=tensor.shape)
    if not tensor.is_floating_point():
        raise CaptureError(f"{name} must be floating point, not {tensor.dtype}", shape=tensor.shape)
    if tensor.device != device:
        raise CaptureError(f"{name} is on {tensor.device}, and the queries on {device}", hint="move them together")


def check_number(name: str, value: object, *, above_zero: bool = False) -> float:
    """The value as a finite float.

    Raises:
        CaptureError: it is no number, NaN or infinite, or not above zero where it has to be.
    """
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or (above_zero and number <= 0):
        raise CaptureError(f"{name} is a finite number{' above 0' if above_zero else ''}, not {value!r}")
    return number


def check_attention(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Check that q, k and v can meet in attention.

    Args:
        q: [batch, head, query, d]; k: [batch, kv head, key, d]; v: [batch, kv head, key, width], optional.

    Raises:
        CaptureError: wrong number of dimensions, sizes that do not fit, no keys, mixed dtypes or devices; on the CPU
            NaN or inf.
    """
    named = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, tensor in named.items():
        if tensor.dim() != 4:
            raise CaptureError(f"{name} must be [batch, head, position, d]", shape=tensor.shape)
        if not tensor.is_floating_point():
            raise CaptureError(f"{name} must be floating point, not {tensor.dtype}", shape=tensor.shape)
        if tensor.dtype != q.dtype:
            raise CaptureError(f"q is {q.dtype} and {name} is {tensor.dtype}", hint="cast them to one dtype")
        if tensor.device != q.device:
            raise CaptureError(f"q is on {q.device} and {name} on {tensor.device}", hint="move them to one device")
    check_heads(q, k)
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise CaptureError(f"keys {list(k.shape)} and values {list(v.shape)} differ in batch, heads or length")
    if k.shape[2] == 0:
        raise CaptureError("there are no keys", shape=k.shape, hint="attention needs a key for every query")
    if q.device.type == "cpu":  # of what is on a device a capture asks itself
        for name, tensor in named.items():
            check_finite(name, tensor)


def check_heads(q: Tensor, k: Tensor) -> None:
    """Check that queries and keys, both with four dimensions, have a batch, heads and a width that can meet."""
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise CaptureError(
            f"queries {list(q.shape)} and keys {list(k.shape)} do not fit [batch, head, position, d]",
            hint="batch and d must be equal, the heads of q a multiple of those of k",
        )
    if q.shape[1] == 0 or q.shape[3] == 0:
        raise CaptureError("there are no heads, or they have no width", shape=q.shape)


_MANY = 1024


class Pending:
    """Checks of numbers on a device, whose outcome is asked for once, at the end, since the host waits for it."""

    def __init__(self) -> None:
        self._sums: list[tuple[tuple[str, str | None], Tensor]] = []
        self._known: list[tuple[list[tuple[str, str | None]], Tensor]] = []  # [tensor] whether each is finite
        self._here = threading.local()
        self._seen: MutableMapping[Tensor, set[tuple[Any, ...]]] = WeakIdKeyDictionary()

    @contextmanager
    def at(self, site: str) -> Iterator[None]:
        """What this thread adds inside, and does not say of which site it is, is of this one."""
        before, self._here.site = getattr(self._here, "site", None), site
        try:
            yield
        finally:
            self._here.site = before

    def is_new(self, tensor: Tensor) -> bool:
        """Whether a tensor, as it is now, was not asked about before."""
        if tensor.is_inference():  # it cannot tell of changes
            return True
        seen, at = self._seen.setdefault(tensor if tensor._base is None else tensor._base, set()), place_of(tensor)
        new = at not in seen
        seen.add(at)
        return new

    def add(self, name: str, tensor: Tensor, site: str | None) -> None:
        """One launch on the device, and none that the host waits for."""
        # In float64 no numbers of fewer bits, such as those that hide a key, are too large to add up.
        wide = torch.float32 if tensor.device.type == "mps" else torch.float64
        self.add_total(name, tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, wide)), site)

    def add_total(self, name: str, total: Tensor, site: str | None) -> None:
        """One number on the device that is not finite if something is wrong."""
        self._sums.append(((name, site or getattr(self._here, "site", None)), total))
        if len(self._sums) >= _MANY:
            self._fold()

    def _fold(self) -> None:
        """A byte for each sum instead of a tensor, which takes hundreds on a device: captures may be long."""
        sums, self._sums = self._sums, []
        if sums:
            finite = torch.stack([total.isfinite().to(sums[0][1].device) for _, total in sums])
            self._known.append(([named for named, _ in sums], finite))

    def check(self) -> None:
        """Raise a CaptureError that names the first tensor that held NaN or inf; what was checked is forgotten."""
        self._fold()
        known, self._known = self._known, []
        names = [named for several, _ in known for named in several]
        finite = [good for _, each in known for good in each.tolist()]
        for (name, site), good in zip(names, finite, strict=True):
            if not good:
                raise CaptureError(
                    f"{name} held NaN or inf, or numbers too large to add up", site=site,
                    hint="is an earlier layer overflowing, or a weight not loaded? On the CPU the position is named",
                )  # fmt: skip


_pending: list[Pending] = []


@contextmanager
def deferred(pending: Pending) -> Iterator[None]:
    """Inside, in all threads, `check_finite` of what is on a device adds to these; whoever opens it asks at the end."""
    _pending.append(pending)
    try:
        yield
    finally:
        _pending.remove(pending)


def ask_later(name: str, total: Callable[[], Tensor], about: Tensor | None = None) -> None:
    """Give the capture that is open, if one is, a number on the device that is not finite if something is wrong.

    Args:
        about: what it is about, where several calls may share that; then it is made once.
    """
    for pending in _pending[-1:]:
        if about is None or pending.is_new(about):
            pending.add_total(name, total(), None)


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where in what it is a view of a tensor lies, and how often that was written to."""
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version


def check_finite(name: str, tensor: Tensor, site: str | None = None) -> None:
    """Raise a CaptureError that names the first position [batch, head, position, d] that holds NaN or inf.

    On a device that the host would have to wait for, a capture is told at its end (`deferred`); outside of captures NaN
    goes on there, as it does in any kernel.
    """
    if tensor.device.type != "cpu":
        for pending in _pending[-1:] if tensor.numel() else ():
            pending.add(name, tensor, site)
        return
    if tensor.numel() == 0 or bool(tensor.detach().sum().isfinite()):
        return
    bad = ~tensor.detach().isfinite()
    if not bool(bad.any()):  # large finite numbers whose sum overflows
        return
    where = bad.nonzero()[0].tolist()
    value = tensor[tuple(where)].item()
    raise CaptureError(
        f"{name} holds {value} at {where}, the first of {int(bad.sum())} that are not finite",
        shape=tensor.shape,
        hint="is an earlier layer overflowing, or a weight not loaded?",
    )


def state_dtype(q: Tensor) -> torch.dtype:
    """In which a recurrence keeps its state and computes: float64 for float64 inputs, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_state(state: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Raise a CaptureError unless a state [batch, head, d, width] can be where a recurrence over q begins."""
    if tuple(state.shape) != shape:
        raise CaptureError(
            f"initial_state must be [batch, head, d, width] = {list(shape)}",
            shape=state.shape,
            hint="pass the state that return_state=True gave for the segment before",
        )
    dtype = state_dtype(q)
    if state.dtype != dtype or state.device != q.device:
        raise CaptureError(
            f"initial_state is {state.dtype} on {state.device}; for {q.dtype} inputs on {q.device} it is {dtype} there",
            hint="keep the state as it was returned; rounding it would add up over segments",
        )
    check_finite("initial_state", state)


def equal_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are the same up to what another order of the same sums makes of them.

    A model that caches latents makes its keys of them anew at each step, in a product of another size. Coarser
    rounding, as of a quantised cache, is a difference.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    own, summed = torch.finfo(a.dtype).eps, torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
    x, y = (t.double() for t in (a, b))
    return bool(((x - y).abs() <= 2 * own * y.abs() + 64 * summed * y.abs().amax(-1, keepdim=True)).all())
