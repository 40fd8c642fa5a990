"""What the axes of each site's kernel calls are: proved once, by where the heads' outputs enter a projection.

A call comes from a tap as `Unplaced`. It is placed by what is known of the site, by what a user has stated, or by sizes
where they leave only one way; else it waits until a linear function is given what the heads gave. What no value shows,
and no size, is refused by name.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.alignment import Alignment
from workbench.hooks.blocks import Blocks, find_blocks
from workbench.hooks.cut_weights import here
from workbench.hooks.evidence import axes_of_values, compare_part, doubt_of, is_gate, late, over_features
from workbench.hooks.finding import heads_of, stated_heads
from workbench.hooks.proofs.axes import Axes, Bound
from workbench.hooks.proofs.by_size import axes_by_size, usual_axes
from workbench.hooks.proofs.by_value import prove_axes
from workbench.hooks.proofs.rows import Account, account, own_features
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Run, Unplaced, Waiting, fits, kept, parts_of_maps, versions

By = Literal["contract", "values", "sizes", "stated"]
_CANDIDATES = 8  # inputs of linear functions that are compared with one call
_ATTEMPTS = 3  # forwards in which a site that sizes have placed is tried by value

UNKNOWN = "which axis of its kernel's output is which is not known"
STATE_IT = 'state the layout: attach(model, layout={"%s": "(head=4 batch) query width"}), with the axes of what the '
STATE_IT += "kernel gives"


def learn(site: str) -> str:
    """How the axes of a site become known."""
    return f"run wb.verify(**inputs) or one capture first, or {STATE_IT % site}"


@dataclass(frozen=True)
class Known:
    """What is known of a site's call: its axes and how they are known."""

    axes: Axes
    by: By


class Layouts:
    """The layouts of a model's kernel calls, and what is waiting for a proof; one for each workbench.

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

    def end(self) -> list[tuple[Waiting, AttentionCall | str]]:
        """The forward is over. What was not proved is placed by sizes, where these leave one way and a gate or a norm
        may have lain between, or refused; given are these calls, or the reasons.
        """
        run = self._runs.pop(threading.get_ident(), None)
        settled: list[tuple[Waiting, AttentionCall | str]] = []
        if run is not None:
            self.learning = bool(run.waiting or self._blocks or self.refused)
        parts = Counter[str]() if run is None else parts_of_maps(run.waiting)
        for one in () if run is None or threading.get_ident() in self._settled else run.waiting:
            key = one.call.site, one.ordinal
            bound = None if one.guess is None else one.guess.bind(tuple(one.output.shape))
            if one.call.site in parts:
                one.reason = (
                    f"its rows come from {parts[one.call.site]} calls, of which it cannot be shown where they lie"
                )
                bound = None
            if bound is None or one.assumed or (one.seen and not one.fits):
                self.refused.setdefault(one.call.site, one.reason)
                settled.append((one, one.reason))
                continue
            self._attempts[key] += 1
            self._guessed[key] = Known(bound.axes, "sizes")
            if one.compared or self._attempts[key] >= _ATTEMPTS:
                self._known[key] = self._guessed[key]
            if not one.told:
                call = late(one, bound)
                if isinstance(call, str) and one.guess is not None:
                    self._known[key] = Known(one.guess, "sizes")  # so that it is right when it runs again
                settled.append((one, call))
        return settled

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
        known = self._known.get((call.site, ordinal))
        if known is None and threading.get_ident() in self._settled:
            known = self._guessed.get((call.site, ordinal))
        if known is not None and (bound := known.axes.bind(shape)) is not None:
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

    def saw_made(self, given: Tensor) -> None:
        """A linear function gave this, of which values may be a part."""
        run = self._runs.get(threading.get_ident())
        if run is not None and given.is_floating_point() and given.dim() > 1:
            run.made.append(here(given.detach()))

    @property
    def is_waiting(self) -> bool:
        """Whether a call of this thread waits for its proof."""
        run = self._runs.get(threading.get_ident())
        return run is not None and bool(run.waiting)

    def saw_linear(self, p: Tensor) -> list[tuple[Waiting, AttentionCall | str]]:
        """A linear function is about to be applied to `p` [..., feature].

        Returns:
            Calls that this settles, which had not been told yet, each with the call; and those that are refused, each
            with the reason.

        Raises:
            CaptureError: a call that sizes had placed has other axes. They are known from now on.
        """
        run = self._runs.get(threading.get_ident())
        if run is None or not p.is_floating_point():
            return []
        settled: list[tuple[Waiting, AttentionCall | str]] = []
        with torch.no_grad():
            p = p.detach()
            sizes = Counter[str]()  # of what all calls of a site give
            for one in run.waiting:
                sizes[one.call.site] += one.output.numel()
            for one in list(run.waiting):
                one.seen = True
                if one not in run.waiting or one.tried >= _CANDIDATES:
                    continue
                if p.numel() < one.output.numel():
                    compare_part(one, p)
                    continue
                one.fits = one.fits or fits(p, one)
                if not one.unchanged:
                    continue
                one.tried += 1
                part = own_features(p, one.output, one.call.width)
                proof = prove_axes(one.output, part, one.call.mixed, one.call.width)
                if proof is None:
                    settled += self._account(run, one, p)
                elif proof.gate or is_gate(proof, one, run):
                    self.gates.add(one.call.site)
                    run.waiting.remove(one)
                    settled.append((one, "its softmax weighs experts or branches, each row has values of its own"))
                elif proof.axes is None:
                    one.reason = proof.reason
                elif (doubt := doubt_of(proof, one, run)) is not None:
                    one.reason = doubt
                else:
                    alone = part is p or sizes[one.call.site] == p.numel()
                    settled += self._proved(run, one, proof.axes, alone=alone)
        return settled

    def saw_output(self, module: nn.Module, output: Tensor) -> list[tuple[Waiting, AttentionCall | str]]:
        """A module has ended. Where it gives its heads merged, that shows their axes as a projection's input does.

        Raises:
            CaptureError: as `saw_linear`.
        """
        run = self._runs.get(threading.get_ident())
        settled: list[tuple[Waiting, AttentionCall | str]] = []
        for one in [] if run is None else [one for one in run.waiting if one.call.module is module]:
            if output.numel() != one.output.numel() or output.dim() < 2 or not one.unchanged:
                continue
            with torch.no_grad():
                proof = prove_axes(one.output, output.detach(), one.call.mixed, one.call.width)
            if proof is None or proof.axes is None or run is None:
                continue
            bound = proof.axes.bind(tuple(one.output.shape))
            heads = 1 if bound is None else bound.count("head")
            if heads == one.call.heads or (one.call.heads is None and heads > 1):  # else they are not merged yet
                settled += self._proved(run, one, proof.axes)
        return settled

    def _proved(
        self, run: Run, one: Waiting, axes: Axes, *, alone: bool = True
    ) -> list[tuple[Waiting, AttentionCall | str]]:
        """`alone`: the calls of the site fill what enters the projection, so that the heads of each are all that the
        module has: several with heads of their own would be numbered alike.
        """
        run.waiting.remove(one)
        bound = axes.bind(tuple(one.output.shape))
        assert bound is not None  # it was read from this shape
        stated, heads = stated_heads(one.call.module), bound.count("head")
        if alone and stated is not None and heads not in (stated, one.call.heads):
            reason = f"the module states {stated} heads, and its call has {heads}"
            self.refused[one.call.site] = reason
            return [(one, reason)]
        self._known[one.call.site, one.ordinal] = Known(axes, "values")
        self.refused.pop(one.call.site, None)
        if not one.told:
            return [(one, late(one, bound))]
        assert one.guess is not None  # it was told by it
        told = one.guess.bind(tuple(one.output.shape))
        if told is not None and not told.agrees(bound):
            raise CaptureError(
                f'its axes are "{axes}", where it was taken for "{one.guess}"',
                site=one.call.site,
                shape=one.output.shape,
                hint="run it again: the layout is known from now on",
            )
        return []

    def _account(self, run: Run, one: Waiting, p: Tensor) -> list[tuple[Waiting, AttentionCall | str]]:
        """Whether the calls of the site are parts of what enters the projection, row by row."""
        own = [other for other in run.waiting if other.call.site == one.call.site]
        parts = [other for other in own if other.unchanged]
        if p.numel() == one.output.numel() and len(parts) == 1:
            return []
        found = account(p, [other.output.movedim(other.call.width, -1) for other in parts])
        if found is None or not found.touched:
            return []
        if found.touched == found.n_rows and found.explained < found.n_rows:
            return []  # heads of other kinds are in the same rows
        run.waiting = [other for other in run.waiting if other not in own]
        if found.explained == found.n_rows and (composed := self._compose(run, own, found)) is not None:
            return composed
        reason = f"its calls account for {found.explained} of {found.n_rows} rows of what enters the projection"
        if any(other.edited for other in own):
            reason = f"its rows come from {len(own)} calls; a part of a head is not edited as if it were the head"
        elif found.explained == found.n_rows:
            reason = f"its rows come from {len(own)} calls, of which it cannot be shown where their keys lie"
        if not any(other.edited for other in own):
            self.refused[one.call.site] = reason
        for key in [key for key in self._known if key[0] == one.call.site]:
            del self._known[key]  # of shorter inputs, which take one call: with these all calls wait for each other
        return [(other, reason) for other in own]

    def _compose(
        self, run: Run, own: list[Waiting], found: Account
    ) -> list[tuple[Waiting, AttentionCall | str]] | None:
        """The calls as blocks of one map, if that is what they are."""
        bounds: list[Bound] = []
        for one in own:
            shape = tuple(one.output.shape)
            guess = one.guess or axes_by_size(shape, one.call.mixed, one.call.width, one.call.heads, run.examples)
            bound = None if guess is None else guess.bind(shape)
            if bound is None or one.told or one.edited or not one.unchanged:
                return None
            bounds.append(bound)
        calls = [late(one, bound) for one, bound in zip(own, bounds, strict=True)]
        made = [call for call in calls if isinstance(call, AttentionCall)]
        if len(made) < len(calls):
            return None
        blocks = find_blocks(made, bounds, [one.call.width for one in own], found, run.made)
        if blocks is None:
            return None
        self._blocks[own[0].call.site] = blocks
        self.refused.pop(own[0].call.site, None)
        return [(one, replace(call, block=block)) for one, call, block in zip(own, made, blocks.blocks, strict=True)]

    def aligned(self, call: AttentionCall) -> AttentionCall:
        """The call with what tells where its queries stand among its keys."""
        run = self._runs.get(threading.get_ident())
        return self._alignment.of(call, () if run is None else run.made)

    def known(self, site: str) -> Known | None:
        """What is known of the first call of a site."""
        if site in self.stated:
            return Known(Axes.parse(self.stated[site]), "stated")
        return self._known.get((site, 0))
