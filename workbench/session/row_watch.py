"""What chosen heads look at, told as a model runs: the row of each forward's last query, of which nothing is kept."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.capture.site_capture import Forward
from workbench.errors import CaptureError
from workbench.hooks.last_row import Products, finished, last_rows, rows_over_all_keys
from workbench.hooks.sites import Sites
from workbench.hooks.tap import AttentionCall
from workbench.hooks.truth import Checked, check_last_row
from workbench.inputs import packed_sequences, token_ids
from workbench.session.packed import RunningForward

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One forward, such as a step of `generate()`; of packed rows, one sequence.

    Attributes:
        index: number of the forward since the `with` began, of those in which a chosen head was called.
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


_Held = dict[str, tuple[Tensor | Products, int]]
"""By label, the rows that it is one of, or what they will be made of."""


@dataclass
class RowWatch:
    """Collects the rows of each forward and tells of them when it is over; its methods are the observer's callbacks.

    Attributes:
        heads: by site. tell: is given each step. errors: of threads that did not open the watch.
        checked: calls of sites whose rows have been seen to give what the kernel gave.
    """

    model: nn.Module
    sites: Sites
    heads: Mapping[str, Sequence[int]]
    tell: Callable[[Step], object]
    checked: Checked = field(default_factory=Checked)
    errors: list[Exception] = field(default_factory=list)
    _opened_in: int = field(default_factory=threading.get_ident)
    _running: dict[int, tuple[RunningForward, dict[int, _Held]]] = field(default_factory=dict)
    _names: dict[str, dict[int, str]] = field(init=False)  # by site and head
    _across: frozenset[str] = field(init=False)  # sites whose queries and keys are of different sequences
    _fired: set[str] = field(default_factory=set)
    _ran: bool = False
    _n: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        chosen = {name: self.sites.find(name) for name in self.heads}
        labels = Counter(chosen[name].label(head) for name, several in self.heads.items() for head in several)
        self._names = {
            name: {
                head: site.label(head) if labels[site.label(head)] == 1 else f"{site.alias}.H{head}"
                for head in self.heads[name]
            }
            for name, site in chosen.items()
        }
        self._across = frozenset(name for name, site in chosen.items() if not site.positional)

    def on_start(self) -> None:
        """A forward begins in this thread."""
        self._ran = True
        self._running[threading.get_ident()] = RunningForward(Forward(0)), {}

    def on_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The model was called with these inputs."""
        running, _ = self._running.get(threading.get_ident(), (None, None))
        if running is None:
            return
        running.whole.ids = dict(token_ids(args, kwargs))
        if segments := packed_sequences(self.model, args, kwargs):
            running.pack(segments)

    @property
    def packed(self) -> bool:
        """Whether the rows of this thread's forward hold several sequences."""
        running, _ = self._running.get(threading.get_ident(), (None, {}))
        return running is not None and bool(running.segments)

    def on_call(self, call: AttentionCall) -> None:
        """Take the rows of one attention call."""
        running, found = self._running.get(threading.get_ident(), (None, {}))
        if running is None or call.replay:
            return
        heads, shard = self.heads[call.site], call.shard
        self._fired.add(call.site)
        here = [head for head in heads if shard is None or head in shard.here]
        if not here:
            return  # other processes have them
        own, cross = [head - (0 if shard is None else shard.first) for head in here], call.site in self._across
        with _as_plain_tensors(call.v.device.type):
            for forward, part in running.parts(call):
                if self.checked.is_due(part, call.site):
                    check_last_row(part, part.pattern(cross=cross))
                    self.checked.add(part, call.site)
                rows = Products.of(part, own, cross=cross) or last_rows(part, own, cross=cross)
                self._hold(found.setdefault(id(forward), {}), call.site, here, rows)

    def on_step(self, site: str, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Take the rows of a call whose one query sees all keys."""
        running, found = self._running.get(threading.get_ident(), (None, {}))
        if running is None:
            return
        heads = self.heads[site]
        self._fired.add(site)
        with _as_plain_tensors(q.device.type):
            rows = Products.of_all_keys(site, q, k, scale, heads) or rows_over_all_keys(q, k, scale, heads)
            self._hold(found.setdefault(id(running.whole), {}), site, heads, rows)

    def _hold(self, held: _Held, site: str, heads: Sequence[int], rows: Tensor | Products) -> None:
        names = self._names[site]
        for i, head in enumerate(heads):
            name, call_number = names[head], 0
            while name in held:  # the site was called before in this forward
                call_number += 1
                name = f"{names[head]}#{call_number}"
            held[name] = rows, i

    def finish(self) -> None:
        """The watch is over, and so are forwards that have not told of their end, as methods that call parts have none.

        Raises:
            CaptureError: the model has run, and no attention call was seen at a chosen site.
        """
        for thread in list(self._running):
            self.guarded(self.on_end, thread)
        silent = [name for name in self.heads if name not in self._fired]
        if silent and self._ran:
            raise CaptureError(
                f"no attention call was seen at {', '.join(silent[:5])}{' …' if len(silent) > 5 else ''}",
                site=silent[0],
                hint="does the forward reach it? wb.verify(**inputs) says what is seen of each site",
            )

    def on_end(self, thread: int | None = None) -> None:
        """The forward of a thread is over, by default of this one."""
        running, found = self._running.pop(threading.get_ident() if thread is None else thread, (None, {}))
        if running is None or not found:
            return
        with self._lock:
            index, self._n = self._n, self._n + 1
        with _as_plain_tensors():
            rows = finished(one for held in found.values() for one, _ in held.values() if isinstance(one, Products))
        for forward in running.forwards:
            if id(forward) in found:
                held = found[id(forward)]
                told = {
                    name: (rows[one] if isinstance(one, Products) else one)[:, i] for name, (one, i) in held.items()
                }
                self.tell(Step(index, forward.ids, told, forward.packed))

    def on_missed(self, site: str, error: Exception) -> None:
        """A call of a chosen site cannot be told.

        Raises:
            CaptureError: always.
        """
        self._fired.add(site)
        raise error

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


def _as_plain_tensors(device: str = "cpu") -> AbstractContextManager[None]:
    """Rows are ordinary tensors in full precision, however the model runs."""
    as_they_are = not (
        torch.is_inference_mode_enabled() or torch.is_grad_enabled() or torch.is_autocast_enabled(device)
    )
    return nullcontext() if as_they_are else _plain_tensors(device)


@contextmanager
def _plain_tensors(device: str) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        yield
