"""What the axes of each site's kernel calls are: proved once, by where the heads' outputs enter a projection.

A call comes from a tap as `Unplaced`. It is placed by what is known of the site, by what a user has stated, or by sizes
where they leave only one way; else it waits until a linear function is given what the heads gave. What no value shows,
and no size, is refused by name.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.proofs.axes import Axes, Bound, Proof, axes_by_size, prove_axes, usual_axes
from workbench.hooks.proofs.rows import account
from workbench.hooks.sites import stated_heads
from workbench.hooks.tap import AttentionCall

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
class Unplaced:
    """A kernel call of which the axes are not known.

    Attributes:
        site, module: who made it. heads: how many heads the module says it has.
        output: what the kernel gave.
        mixed: the axes of the output that the values do not have; width: the axis that only they have.
        under: makes the call, given what the axes are. tensors: what it is made of.
    """

    site: str
    module: nn.Module
    heads: int | None
    output: Tensor
    mixed: tuple[int, ...]
    width: int
    under: Callable[[Bound], AttentionCall]
    tensors: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class Known:
    """What is known of a site's call: its axes and how they are known."""

    axes: Axes
    by: By


@dataclass(eq=False)
class _Waiting:
    """A call whose proof has not come yet.

    Attributes:
        ordinal: the how manieth call of its site in the forward.
        guess: what sizes say, if they leave only one way.
        output: what the kernel gave, or what an edit made of it.
        tried: linear functions that it was compared with.
        reason: why it was not proved.
        sample: some of the output as it was.
        seen: a linear function came after it.
        told: it could not wait, and was told by the guess. assumed: by the usual axes: if they are not proved, that is
            an error.
        versions: of the tensors that the call is made of, when it was made.
        fits: something that entered a linear function has the rows and features of what the heads give, so that a gate
            or a norm may lie between.
    """

    call: Unplaced
    ordinal: int
    guess: Axes | None
    output: Tensor
    edited: bool = False
    tried: int = 0
    reason: str = "what its heads give enters no linear function as it is"
    sample: Tensor | None = None
    seen: bool = False
    fits: bool = False
    told: bool = False
    assumed: bool = False
    versions: tuple[int, ...] = ()

    def watch(self, output: Tensor) -> None:
        """Follow this output, and remember some of it: models change outputs in place, their values and their shape."""
        self.output = output.detach()
        self.sample = _sampled(self.output).clone()

    @property
    def unchanged(self) -> bool:
        """Whether the model has left the output as it was."""
        same = self.sample is not None and torch.equal(_sampled(self.output).nan_to_num(), self.sample.nan_to_num())
        if not same:
            self.reason = "the model adds to what its kernel gives, or changes it in place"
        return same


def _kept(call: Unplaced) -> Unplaced:
    """The call with the output as it is now: models change outputs in place before the axes are known."""
    with torch.no_grad():
        before = call.output.detach().clone()

    def under(bound: Bound) -> AttentionCall:
        made, now = call.under(bound), call.output.detach()
        same = now.shape == before.shape and torch.equal(now.nan_to_num(), before.nan_to_num())
        return made if same else replace(made, output=before)

    return replace(call, under=under)


@dataclass
class _Run:
    """One forward in one thread. `examples`: how many the model was given."""

    counts: Counter[str] = field(default_factory=Counter)
    waiting: list[_Waiting] = field(default_factory=list)
    examples: int | None = None


class Layouts:
    """The layouts of a model's kernel calls, and what is waiting for a proof; one for each workbench.

    Args:
        stated: by site, what a user says of the axes.

    Attributes:
        refused: by site, why its calls are not shown.
        gates: sites whose softmax weighs experts or branches for each position: no attention.
    """

    def __init__(self, stated: Mapping[str, str] | None = None) -> None:
        self._stated = dict(stated or {})
        self._known: dict[tuple[str, int], Known] = {}
        self._guessed: dict[tuple[str, int], Known] = {}  # by sizes, in the last forward
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._runs: dict[int, _Run] = {}
        self._settled: set[int] = set()  # threads in which nothing is learned
        self.refused: dict[str, str] = {}
        self.gates: set[str] = set()

    # A forward.

    def begin(self) -> None:
        """A forward begins in this thread."""
        self._runs[threading.get_ident()] = _Run()

    def inputs(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """The model was called with these inputs."""
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()), None)
        run = self._runs.get(threading.get_ident())
        if run is not None and first is not None:
            run.examples = first.shape[0]

    def end(self) -> list[tuple[_Waiting, AttentionCall | str]]:
        """The forward is over. What was not proved is placed by sizes, where these leave one way and a gate or a norm
        may have lain between, or refused; given are these calls, or the reasons.
        """
        run = self._runs.pop(threading.get_ident(), None)
        settled: list[tuple[_Waiting, AttentionCall | str]] = []
        for one in () if run is None or threading.get_ident() in self._settled else run.waiting:
            key = one.call.site, one.ordinal
            bound = None if one.guess is None else one.guess.bind(tuple(one.output.shape))
            if bound is None or one.assumed or (one.seen and not one.fits):
                self.refused.setdefault(one.call.site, one.reason)
                settled.append((one, one.reason))
                continue
            self._attempts[key] += 1
            self._guessed[key] = Known(bound.axes, "sizes")
            if self._attempts[key] >= _ATTEMPTS:
                self._known[key] = self._guessed[key]
            if not one.told:
                late = self._late(one, bound)
                if isinstance(late, str) and one.guess is not None:
                    self._known[key] = Known(one.guess, "sizes")  # so that it is right when it runs again
                settled.append((one, late))
        return settled

    @staticmethod
    def _late(one: _Waiting, bound: Bound) -> AttentionCall | str:
        if one.versions != _versions(one.call.tensors):
            return "the model had overwritten its queries, keys or values when their axes became known; run again"
        with torch.enable_grad():  # what the model gave keeps its history
            return one.call.under(bound)

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

    def place(self, call: Unplaced) -> tuple[AttentionCall | None, _Waiting | None]:
        """The call, if its axes are known; and what waits for a proof.

        Raises:
            CaptureError: the layout that a user stated does not fit, or the heads that the module states are not there.
        """
        if not call.mixed or isinstance(call.module, nn.MultiheadAttention):
            return self._by_contract(call), None
        run = self._runs.setdefault(threading.get_ident(), _Run())
        ordinal = run.counts[call.site]
        run.counts[call.site] += 1
        shape = tuple(call.output.shape)
        stated = self._stated.get(call.site)
        if stated is not None:
            bound = Axes.parse(stated, call.heads).bind(shape)
            if bound is None:
                raise CaptureError(
                    f'the layout "{stated}" is not that of what the kernel gave', site=call.site, shape=shape
                )
            return call.under(bound), None
        known = self._known.get((call.site, ordinal))
        if known is None and threading.get_ident() in self._settled:
            known = self._guessed.get((call.site, ordinal))
        if known is not None and (bound := known.axes.bind(shape)) is not None:
            return call.under(bound), None
        if call.site in self.refused and threading.get_ident() in self._settled:
            return None, None
        guess = axes_by_size(shape, call.mixed, call.width, call.heads, run.examples)
        if call.site in self.refused:
            guess = None  # it is told again when values prove it
        waiting = _Waiting(call, ordinal, guess, call.output)
        waiting.watch(call.output)
        waiting.versions = _versions(call.tensors)
        run.waiting.append(waiting)
        own = shape[call.width] * prod(shape[axis] for axis in call.mixed)
        bound = None if guess is None else guess.bind(shape)
        if bound is not None and own == call.output.numel():  # one head of one example can be taken in one way
            waiting.told = True
            return call.under(bound), waiting
        waiting.call = _kept(call)
        return None, waiting

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

    def assume(self, waiting: _Waiting) -> AttentionCall | None:
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

    def saw_linear(self, p: Tensor) -> list[tuple[_Waiting, AttentionCall | str]]:
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
        settled: list[tuple[_Waiting, AttentionCall | str]] = []
        with torch.no_grad():
            p = p.detach()
            for one in list(run.waiting):
                one.seen = True
                if one not in run.waiting or one.tried >= _CANDIDATES or p.numel() < one.output.numel():
                    continue
                one.fits = one.fits or _fits(p, one)
                if not one.unchanged:
                    continue
                one.tried += 1
                part = _part(p, one)
                proof = prove_axes(one.output, part, one.call.mixed, one.call.width)
                if proof is None:
                    settled += self._account(run, one, p)
                elif proof.gate or self._is_gate(proof, one, run):
                    self.gates.add(one.call.site)
                    run.waiting.remove(one)
                    settled.append((one, "its softmax weighs experts or branches, each row has values of its own"))
                elif proof.axes is None:
                    one.reason = proof.reason
                else:
                    settled += self._proved(run, one, proof.axes, alone=part is p)
        return settled

    def saw_output(self, module: nn.Module, output: Tensor) -> list[tuple[_Waiting, AttentionCall | str]]:
        """A module has ended. Where it gives its heads merged, that shows their axes as a projection's input does.

        Raises:
            CaptureError: as `saw_linear`.
        """
        run = self._runs.get(threading.get_ident())
        settled: list[tuple[_Waiting, AttentionCall | str]] = []
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

    def _is_gate(self, proof: Proof, one: _Waiting, run: _Run) -> bool:
        """Whether each of several rows of an example reads values of its own, by a single query."""
        bound = None if proof.axes is None else proof.axes.bind(tuple(one.output.shape))
        if bound is None or run.examples is None or bound.axes.over != "positions":
            return False
        return bound.count("query") == 1 and bound.count("batch") > run.examples

    def _proved(
        self, run: _Run, one: _Waiting, axes: Axes, *, alone: bool = True
    ) -> list[tuple[_Waiting, AttentionCall | str]]:
        """`alone`: the call fills what enters the projection, so that its heads are all that the module has."""
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
            return [(one, self._late(one, bound))]
        assert one.guess is not None  # it was told by it
        told = one.guess.bind(tuple(one.output.shape))
        if told is not None and not _agree(told, bound):
            raise CaptureError(
                f'its axes are "{axes}", where it was taken for "{one.guess}"',
                site=one.call.site,
                shape=one.output.shape,
                hint="run it again: the layout is known from now on",
            )
        return []

    def _account(self, run: _Run, one: _Waiting, p: Tensor) -> list[tuple[_Waiting, AttentionCall | str]]:
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
        reason = f"its calls account for {found.explained} of {found.n_rows} rows of what enters the projection"
        if found.explained == found.n_rows:
            reason = f"its rows come from {len(parts)} calls, each with keys of its own"
        self.refused[one.call.site] = reason
        return [(other, reason) for other in own]

    def known(self, site: str) -> Known | None:
        """What is known of the first call of a site."""
        if site in self._stated:
            return Known(Axes.parse(self._stated[site]), "stated")
        return self._known.get((site, 0))


def _versions(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


def _fits(p: Tensor, one: _Waiting) -> bool:
    bound = None if one.guess is None else one.guess.bind(tuple(one.output.shape))
    return (
        bound is not None
        and p.numel() == one.output.numel()
        and (p.shape[-1] == bound.count("head") * bound.count("width"))
    )


def _sampled(t: Tensor) -> Tensor:
    """Sixteen elements from all over a tensor."""
    flat = t.reshape(-1) if t.is_contiguous() else t.as_strided((min(16, t.shape[-1]),), (t.stride(-1),))
    return flat[:: max(1, len(flat) // 16)]


def _part(p: Tensor, one: _Waiting) -> Tensor:
    """The features of p that a call fills in every row: all of them, or those of its own heads among others."""
    numel, rows = one.output.numel(), p.numel() // p.shape[-1]
    if numel == p.numel() or numel % rows:
        return p
    wide = numel // rows
    found = account(p, [one.output.movedim(one.call.width, -1)])
    if found is None or found.touched < found.n_rows:
        return p
    width = p.shape[-1] // found.owner.shape[1]
    filled = ((found.owner >= 0) | found.empty).all(0).nonzero().flatten().tolist()
    if len(filled) * width != wide or filled != list(range(filled[0], filled[-1] + 1)):
        return p
    return p[..., filled[0] * width : (filled[-1] + 1) * width].contiguous()


def _agree(a: Bound, b: Bound) -> bool:
    """Whether two readings put every number at the same place of [batch, head, query, width]."""
    if a.axes.over != b.axes.over:
        return False
    n = 1
    for sizes in a.sizes:
        for size in sizes:
            n *= size
    shape = [1] * len(a.sizes)
    for i, sizes in enumerate(a.sizes):
        for size in sizes:
            shape[i] *= size
    numbers = torch.arange(n).view(shape)
    x, y = a.heads(numbers), b.heads(numbers)
    return x.shape == y.shape and torch.equal(x, y)


def projected(func: Any, args: Sequence[Any]) -> Tensor | None:
    """What a linear function is applied to, as [..., feature]; None for functions that are no projection.

    Linear layers, products with a matrix, convolutions of one position, and einsum with a parameter.
    """
    if func in _LINEAR:
        return args[0] if args and isinstance(args[0], Tensor) else None
    if func in _MATRIX and len(args) > 1 and all(isinstance(t, Tensor) for t in args[:2]):
        return args[0] if args[1].dim() == 2 and args[0].dim() > 1 else None
    if func is torch.addmm and len(args) > 2 and isinstance(args[1], Tensor):
        return args[1]
    if func in _CONVOLUTIONS and len(args) > 1 and all(isinstance(t, Tensor) for t in args[:2]):
        x, weight = args[:2]
        return x.movedim(1, -1) if set(weight.shape[2:]) == {1} and x.dim() == weight.dim() else None
    if func is torch.einsum:
        return _einsum(args)
    return None


def _einsum(args: Sequence[Any]) -> Tensor | None:
    """einsum("bqhd,hdm->bqm", z, parameter): its features are what is summed over."""
    if len(args) != 3 or not isinstance(args[0], str) or not isinstance(args[2], nn.Parameter):
        return None
    terms, _, out = args[0].replace(" ", "").partition("->")
    left, _, right = terms.partition(",")
    summed = [letter for letter in left if letter in right and letter not in out]
    rows = [letter for letter in left if letter in out and letter not in right]
    if (
        not isinstance(args[1], Tensor)
        or not summed
        or len(rows) + len(summed) != len(left)
        or len(set(left)) != len(left)
    ):
        return None
    summed.sort(key=right.index)
    return args[1].permute([left.index(letter) for letter in (*rows, *summed)]).flatten(len(rows))


_LINEAR = {torch.nn.functional.linear}
_MATRIX = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_CONVOLUTIONS = {torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d}
LINEAR_FUNCTIONS = {*_LINEAR, *_MATRIX, *_CONVOLUTIONS, torch.addmm, torch.einsum}
"""Functions of which `projected` may say what they project."""
