"""How the axes of each site's kernel calls become known: by where the heads' outputs enter a projection.

A call that `placing` could not place waits until a linear function is given what the heads gave. What no value shows,
and no size, is refused by name.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.blocks import find_blocks
from workbench.hooks.cut_weights import here
from workbench.hooks.evidence import compare_part, doubt_of, is_gate, late
from workbench.hooks.finding import stated_heads
from workbench.hooks.placing import Known, Placing
from workbench.hooks.proofs.axes import Axes, Bound
from workbench.hooks.proofs.by_size import axes_by_size
from workbench.hooks.proofs.by_value import prove_axes
from workbench.hooks.proofs.rows import Account, account, own_features
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Run, Waiting, fits, parts_of_maps

_CANDIDATES = 8  # inputs of linear functions that are compared with one call
_ATTEMPTS = 3  # forwards in which a site that sizes have placed is tried by value


class Layouts(Placing):
    """The layouts of a model's kernel calls, and what is waiting for a proof; one for each workbench."""

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
            examples = None if run is None else run.examples
            self._guessed[key] = Known.seen(bound.axes, "sizes", bound, one.call, examples)
            if one.compared or self._attempts[key] >= _ATTEMPTS:
                self._known[key] = self._guessed[key]
            if not one.told:
                call = late(one, bound)
                if isinstance(call, str) and one.guess is not None:
                    self._known[key] = self._guessed[key]  # so that it is right when it runs again
                settled.append((one, call))
        return settled

    def saw_made(self, given: Tensor, made: Tensor) -> None:
        """A linear function was given this, and made that of it, of which values may be a part."""
        run = self._runs.get(threading.get_ident())
        if run is not None and made.is_floating_point() and made.dim() > 1:
            run.made.append(here(made.detach()))
            run.given.append(here(given.detach()))

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
        known = Known.seen(axes, "values", bound, one.call, run.examples)
        self._known[one.call.site, one.ordinal] = known
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
