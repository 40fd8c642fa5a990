"""Forwards whose rows hold several sequences: each sequence is recorded as a forward of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from workbench.capture.site_capture import Forward
from workbench.hooks.packing import Rule, Segment, apart, rules
from workbench.hooks.tap import AttentionCall


@dataclass(eq=False)
class RunningForward:
    """A forward that runs, and the sequences that its rows hold, if each holds not just one.

    Attributes:
        whole: the forward as it runs; sequences: one forward for each of `segments`.
        part: a part of the model runs by itself, such as an output layer, or what makes a weight that is read.
    """

    whole: Forward
    part: bool = False
    segments: tuple[Segment, ...] = ()
    sequences: list[Forward] = field(default_factory=list)
    _rules: tuple[Tensor, int | None, tuple[Segment, ...], list[Rule] | None] | None = None

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """All that is recorded of it."""
        return (*self.sequences, self.whole)

    def pack(self, segments: Sequence[Segment]) -> None:
        """The inputs say that the rows hold these sequences; to be called when the whole's ids are known."""
        self.segments = tuple(segments)
        self.sequences = [
            replace(
                self.whole,
                sites={},
                packed=one.where,
                ids={
                    name: ids[one.row : one.row + 1, one.start : one.stop]
                    for name, ids in self.whole.ids.items()
                    if one.row < ids.shape[0] and one.stop <= ids.shape[1]
                },
                tokens={},
            )
            for one in segments
        ]

    def parts(self, call: AttentionCall) -> list[tuple[Forward, AttentionCall]]:
        """The call of each sequence, with the forward that it belongs to; the whole call if it mixes them.

        A kernel that is told of other sequences than the model's (the images of a vision tower) makes a call for each.
        """
        segments = call.segments or self.segments
        found = self._apart(call, segments) if segments else None
        if found is None:
            return [(self.whole, call)]
        own = [one.where for one in segments] == [one.where for one in self.segments]
        owners = self.sequences if own else [self.whole] * len(segments)
        return [(owner, call.of_sequence(one, rule)) for owner, one, rule in zip(owners, segments, found, strict=True)]

    def _apart(self, call: AttentionCall, segments: tuple[Segment, ...]) -> list[Rule] | None:
        """What is hidden inside of each sequence; None if the call mixes them, or cannot be cut."""
        if call.build is not None or call.finish is not None or call.v.dim() != 4:
            return None
        if call.block is not None or call.windows > 1:  # its rows are not those of the model's inputs
            return None
        if call.weights is not None:
            return [Rule(False, None, None)] * len(segments) if apart(call.weights, segments) else None
        if call.q is None or call.k is None or call.q.dim() != 4 or not _within(call.q, call.k, segments):
            return None
        if call.mask is None:
            told = bool(call.segments) or len(segments) == 1
            return [Rule(call.is_causal, call.window, None)] * len(segments) if told else None
        version = None if call.mask.is_inference() else call.mask._version
        last = self._rules  # layers share their masks
        if last is None or last[0] is not call.mask or last[1:3] != (version, segments):
            self._rules = last = (call.mask, version, segments, rules(call.mask, segments))
        return last[3]

    def ended(self) -> list[Forward]:
        """What is recorded of it: the sequences, and the whole too if some calls did not keep them apart."""
        found = [forward for forward in self.sequences if forward.sites]
        return found if found and not self.whole.sites else [*found, self.whole]


def _within(q: Tensor, k: Tensor, segments: Sequence[Segment]) -> bool:
    return (
        all(
            one.row < q.shape[0] and one.stop <= q.shape[2] and one.row < k.shape[0] and one.key_stop <= k.shape[2]
            for one in segments
        )
        and max(one.key_stop for one in segments) == k.shape[2]
    )
