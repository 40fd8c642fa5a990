"""What chosen heads look at, told as a model runs: the row of each forward's last query, of which nothing is kept."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.capture.site_capture import Forward
from workbench.hooks.sites import Sites
from workbench.hooks.tap import AttentionCall
from workbench.inputs import packed_sequences, token_ids
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.session.packed import RunningForward

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One forward, such as a step of `generate()`; of packed rows, one sequence.

    Attributes:
        index: number of the forward since the `with` began.
        ids: by stream, [batch, position] of what the model was called with.
        rows: by label, such as "L1H6", [batch, key] weights of the last query, in float32 (float64 of such models).
            Where two of the chosen heads have one label, by site: "decoder.0.cross_attn.H1". Those of a site's second
            call in a forward end in "#1".
        packed: where a row held several sequences, which this one is: (row, start, stop).
    """

    index: int
    ids: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    packed: tuple[int, int, int] | None = None


@dataclass
class RowWatch:
    """Collects the rows of each forward and tells of them when it is over; its methods are the observer's callbacks.

    Attributes:
        heads: by site. tell: is given each step. errors: of threads that did not open the watch.
    """

    model: nn.Module
    sites: Sites
    heads: Mapping[str, Sequence[int]]
    tell: Callable[[Step], object]
    errors: list[Exception] = field(default_factory=list)
    _opened_in: int = field(default_factory=threading.get_ident)
    _running: dict[int, tuple[RunningForward, dict[int, dict[str, Tensor]]]] = field(default_factory=dict)
    _names: dict[tuple[str, int], str] = field(init=False)
    _n: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        chosen = [(self.sites.find(name), head) for name, several in self.heads.items() for head in several]
        labels = Counter(site.label(head) for site, head in chosen)
        self._names = {
            (site.name, head): site.label(head) if labels[site.label(head)] == 1 else f"{site.alias}.H{head}"
            for site, head in chosen
        }

    def on_start(self) -> None:
        """A forward begins in this thread."""
        with self._lock:
            running = RunningForward(Forward(self._n))
            self._n += 1
        self._running[threading.get_ident()] = running, {}

    def on_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model was called with these inputs."""
        running, _ = self._running.get(threading.get_ident(), (None, None))
        if running is None:
            return
        running.whole.ids = dict(token_ids(args, kwargs))
        if segments := packed_sequences(self.model, args, kwargs):
            running.pack(segments)

    def on_call(self, call: AttentionCall) -> None:
        """Take the rows of one attention call."""
        running, found = self._running.get(threading.get_ident(), (None, {}))
        if running is None or call.replay:
            return
        site = self.sites.find(call.site)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(call.v.device.type, enabled=False):
            for forward, part in running.parts(call):
                rows = last_rows(part.pattern(cross=not site.positional), self.heads[site.name])
                held = found.setdefault(id(forward), {})
                for i, head in enumerate(self.heads[site.name]):
                    name, call_number = self._names[site.name, head], 0
                    while name in held:  # the site was called before in this forward
                        call_number += 1
                        name = f"{self._names[site.name, head]}#{call_number}"
                    held[name] = rows[:, i]

    def on_end(self) -> None:
        """The forward of this thread is over."""
        running, found = self._running.pop(threading.get_ident(), (None, {}))
        for forward in () if running is None else running.forwards:
            if id(forward) in found:
                self.tell(Step(forward.index, forward.ids, found[id(forward)], forward.packed))

    def guarded(self, work: Callable[..., None], *given: Any) -> None:
        """Do one of these; in threads that did not open the watch no error of ours is raised in the forward."""
        try:
            work(*given)
        except Exception as error:
            if threading.get_ident() == self._opened_in:
                raise
            if not self.errors:
                _log.warning("what heads look at could not be told: %s: %s", type(error).__name__, error)
            self.errors.append(error)


def last_rows(pattern: Pattern, heads: Sequence[int]) -> Tensor:
    """[batch, head, key] weights of the last query; of a softmax nothing else is computed."""
    if type(pattern) is not SoftmaxPattern or pattern.mask.layout is not None:
        return pattern.rows(-1, heads)[:, :, 0]
    pattern._checked(heads)
    which, mask, group = list(heads), pattern.mask, pattern.n_heads // pattern.n_kv_heads
    tensor = mask.tensor
    if tensor is not None:
        tensor = tensor[:, :, -1:] if tensor.shape[1] == 1 else tensor[:, which, -1:]
    known = pattern._kernel_lse
    last = SoftmaxPattern(
        pattern.q[:, which, -1:], pattern.k[:, [head // group for head in which]],
        Mask(1, mask.n_keys, causal=mask.causal, offset=mask.offset + mask.n_queries - 1, window=mask.window,
             tensor=tensor),
        scale=pattern.scale, softcap=pattern.softcap, lse=None if known is None else known[:, which, -1:],
        sinks=None if pattern.sinks is None else pattern.sinks[which],
        key_bias=None if pattern.key_bias is None else pattern.key_bias[:, which],
    )  # fmt: skip
    return last.tile(slice(0, 1), slice(0, pattern.n_keys))[:, :, 0]
