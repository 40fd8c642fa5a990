"""What the axes of each site's kernel calls are, where that is known.

A call comes from a tap as `Unplaced`. It is placed by what is known of the site, by what a user has stated, or by sizes
where they leave only one way; else it waits for a proof, which `layouts` finds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Literal

from torch import nn

from workbench.errors import CaptureError
from workbench.hooks.alignment import Alignment
from workbench.hooks.blocks import Blocks
from workbench.hooks.evidence import axes_of_values, over_features
from workbench.hooks.finding import heads_of, stated_heads
from workbench.hooks.proofs.axes import Axes, Bound
from workbench.hooks.proofs.by_size import axes_by_size, usual_axes
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Run, Unplaced, Waiting, kept, versions

By = Literal["contract", "values", "sizes", "stated"]

UNKNOWN = "which axis of its kernel's output is which is not known"
STATE_IT = 'state the layout: attach(model, layout={"%s": "(head=4 batch) query width"}), with the axes of what the '
STATE_IT += "kernel gives"


def learn(site: str) -> str:
    """How the axes of a site become known."""
    return f"run wb.verify(**inputs) or one capture first, or {STATE_IT % site}"


Order = tuple[tuple[int, int], ...]
"""Size and stride of each axis."""


def order_of(call: Unplaced) -> Order:
    """Of the queries: a kernel may lay out its output as it likes, and a cache keys and values."""
    q = call.tensors[0] if call.scored and call.tensors else None
    return () if q is None else tuple(zip(q.shape, q.stride(), strict=True))


def _sign(a: tuple[int, int], b: tuple[int, int]) -> int:
    """Which of two axes lies further out in memory; 0 where an axis of one, or of copies, does not tell."""
    return 0 if min(*a, b[0], b[1]) == 0 or min(a[0], b[0]) == 1 else (a[1] > b[1]) - (a[1] < b[1])


@dataclass(frozen=True)
class Known:
    """What is known of a site's call: its axes and how they are known.

    Attributes:
        batch, examples: how many entries its batch had where that was seen, and how many examples the model was given.
        order: how the axes of what the kernel was given lay in memory, if that was looked at.
    """

    axes: Axes
    by: By
    batch: int = 1
    examples: int | None = None
    order: Order = ()

    @classmethod
    def seen(cls, axes: Axes, by: By, bound: Bound, call: Unplaced, examples: int | None) -> Known:
        """What was seen at a call."""
        return cls(axes, by, bound.count("batch"), examples, order_of(call))

    def is_of(self, call: Unplaced) -> bool:
        """Whether the axes lie in memory as they did: of a model that exchanges them something else has to be shown."""
        order = order_of(call)
        return len(order) != len(self.order) or not any(
            _sign(a, b) * _sign(c, d) < 0 for (a, c), (b, d) in combinations(zip(self.order, order, strict=True), 2)
        )

    def tells(self, bound: Bound, examples: int | None) -> bool:
        """Whether it tells of these sizes too: where windows lie among examples does not show while one is alone."""
        if self.examples is None or examples is None:
            return True
        before, now = self.batch != self.examples, bound.count("batch") != examples  # are there windows?
        more = self.examples == 1 < examples or (now and not before)
        return not (more and (before or now))


class Placing:
    """What is known of the layouts of a model's kernel calls, by which these are placed.

    Args:
        stated: by site, what a user says of the axes.

    Attributes:
        stated: by site, what a user says of the axes.
        refused: by site, why its calls are not shown.
        gates: sites whose softmax weighs experts or branches for each position: no attention.
        learning: what linear functions give is asked for, as it may show axes.
    """

    def __init__(self, stated: Mapping[str, str] | None = None) -> None:
        self.stated = dict(stated or {})
        self._known: dict[tuple[str, int], Known] = {}
        self._guessed: dict[tuple[str, int], Known] = {}  # by sizes, in the last forward
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._runs: dict[int, Run] = {}
        self._settled: set[int] = set()  # threads in which nothing is learned
        self._blocks: dict[str, Blocks] = {}
        self._counted: set[tuple[str, int]] = set()  # sites whose heads are as many as they should be
        self._over_features: dict[str, bool] = {}  # of sites whose calls come through a registry
        self._alignment = Alignment()
        self.learning = True
        self.refused: dict[str, str] = {}
        self.gates: set[str] = set()

    # A forward.

    def begin(self) -> None:
        """A forward begins in this thread."""
        self._runs[threading.get_ident()] = Run()

    def inputs(self, examples: int | None) -> None:
        """The model was called with so many examples."""
        run = self._runs.get(threading.get_ident())
        if run is not None:
            run.examples = examples

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Nothing is learned or refused in this thread: modules run alone, without what their heads enter."""
        self._settled.add(threading.get_ident())
        try:
            yield
        finally:
            self._settled.discard(threading.get_ident())

    def drop(self) -> None:
        """The forward of this thread is over, also by an exception: what still waits is forgotten."""
        self._runs.pop(threading.get_ident(), None)

    # A call.

    def place(self, call: Unplaced, *, blocks: bool = False) -> tuple[AttentionCall | None, Waiting | None]:
        """The call, if its axes are known; and what waits for a proof.

        Args:
            blocks: the model runs on the inputs of the forward before, so that blocks of a map lie where they did. In
                all other forwards that is shown anew: longer inputs have more blocks of the same sizes.

        Raises:
            CaptureError: the layout that a user stated does not fit, or the heads that the module states are not there.
        """
        if not call.mixed or isinstance(call.module, nn.MultiheadAttention):
            return self._by_contract(call), None
        run = self._runs.setdefault(threading.get_ident(), Run())
        ordinal = run.counts[call.site]
        run.counts[call.site] += 1
        shape = tuple(call.output.shape)
        stated = self.stated.get(call.site)
        if stated is not None:
            bound = Axes.parse(stated, call.heads).bind(shape)
            if bound is None:
                raise CaptureError(
                    f'the layout "{stated}" is not that of what the kernel gave', site=call.site, shape=shape
                )
            return call.under(bound), None
        if call.shown is not None and (bound := call.shown.bind(shape)) is not None:
            return self._shown(call, bound), None
        if blocks and call.site in self._blocks and (found := self._blocks[call.site].of(ordinal, shape)) is not None:
            return replace(call.under(found[1]), block=found[0]), None
        known, settled = self._known.get((call.site, ordinal)), threading.get_ident() in self._settled
        if known is None and settled:
            known = self._guessed.get((call.site, ordinal))
        if known is not None and not settled and not known.is_of(call):
            known = None
        bound = None if known is None else known.axes.bind(shape)
        if known is not None and bound is not None and (settled or known.tells(bound, run.examples)):
            self._check_whole(call, run)
            if known.by == "sizes":
                run.by_sizes = call
            return call.under(bound), None
        self._check_whole(call, run)
        if call.site in self.refused and threading.get_ident() in self._settled:
            return None, None
        guess = axes_by_size(shape, call.mixed, call.width, call.heads, run.examples)
        if guess is None or call.heads is None:  # as many heads as examples look like these
            guess = axes_of_values(call, run) or guess
        if call.site in self.refused:
            guess = None  # it is told again when values prove it
        waiting = Waiting(call, ordinal, guess, call.output)
        waiting.watch(call.output)
        waiting.versions = versions(call.tensors)
        run.waiting.append(waiting)
        own = shape[call.width] * prod(shape[axis] for axis in call.mixed)
        bound = None if guess is None else guess.bind(shape)
        if bound is not None and own == call.output.numel():  # one head of one example can be taken in one way
            waiting.told = True
            return call.under(bound), waiting
        waiting.call = kept(call)
        return None, waiting

    def _shown(self, call: Unplaced, bound: Bound) -> AttentionCall | None:
        """The call under the axes that its graph shows, if it has the heads that its module states."""
        stated, heads = stated_heads(call.module), bound.count("head")
        if stated is not None and heads not in (stated, call.heads):
            self.refused[call.site] = reason = f"the module states {stated} heads, and its call has {heads}"
            raise CaptureError(reason, site=call.site, shape=call.output.shape)
        return call.under(bound)

    def of_registry(self, call: AttentionCall) -> AttentionCall:
        """A call that says itself what its axes are; but a softmax over channels is called in the same way."""
        over = self._over_features.get(call.site)
        if over is None:
            run = self._runs.get(threading.get_ident())
            made = () if run is None else run.made
            over = call.v.dim() == 4 and over_features(call, made)
            if made:
                self._over_features[call.site] = over
        if not over:
            return call
        axes = replace(Axes.plain(call.layout, call.v.shape[1]), over="features")
        return replace(call, axes=axes.bind(tuple(call.output.shape)))

    def refusal(self, call: AttentionCall) -> str | None:
        """Why a call that says itself what its axes are is not shown: it has other heads than its module states; None:
        it is shown.

        A config may speak of other modules too. It is believed where the call has a part of its heads only.
        """
        n_heads = call.sizes_of_all[0]
        if (call.site, n_heads) in self._counted:
            return None
        own, stated = stated_heads(call.module), heads_of(call.module)
        part = stated is not None and stated > n_heads and stated % n_heads == 0
        if call.site not in self.stated and (own not in (None, n_heads) or (own is None and part)):
            whose = "config" if own is None else "module"
            self.refused[call.site] = reason = f"the {whose} states {stated} heads, and its call has {n_heads}"
            return reason
        self._counted.add((call.site, n_heads))
        self.refused.pop(call.site, None)
        return None

    def _check_whole(self, call: Unplaced, run: Run) -> None:
        """Sizes placed the site's last call as one of shorter inputs, which is all; here both may be parts of one map.

        Raises:
            CaptureError: they are. Nothing is known of the site any more.
        """
        if run.by_sizes is None or not call.reads_with(run.by_sizes):
            return
        for key in [key for key in self._known if key[0] == call.site]:
            del self._known[key]
        self.refused[call.site] = reason = (
            "its rows come from several calls, of which it cannot be shown where they lie"
        )
        hint = f"where each call is a map of its own, {STATE_IT % call.site}"
        raise CaptureError(reason, site=call.site, shape=call.output.shape, hint=hint)

    def _by_contract(self, call: Unplaced) -> AttentionCall | None:
        """PyTorch's own module has its examples before its heads. Values of each row's own are those of a gate."""
        if not call.mixed:
            self.gates.add(call.site)
            return None
        plain = (
            Axes.plain("bhqd", call.heads)
            if call.output.dim() == 4
            else Axes.parse("(batch head) query width", call.heads)
        )
        bound = plain.bind(tuple(call.output.shape))
        return None if bound is None else call.under(bound)

    def assume(self, waiting: Waiting) -> AttentionCall | None:
        """The call by what sizes say, or by the axes that most models have, for those who cannot wait; None if it has
        another shape.
        """
        call, shape = waiting.call, tuple(waiting.call.output.shape)
        usual = waiting.guess or usual_axes(shape, call.mixed, call.width, call.heads)
        bound = None if usual is None else usual.bind(shape)
        if bound is None:
            return None
        waiting.assumed, waiting.told, waiting.guess = waiting.guess is None, True, usual
        return call.under(bound)

    @property
    def is_waiting(self) -> bool:
        """Whether a call of this thread waits for its proof."""
        run = self._runs.get(threading.get_ident())
        return run is not None and bool(run.waiting)

    def aligned(self, call: AttentionCall) -> AttentionCall:
        """The call with what tells where its queries stand among its keys."""
        run = self._runs.get(threading.get_ident())
        return self._alignment.of(call, () if run is None else list(zip(run.given, run.made, strict=True)))

    def known(self, site: str) -> Known | None:
        """What is known of the first call of a site."""
        if site in self.stated:
            return Known(Axes.parse(self.stated[site]), "stated")
        return self._known.get((site, 0))
