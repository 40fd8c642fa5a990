"""What reference examples make of heads: the means and single examples that ablations put in a head's place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from workbench.capture.capture import Capture
from workbench.errors import CaptureError, InterventionError
from workbench.hooks.configs import read
from workbench.hooks.edits import Edit, Threads, check_range
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.inputs import check_inputs
from workbench.session.ablations import ABLATIONS

_NOT_OF_TEXT = re.compile("vis|image|pixel|patch", re.IGNORECASE)


@dataclass
class _Heads:
    """The chosen heads of one site over the reference examples.

    Attributes:
        sums: [head, position, width] sums over examples; counts: [position] examples that have a token there.
        examples: [head, position, width] of each example, if they are kept.
    """

    sums: Tensor | None = None
    counts: Tensor | None = None
    examples: list[Tensor] = field(default_factory=list)

    def add(self, z: Tensor, real: Tensor | None, keep: bool) -> None:
        """Take in a batch z [batch, head, position, width]; `real` [batch or 1, position] is False at padding."""
        if keep:
            self.examples.extend(z.unbind(0))
            return
        exact = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
        if real is None:
            real = torch.ones(1, z.shape[2], dtype=torch.bool, device=z.device)
        # Padding may hold anything, NaN too, so that it is filled rather than multiplied by zero.
        sums = exact.masked_fill(~real[:, None, :, None], 0.0).sum(0)
        counts = real.expand(z.shape[0], -1).sum(0)
        if self.sums is None or self.counts is None:
            self.sums, self.counts = sums, counts
            return
        self.sums = _plus(self.sums, sums.to(self.sums.device), axis=1)
        self.counts = _plus(self.counts, counts.to(self.counts.device), axis=0)


class Session(Protocol):
    """What a reference needs of a workbench: its model, and a way to look at heads with nothing else open."""

    model: nn.Module

    def undisturbed(self) -> AbstractContextManager[None]: ...

    def editing(self, *edits: Edit, threads: Threads) -> AbstractContextManager[None]: ...


class Reference:
    """Output of chosen heads on reference examples, un-edited; each ablation is a `Source` of `hooks.edits.Ablation`.

    Args:
        heads: which heads, by site.
        how: an ablation that needs a reference; every example is kept where it uses single ones, else their sums.
        generator: chooses examples at random; without it they are taken in turn.
    """

    def __init__(self, heads: Mapping[Site, Sequence[int]], how: str, generator: torch.Generator | None = None) -> None:
        self.chosen = heads
        self.known = {site.name: site for site in heads}
        self.kind = ABLATIONS[how]
        self.heads = {site.name: _Heads() for site in heads}
        self._generator = generator
        self._order: list[int] = []  # which example stands for example i of a batch

    def run(self, session: Session, batches: Mapping[str, Any] | Iterable[Any]) -> None:
        """Run the session's model on each batch of inputs, without gradients, interventions or capture.

        Raises:
            InterventionError: no batch, a batch that is no dict or does not fit the model, or a site that the model
                does not reach, or reaches several times.
        """
        several = [batches] if isinstance(batches, Mapping) or not isinstance(batches, Iterable) else list(batches)
        if not several:
            raise InterventionError("the reference has no batch", hint="pass a dict of model inputs, or several")
        for batch in several:
            if not isinstance(batch, Mapping):
                raise InterventionError(
                    f"a reference is a dict of model inputs, several, or a Capture, not {type(batch).__name__}"
                )
            try:
                check_inputs(session.model, (), batch)
            except CaptureError as error:
                raise InterventionError(
                    f"in the reference, {error.message}", shape=error.shape, hint=error.hint
                ) from None
        for batch in several:
            collector = _Collector(self, session.model, batch)
            with session.undisturbed(), torch.no_grad(), session.editing(collector, threads="this"):
                session.model(**batch)
                silent = sorted(collector.sites - collector.fired)
                collector.fired |= collector.sites
            if silent:
                raise InterventionError("the model does not reach the site on the reference", site=silent[0])

    def read(self, capture: Capture) -> None:
        """Take the heads' output from a capture that kept it.

        Raises:
            InterventionError: it has not kept z, or not seen a site, or a site several times in a forward.
        """
        if not capture.calls:
            raise InterventionError("the reference capture holds no forward")
        for call in capture.calls:
            for name in self.heads:
                if name not in call:
                    raise InterventionError("the reference capture has not seen the site", site=name)
                if f"{name}#1" in call:
                    raise _several(name)
                seen = call[name]
                if seen.z is None:
                    raise InterventionError(
                        "the reference capture has not kept z", site=name, hint="capture with z=True"
                    )
                z, real = seen.z.transpose(1, 2), None
                if seen.lazy is not None and self.known[name].kind == "self" and seen.shape[2] == seen.shape[3]:
                    real = (seen.pattern.seen.queries_per_key > 0).any(1).to(z.device)  # nobody looks at padding
                self.add(name, z, real, seen.shape[3])

    def add(self, site: str, z: Tensor, real: Tensor | None, n_keys: int) -> None:
        """Take in z [batch, head, position, width] of a site; `real` [batch or 1, position] is False at padding."""
        chosen = self.chosen[self.known[site]]
        check_range(chosen, z.shape[1], site)
        if self.kind.by_position:
            self._check_whole(site, z.shape[2], n_keys, "in the reference, ")
        with torch.inference_mode(False), torch.no_grad():
            self.heads[site].add(z[:, torch.tensor(chosen, device=z.device)].detach(), real, self.kind.singles)

    def mean(self, call: AttentionCall, old: Tensor) -> Tensor:
        """[1, head, 1, width]: mean over examples and positions."""
        sums, counts = self._sums(call.site)
        self._check_width(call, old, sums)
        return (sums.sum(1) / counts.sum())[None, :, None]

    def mean_positional(self, call: AttentionCall, old: Tensor) -> Tensor:
        """[1, head, query, width]: mean over examples, for each position."""
        sums, counts = self._sums(call.site)
        self._check_width(call, old, sums)
        length = old.shape[2]
        self._check_whole(call.site, length, call.v.shape[-2])
        if sums.shape[1] < length:
            raise _shorter(call.site, sums.shape[1], length)
        empty = (counts[:length] == 0).nonzero()
        if empty.numel():
            raise InterventionError(f"position {int(empty[0])} is padding in every reference example", site=call.site)
        return (sums[:, :length] / counts[:length, None])[None]

    def resample(self, call: AttentionCall, old: Tensor) -> Tensor:
        """[batch, head, query, width]: each example of the batch gets the heads of one reference example."""
        examples = self.heads[call.site].examples
        self._check_width(call, old, examples[0])
        length = old.shape[2]
        self._check_whole(call.site, length, call.v.shape[-2])
        while len(self._order) < old.shape[0]:
            self._order.extend(self._more())
        picked = [examples[self._order[i]] for i in range(old.shape[0])]
        short = next((z for z in picked if z.shape[1] < length), None)
        if short is not None:
            raise _shorter(call.site, short.shape[1], length)
        return torch.stack([z[:, :length].to(old.device) for z in picked])

    def _more(self) -> list[int]:
        n = min(len(found.examples) for found in self.heads.values())
        if self._generator is None:
            return list(range(n))
        picked = torch.randint(n, (n,), generator=self._generator, device=self._generator.device)
        return [int(i) for i in picked.tolist()]

    def _sums(self, site: str) -> tuple[Tensor, Tensor]:
        found = self.heads[site]
        assert found.sums is not None
        assert found.counts is not None
        if not bool(found.counts.any()):
            raise InterventionError("the reference is nothing but padding", site=site)
        return found.sums, found.counts

    def _check_width(self, call: AttentionCall, old: Tensor, reference: Tensor) -> None:
        if reference.shape[-1] != old.shape[-1]:
            raise InterventionError(
                f"the reference has d_head {reference.shape[-1]}, the call {old.shape[-1]}", site=call.site
            )

    def _check_whole(self, site: str, queries: int, keys: int, where: str = "") -> None:
        if self.known[site].kind != "cross" and keys > queries:
            raise InterventionError(
                f"{where}{queries} queries look at {keys} keys: with a cache, positions do not line up",
                site=site,
                hint='run whole sequences (use_cache=False), or ablate with how="mean" or "zero"; a capture of a '
                "generation can be joined",
            )


class _Collector(Edit):
    """Looks at the heads' output of one batch, and changes nothing."""

    def __init__(self, reference: Reference, model: nn.Module, batch: Mapping[str, Any]) -> None:
        super().__init__(reference.heads)
        self.reference, self.model, self.batch = reference, model, batch

    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z itself."""
        if call.site in self.fired:
            raise _several(call.site)
        site = self.reference.known[call.site]
        self.reference.add(call.site, z, _real_positions(self.model, site, self.batch, z), call.v.shape[-2])
        return z


def _real_positions(model: nn.Module, site: Site, batch: Mapping[str, Any], z: Tensor) -> Tensor | None:
    """[batch, position] bool, False where the queries of a site are padding; None if no mask speaks of them.

    Raises:
        InterventionError: the mask of a model with one tower does not fit its queries.
    """
    decodes = read(read(model, "config"), "is_encoder_decoder", False) or "decoder_input_ids" in batch
    in_encoder = "encoder" in site.name.split(".") and site.kind != "cross"
    name = "decoder_attention_mask" if decodes and not in_encoder else "attention_mask"
    mask = batch.get(name)
    if not isinstance(mask, Tensor) or _NOT_OF_TEXT.search(site.tower):
        return None
    if mask.shape == (z.shape[0], z.shape[2]):
        return mask.to(torch.bool)
    if site.tower:  # it may be the mask of another tower
        return None
    raise InterventionError(
        f"the reference's {name} {list(mask.shape)} does not fit its {z.shape[0]} examples of {z.shape[2]} positions",
        site=site.name,
        hint="pass a mask [batch, position], or none",
    )


def _plus(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """a + b, the shorter one filled up with zeros."""
    if a.shape[axis] < b.shape[axis]:
        a, b = b, a
    longer = a.clone()
    longer.narrow(axis, 0, b.shape[axis]).add_(b)
    return longer


def _several(site: str) -> InterventionError:
    return InterventionError(
        "the site is called several times in one forward, so that it has no single reference",
        site=site,
        hint='ablate it with how="zero", or patch it with a function',
    )


def _shorter(site: str, has: int, needs: int) -> InterventionError:
    return InterventionError(
        f"the reference has {has} positions, the input {needs}", site=site, hint="pass a reference as long as the input"
    )
