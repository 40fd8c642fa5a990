"""Token ids of what lies in a model's cache, so that `induction` can be streamed at a single decoding step.

A step is called with the ids of its new tokens only. Those before are remembered from the forwards that put them
there. Which they are is told by the keys: what a step finds in the cache is compared with the keys of the forward
before it, since a beam search reorders the cache, and a speculative one cuts it back.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.capture.site_capture import Forward
from workbench.errors import CaptureError
from workbench.kernels.checks import equal_but_for_rounding


@dataclass
class _Sequence:
    """What was put into a cache so far: ids [batch, position], and the last keys [batch, head, key, d] of one site."""

    ids: Tensor
    site: str
    keys: Tensor


@dataclass
class CachedTokens:
    """The ids of what lies in caches, by thread and token stream: one batch of sequences, or many that are packed."""

    _sequences: dict[tuple[int, str], list[_Sequence]] = field(default_factory=dict)
    _known: dict[tuple[object, ...], tuple[Forward, Tensor]] = field(default_factory=dict)

    def key_ids(
        self, forward: Forward, site: str, stream: str, queries: int, keys: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Ids [batch, key] of a self-attention call's keys, and those [batch] of the token that the first key follows.

        Args:
            forward: the forward that is running in this thread.
            stream: which of its ids the queries have.
            queries: how many there are; they are the last keys.
            keys: [batch, kv head, key, d].

        Returns:
            None for what does not exist: the forward has no ids, or nothing was before the first key.

        Raises:
            CaptureError: the cache holds keys that the forward before did not put there.
        """
        own = forward.ids.get(stream)
        if own is None or own.shape[1] != queries:
            return own, None
        where = threading.get_ident(), stream
        found = self._known.get((*where, forward.packed))
        if found is None or found[0] is not forward:
            earlier = self._sequences.setdefault(where, [])
            ids = own if keys.shape[2] == queries else self._with_earlier(earlier, site, own, keys)
            if forward.packed is None:
                earlier.clear()
            earlier.append(_Sequence(ids, site, keys))
            self._known[*where, forward.packed] = forward, ids
        else:
            ids = found[1]
        n_keys = keys.shape[2]
        if n_keys > ids.shape[1]:
            raise _unknown(site)
        before = None if n_keys == ids.shape[1] else ids[:, -n_keys - 1]
        return ids[:, -n_keys:], before

    def _with_earlier(self, earlier: list[_Sequence], site: str, own: Tensor, keys: Tensor) -> Tensor:
        """The ids of the sequence that is gone on with, which is taken out of the earlier ones."""
        cached = keys[:, :, : keys.shape[2] - own.shape[1]]
        for past in [past for past in earlier if past.site == site]:
            length = past.ids.shape[1]
            # What was cut back shows in a cache that forgets nothing: it is shorter than the sequence.
            for dropped in dict.fromkeys((0, max(0, length - cached.shape[2]))):
                rows = _rows(past.keys[:, :, : past.keys.shape[2] - dropped], cached)
                if rows is not None:
                    earlier[:] = [other for other in earlier if other is not past]
                    return torch.cat((past.ids[rows, : length - dropped], own), dim=1)
        raise _unknown(site)


def _rows(old: Tensor, new: Tensor) -> list[int] | None:
    """For each batch entry of `new`, one of `old` whose last keys it has; None if there is none for some entry."""
    n = min(old.shape[2], new.shape[2])
    if n == 0 or old.shape[1] != new.shape[1] or old.shape[3] != new.shape[3]:
        return None
    old, new = old[:, :, old.shape[2] - n :], new[:, :, new.shape[2] - n :]
    rows = []
    for i, entry in enumerate(new):
        likely = sorted(range(len(old)), key=lambda j: j != i)
        row = next((j for j in likely if equal_but_for_rounding(old[j], entry)), None)
        if row is None:
            return None
        rows.append(row)
    return rows


def _unknown(site: str) -> CaptureError:
    return CaptureError(
        "induction needs the ids of all keys, and some in the cache were not put there by the forward before",
        site=site,
        hint="capture from the prompt on, with a cache that grows, or leave induction out",
    )
