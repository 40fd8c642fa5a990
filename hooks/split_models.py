"""Models of `transformers` on a sequence whose parts lie on several processes: their attention reads all keys so far.

Each process runs the model on its own positions. Between the model and its attention, before anything that listens,
keys and values are gathered; so a tap sees the queries that are here and every key that they read, and what it computes
of rows is that of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks import registry
from workbench.kernels.sequence_parallel.keys import causal_attention, keys_so_far
from workbench.kernels.sequence_parallel.split import SplitSequence

NAME = "flash_split"  # a backend that takes no mask where rows are the last of the keys, as flash kernels do


@contextmanager
def split_over(split: SplitSequence) -> Iterator[None]:
    """Inside, in this thread, models of `transformers` attend over the positions of all processes of a split.

    Every process runs the same calls with its own positions:
    `model(ids[:, split.here.start : split.here.stop], position_ids=torch.arange(*…)[None])`. Causal self-attention
    only; without padding, windows or a cache.

    Raises:
        CaptureError: in a call, of what cannot be split; another process ended.
    """
    before = registry.around()
    owner = object()
    registry.install(owner)
    registry.put_around(_Split(split))
    try:
        yield
    finally:
        registry.put_around(before)
        registry.uninstall(owner)


def check_unsplit() -> None:
    """Refuse an analysis that reads whole sequences where this thread's models have a part of theirs.

    Raises:
        CaptureError: `split_over` is open.
    """
    if isinstance(registry.around(), _Split):
        raise CaptureError(
            "this analysis reads whole sequences, and inside split_over each process has a part of them",
            hint="call it outside, on a model that one process holds or that FSDP2 splits; captures, interventions, "
            "sweeps and gradients are put together from parts",
        )


class _Split:
    """What stands between a model and its attention."""

    name = NAME

    def __init__(self, split: SplitSequence) -> None:
        self.split = split
        self.lse: Tensor | None = None

    def kernel(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
    ) -> tuple[Tensor, None]:
        """The attention itself."""
        out, self.lse = causal_attention(query, key, value, scale=options.get("scaling"))
        return out.transpose(1, 2).contiguous(), None

    def run(
        self,
        function: registry.Backend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """A call of the model: with the keys of all, through whatever listens."""
        self._check(module, query, key, attention_mask, options)
        keys, values = keys_so_far(key, value, self.split)
        return function(module, query, keys, values, None, **options)

    def _check(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
        self.split.check("the sequence", q)
        wrong = ""
        if k.shape[2] != q.shape[2]:
            wrong = f"{k.shape[2]} keys for {q.shape[2]} positions: a cache, or cross-attention"
        elif not (getattr(module, "is_causal", True) if options.get("is_causal") is None else options["is_causal"]):
            wrong = "attention that is not causal"
        elif options.get("sliding_window") is not None and options["sliding_window"] < sum(self.split.lengths):
            wrong = "a sliding window"
        elif any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
            wrong = "a softcap, a sink or a position bias"
        elif options.get("dropout"):
            wrong = "dropout"
        elif mask is not None and not _only_causal(mask):
            wrong = "a mask that hides more than later positions, such as padding"
        if wrong:
            raise CaptureError(
                f"{type(module).__name__} has {wrong}, which is not split over processes",
                hint="run this model in one process, or without it",
            )


def _only_causal(mask: Tensor) -> bool:
    seen = mask if mask.dtype == torch.bool else mask == 0
    n = mask.shape[-1]
    return bool((seen == torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()).all())
