"""Kernel calls of which the axes are not known yet, and what is kept of them until they are."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from workbench.hooks.proofs.axes import Axes, Bound
from workbench.hooks.tap import AttentionCall


@dataclass(frozen=True)
class Unplaced:
    """A kernel call of which the axes are not known.

    Attributes:
        site, module: who made it. heads: how many heads the module says it has.
        output: what the kernel gave.
        mixed: the axes of the output that the values do not have; width: the axis that only they have.
        under: makes the call, given what the axes are. tensors: what it is made of.
        read: the values as they were given, and how many keys they have.
        values: with the axes of the output, keys in the place of queries; None where they have other axes.
        shown: what its axes are, where the graph that it stands in shows them.
        scored: its kernel multiplies queries with keys, which no gate of experts does.
    """

    site: str
    module: nn.Module
    heads: int | None
    output: Tensor
    mixed: tuple[int, ...]
    width: int
    under: Callable[[Bound], AttentionCall]
    read: tuple[Tensor, int]
    tensors: tuple[Tensor | None, ...] = ()
    values: Tensor | None = None
    scored: bool = False
    shown: Axes | None = None

    @property
    def by_fewer_rows(self) -> bool:
        """Whether it has fewer rows than keys, so that it may be a part of a map."""
        return all(self.output.shape[axis] < self.read[1] for axis in self.mixed)

    def reads_with(self, other: Unplaced) -> bool:
        """Whether both read the same values of one site by fewer rows each, as the parts of one map do."""
        a, b = self.read[0], other.read[0]
        alike = self.site == other.site and self.by_fewer_rows and other.by_fewer_rows and a.shape == b.shape
        return alike and (a is b or torch.equal(a, b))


@dataclass(eq=False)
class Waiting:
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
            or a norm may lie between; or smaller things have all of them together.
        entered: which of its head-wide rows were found in smaller things that entered linear functions.
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
    entered: Tensor | None = None
    told: bool = False
    assumed: bool = False
    versions: tuple[int, ...] = ()

    def watch(self, output: Tensor) -> None:
        """Follow this output, and remember some of it: models change outputs in place, their values and their shape."""
        self.output = output.detach()
        self.sample = sampled(self.output).clone()

    @property
    def compared(self) -> bool:
        """Whether something that has the heads' rows and features was compared with it, and is something else."""
        return self.fits and self.tried > 0 and self.reason == Waiting.reason

    @property
    def unchanged(self) -> bool:
        """Whether the model has left the output as it was."""
        same = self.sample is not None and torch.equal(sampled(self.output).nan_to_num(), self.sample.nan_to_num())
        if not same:
            self.reason = "the model adds to what its kernel gives, or changes it in place"
        return same


def kept(call: Unplaced) -> Unplaced:
    """The call with the output as it is now: models change outputs in place before the axes are known."""
    with torch.no_grad():
        before = call.output.detach().clone()

    def under(bound: Bound) -> AttentionCall:
        made, now = call.under(bound), call.output.detach()
        same = now.shape == before.shape and torch.equal(now.nan_to_num(), before.nan_to_num())
        return made if same else replace(made, output=before)

    return replace(call, under=under)


@dataclass
class Run:
    """One forward in one thread. `examples`: how many the model was given; `by_sizes`: the last call that was placed by
    sizes alone; `made`: what linear functions gave, `given`: what each of these was applied to.
    """

    counts: Counter[str] = field(default_factory=Counter)
    waiting: list[Waiting] = field(default_factory=list)
    examples: int | None = None
    by_sizes: Unplaced | None = None
    made: deque[Tensor] = field(default_factory=lambda: deque(maxlen=8))
    given: deque[Tensor] = field(default_factory=lambda: deque(maxlen=8))


def versions(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())


def fits(p: Tensor, one: Waiting) -> bool:
    bound = None if one.guess is None else one.guess.bind(tuple(one.output.shape))
    return (
        bound is not None
        and p.numel() == one.output.numel()
        and (p.shape[-1] == bound.count("head") * bound.count("width"))
    )


def parts_of_maps(waiting: Sequence[Waiting]) -> Counter[str]:
    """How many calls make the map of a site, for sites of which several read the same values, each by fewer rows."""
    calls = [one.call for one in waiting]
    counts, first = Counter(call.site for call in calls), {call.site: call for call in reversed(calls)}
    whole = {call.site for call in calls if counts[call.site] > 1 and not call.reads_with(first[call.site])}
    return Counter({site: n for site, n in counts.items() if n > 1 and site not in whole})


def sampled(t: Tensor) -> Tensor:
    """Sixteen elements from all over a tensor."""
    flat = t.reshape(-1) if t.is_contiguous() else t.as_strided((min(16, t.shape[-1]),), (t.stride(-1),))
    return flat[:: max(1, len(flat) // 16)]
