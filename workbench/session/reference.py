"""What reference examples make of heads: the means and single examples that ablations put in a head's place."""

from __future__ import annotations

import re
import threading
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
from workbench.session.resampling import Content, choose_donors, contents_of, n_draws, stretched

_NOT_OF_TEXT = re.compile("vis|image|pixel|patch", re.IGNORECASE)


@dataclass
class _Heads:
    """The chosen heads of one site over the reference examples.

    Attributes:
        sums: [head, rank, width] sums over examples, by the rank of a position among the real ones; counts: [rank]
            examples that have as many.
        examples: [head, rank, width] of each example, if they are kept.
    """

    sums: Tensor | None = None
    counts: Tensor | None = None
    examples: list[Tensor] = field(default_factory=list)

    def add(self, z: Tensor, real: Tensor | None, keep: bool) -> None:
        """Take in a batch z [batch, head, position, width]; `real` [batch or 1, position] is False at padding."""
        real = _everywhere(z) if real is None else real.to(z.device).expand(z.shape[0], -1)
        if keep:
            self.examples.extend(each[:, mask] for each, mask in zip(z, real, strict=True))
            return
        exact = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
        rank = (real.cumsum(1) - 1)[real]
        # Padding may hold anything, NaN too, so that it is left out rather than multiplied by zero.
        sums = exact.new_zeros(z.shape[2], z.shape[1], z.shape[3]).index_add_(0, rank, exact.transpose(1, 2)[real])
        sums, counts = sums.transpose(0, 1), torch.bincount(rank, minlength=z.shape[2])
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
        seed: chooses each example's donors; see `workbench.session.resampling`.
    """

    def __init__(self, heads: Mapping[Site, Sequence[int]], how: str, seed: int = 0) -> None:
        self.chosen = heads
        self.known = {site.name: site for site in heads}
        self.kind = ABLATIONS[how]
        self.heads = {site.name: _Heads() for site in heads}
        self.seed, self.draws = seed, 1
        self._pool: list[Content] = []  # what the reference's examples are, where single ones are used
        self._model: nn.Module | None = None
        self._now = _Running()

    def run(
        self, session: Session, batches: Mapping[str, Any] | Iterable[Any], inputs: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Run the session's model on each batch of inputs, without gradients, interventions or capture.

        Args:
            inputs: batches that will be ablated, as far as they are known: whether they can be is found out before.

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
        if self.kind.singles:
            self._pool = [content for batch in several for content in contents_of(batch)]
            self.draws = n_draws(self._pool)
            for batch in inputs:
                self._donors(batch)
        self._model = session.model
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
        if self.kind.singles:
            raise InterventionError(
                "a capture does not say which examples it holds, so that one could be resampled from itself",
                hint="pass the inputs themselves as reference=",
            )
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
        """[batch, head, query, width]: mean over examples, for each real position."""
        sums, counts = self._sums(call.site)
        self._check_width(call, old, sums)
        self._check_whole(call.site, old.shape[2], call.v.shape[-2])
        rank = (self._real(call.site, old).cumsum(1) - 1).clamp_min(0).to(sums.device)
        longest = int(rank.max()) + 1
        if len(counts) < longest:
            raise InterventionError(
                f"the reference has {len(counts)} positions, the input {longest}", site=call.site,
                hint="pass a reference as long as the input",
            )  # fmt: skip
        empty = (counts[:longest] == 0).nonzero()
        if empty.numel():
            raise InterventionError(f"position {int(empty[0])} is padding in every reference example", site=call.site)
        means = sums[:, :longest] / counts[:longest, None]
        return means[:, rank].transpose(0, 1)

    def resample(self, call: AttentionCall, old: Tensor, draw: int = 0, places: Sequence[int] | None = None) -> Tensor:
        """[batch, head, query, width]: each example gets the heads of one of its donors, at its real positions.

        Args:
            draw: which donor. places: which of the site's heads that are held; all by default.
        """
        examples = self.heads[call.site].examples
        self._check_width(call, old, examples[0])
        self._check_whole(call.site, old.shape[2], call.v.shape[-2])
        donors = self._now.donors
        if donors is None or len(donors) != old.shape[0]:
            raise InterventionError(
                f"the heads see {old.shape[0]} examples, and {len(donors or ())} are known from the inputs",
                site=call.site,
                hint="call the model itself with its whole inputs (PyTorch's own modules by position), or ablate with "
                'how="mean" or "zero"',
            )
        new = torch.zeros_like(old)
        for i, (chosen, mask) in enumerate(zip(donors, self._real(call.site, old), strict=True)):
            given, n = examples[chosen[draw]], int(mask.sum())
            length = given.shape[1]
            index = stretched(torch.arange(n), torch.tensor(n), torch.tensor(length)).expand(n)
            taken = given if places is None else given[list(places)]
            new[i, :, mask] = taken[:, index.to(given.device)].to(new)
        return new

    def begin(self, batch: Mapping[str, Any]) -> None:
        """The model is about to run on these inputs, in this thread.

        Raises:
            InterventionError: an example of theirs has none to be resampled from.
        """
        self._now.batch, self._now.donors = batch, self._donors(batch) if self.kind.singles else None

    def _donors(self, batch: Mapping[str, Any]) -> list[list[int]]:
        return choose_donors(contents_of(batch), self._pool, self.seed, self.draws)

    def _real(self, site: str, old: Tensor) -> Tensor:
        """[batch, query] bool: where the inputs are no padding."""
        real = None
        if self._model is not None and self._now.batch is not None:
            real = real_positions(self._model, self.known[site], self._now.batch, old, "the input's")
        return _everywhere(old) if real is None else real.to(old.device)

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


class _Running(threading.local):
    """What the model runs on, in each thread."""

    batch: Mapping[str, Any] | None = None
    donors: list[list[int]] | None = None

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()  # in another process nothing runs yet


def _everywhere(z: Tensor) -> Tensor:
    """[batch, position] of z [batch, head, position, width]: all real."""
    return torch.ones(z.shape[0], z.shape[2], dtype=torch.bool, device=z.device)


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
        self.reference.add(call.site, z, real_positions(self.model, site, self.batch, z), call.v.shape[-2])
        return z


def real_positions(
    model: nn.Module, site: Site, batch: Mapping[str, Any], z: Tensor, whose: str = "the reference's"
) -> Tensor | None:
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
        f"{whose} {name} {list(mask.shape)} does not fit its {z.shape[0]} examples of {z.shape[2]} positions",
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
