"""The one operator that compiled graphs carry behind each attention: it hands on what the kernel was given and gave.

Compilers see an opaque operator without a result, so that they keep it where it stands and change nothing around it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recorded:
    """What one attention in a compiled graph was given and gave, as it runs; its tensors are written over later.

    Attributes:
        place: which attention of which graph (`graph.Place`).
        q, k, v, out: as the kernel has them. weights: of one that is written out, before dropout.
        mask: what was given as one. lse: what a fused kernel gave as its log-sum-exp; None: no such kernel ran.
        anchor: a parameter of the layer that runs. buffers: what a FlexAttention's functions read.
        kernel: name of the fused kernel, "" where none is known.
    """

    place: int
    q: Tensor | None
    k: Tensor | None
    v: Tensor
    out: Tensor
    weights: Tensor | None
    mask: Tensor | None
    lse: Tensor | None
    anchor: Tensor | None
    buffers: list[Tensor]
    kernel: str
    scale: float | None
    causal: bool
    dropout: float


_NAMES = tuple(Recorded.__dataclass_fields__)
Q, K, V, OUT, LSE, KERNEL = (_NAMES.index(name) for name in ("q", "k", "v", "out", "lse", "kernel"))
"""Where the operator's arguments stand."""

_LIBRARY = torch.library.Library("workbench", "DEF")
_LIBRARY.define(
    "attention(int place, Tensor? q, Tensor? k, Tensor v, Tensor out, Tensor? weights, Tensor? mask, Tensor? lse, "
    "Tensor? anchor, Tensor[] buffers, str kernel, float? scale, bool causal, float dropout) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # Python runs in it
)
ATTENTION = torch.ops.workbench.attention.default
Receiver = Callable[[Recorded], None]


class _Receivers(threading.local):
    """Those of this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Receiver] = []


_receivers = _Receivers()


@contextmanager
def receiving(receiver: Receiver) -> Iterator[None]:
    """What compiled graphs record in this thread goes to the receiver, and to nobody else."""
    _receivers.stack.append(receiver)
    try:
        yield
    finally:
        _receivers.stack.remove(receiver)


def _attention(*given: Any) -> None:
    if _receivers.stack:  # there is none in a backward pass, which computes again what was recorded
        _receivers.stack[-1](Recorded(*given))


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("workbench::attention", lambda *given: None, lib=_LIBRARY)
torch.fx.node.has_side_effect(ATTENTION)  # else it is dropped: nobody uses what it gives
