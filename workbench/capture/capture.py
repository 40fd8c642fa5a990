"""What a capture leaves behind: per forward and per site, the statistics and the lazy pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.capture.across import across_sequence, across_stages, bytes_of
from workbench.capture.gathering import gather
from workbench.capture.joined import join
from workbench.capture.pooling import pool
from workbench.capture.settings import Settings
from workbench.capture.site_capture import Forward, SiteCapture, pack
from workbench.capture.tables import tidy
from workbench.capture.transformer_lens import Cache
from workbench.capture.unrecorded import Unrecorded
from workbench.counting import count
from workbench.errors import CaptureError, expect, nearest
from workbench.hooks.sites import Site, Sites, all_here
from workbench.kernels.patterns import DENSE_LIMIT
from workbench.kernels.sequence_parallel.split import SplitSequence
from workbench.storage import files
from workbench.storage.provenance import Provenance
from workbench.storage.rendering import renderer
from workbench.storage.weights import WeightsThen
from workbench.tokens import visible_text

if TYPE_CHECKING:
    import pandas as pd

FORM = "workbench.capture"


class Capture:
    """The forwards of one `with wb.capture()`, their sites and statistics.

    With one forward, `cap["blocks.3.attn"]` is its site capture; of a site that is called several times in a forward it
    is the first call, and `cap["blocks.3.attn", 1]` the second. With several forwards, look at `cap.calls[i]`, or join
    them with `cap.pool()` (batches) or `cap.joined()` (the steps of a generation). A row that holds several sequences
    (packed or continuous batches) gives a forward for each, with positions from the sequence's own start.

    Attributes:
        settings: what was asked for; None for a file that does not tell.
        unrecorded: by site, the calls that it had to go on without, and why.
    """

    def __init__(
        self,
        forwards: list[Forward],
        model_sites: Sites,
        provenance: Provenance,
        weights: WeightsThen | None = None,
        settings: Settings | None = None,
        unrecorded: dict[str, Unrecorded] | None = None,
    ) -> None:
        self._forwards, self.model_sites, self.settings = forwards, model_sites, settings
        self.unrecorded = {} if unrecorded is None else unrecorded
        self._provenance, self._weights = provenance, weights

    @property
    def provenance(self) -> Provenance:
        """Where the numbers come from; the first reading hashes the weights, while the model is there and unchanged.

        A capture does not keep its model alive. Where there is no hash, "weights_note" says why.
        """
        if "weights_sha256" not in self._provenance and self._weights is not None:
            self._provenance |= self._weights.facts()
        return self._provenance

    def _with(self, forwards: list[Forward]) -> Capture:
        return Capture(forwards, self.model_sites, self._provenance, self._weights, self.settings, self.unrecorded)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which are captures like those from files: with the hash, and without the model."""
        return {**self.__dict__, "_provenance": dict(self.provenance), "_weights": None}

    @property
    def calls(self) -> tuple[Capture, ...]:
        """One capture per forward, in order."""
        return tuple(self._with([forward]) for forward in self._forwards)

    @property
    def sites(self) -> Sites:
        """The sites that fired."""
        fired = {name: capture.site for f in self._forwards for name, capture in f.sites.items()}
        order = {site.name: i for i, site in enumerate(self.model_sites)}
        ordered = sorted(fired.values(), key=lambda s: (order.get(s.path, len(order)), s.call))
        return Sites(ordered, self.model_sites.unread, self.model_sites.looked)

    @property
    def silent(self) -> tuple[str, ...]:
        """Names of the sites that were asked for and never fired in this capture."""
        others = {c.site.path for f in self._forwards for c in f.sites.values()} | {*self.unchosen}
        return tuple(site.name for site in self.model_sites if site.name not in others)

    @property
    def unchosen(self) -> tuple[str, ...]:
        """Names of the model's sites that `sites=` left out."""
        chosen = None if self.settings is None else self.settings.sites
        return () if chosen is None else tuple(site.name for site in self.model_sites if site.name not in chosen)

    @property
    def ledger(self) -> dict[str, int | str]:
        """How often each site of the model was called: 0 for those that never fired; and what is not read, with why.

        Of sites that `sites=` left out it says "not asked for".
        Where other processes hold some of a site's heads, it says which are here.
        Where calls were not recorded, a text says how many and why, in place of the number.

        >>> import torch, workbench
        >>> model = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> with workbench.attach(model) as wb, wb.capture() as cap:
        ...     for _ in range(3):
        ...         _ = model(torch.randn(1, 5, 16))
        >>> cap.ledger
        {'self_attn': 3}
        """
        counts: dict[str, int] = {site.name: 0 for site in self.model_sites}
        for forward in self._forwards:
            for one in forward.sites.values():
                counts[one.site.path] = counts.get(one.site.path, 0) + 1
        split = {
            f"{site.name} ({site.elsewhere})": "others in other processes" for site in self.sites if site.elsewhere
        }
        told: dict[str, int | str] = {**counts, **dict.fromkeys(self.unchosen, "not asked for")}
        for site, missed in self.unrecorded.items():
            told[site] = f"{counts[site]} recorded, {missed}" if site in counts else str(missed)
        return told | split | {one.name: f"unread: {one.reason}" for one in self.model_sites.unread}

    def _only(self) -> Forward:
        if len(self._forwards) != 1:
            several = "forwards" if all(f.packed is None for f in self._forwards) else "sequences of packed rows"
            raise CaptureError(
                f"the capture holds {len(self._forwards)} {several}",
                hint="choose one with cap.calls[i], or join them with cap.pool()",
            )
        return self._forwards[0]

    def __getitem__(self, name: str | int | Site | tuple[str | int | Site, int]) -> SiteCapture:
        forward = self._only()
        if isinstance(name, tuple):
            return self._call(*name)
        if isinstance(name, Site):
            name = name.name
        return forward.sites[self.sites[name].name]

    def _call(self, name: str | int | Site, call: int) -> SiteCapture:
        """One of the calls of a site."""
        first = self[name]
        wanted = first.site.at_call(call if call >= 0 else first.n_calls + call).name
        if wanted not in self._only().sites:
            raise CaptureError(
                f"there is no call {call}", site=first.site.path, hint=f"the site was called {first.n_calls} times"
            )
        return self._only().sites[wanted]

    def __contains__(self, name: object) -> bool:
        return name in self.sites

    def __iter__(self) -> Iterator[SiteCapture]:
        forward = self._only()
        return iter([forward.sites[site.name] for site in self.sites])

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """The forwards with what is known of each besides its sites: tokens, thread, time."""
        return tuple(self._forwards)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the tensors that some site holds."""
        return tuple(dict.fromkeys(name for f in self._forwards for c in f.sites.values() for name in c.statistics))

    @property
    def nbytes(self) -> int:
        """Bytes held by all forwards."""
        return sum(c.nbytes for f in self._forwards for c in f.sites.values())

    def query_tokens(self, name: str) -> list[list[str]] | None:
        """Text of the queries of a site, per batch entry; None when they are not known tokens."""
        return self._tokens(name, "query")

    def key_tokens(self, name: str) -> list[list[str]] | None:
        """Text of the keys of a site, per batch entry; None when they are not known tokens."""
        return self._tokens(name, "key")

    def _tokens(self, name: str, axis: str) -> list[list[str]] | None:
        capture = self[name]
        forward = self._only()
        tokens = forward.tokens.get(forward.stream(capture.site, axis))
        length = capture.shape[2 if axis == "query" else 3]
        return tokens if tokens is not None and all(len(row) == length for row in tokens) else None

    def stack(self, statistic: str, kind: str | None = None) -> Tensor:
        """One statistic of all sites (of a kind) as [site, batch, head, ...].

        Raises:
            CaptureError: the sites' shapes differ (the message says which), or none has the statistic.
        """
        expect(str, statistic=statistic)
        chosen = [c for c in self if kind in (None, c.site.kind)]
        if not chosen:
            raise CaptureError(f'no site of kind "{kind}" fired', hint=nearest(str(kind), [c.site.kind for c in self]))
        tensors = [getattr(c, statistic) for c in chosen]
        shapes: dict[tuple[int, ...], list[str]] = {}
        for c, tensor in zip(chosen, tensors, strict=True):
            shapes.setdefault(tuple(tensor.shape), []).append(c.site.name)
        if len(shapes) > 1:
            listed = "; ".join(f"{list(shape)} at {', '.join(names[:3])}" for shape, names in shapes.items())
            raise CaptureError(
                f'"{statistic}" has different shapes: {listed}', hint='choose sites of one shape, e.g. kind="self"'
            )
        return torch.stack(tensors)

    def table(self, statistic: str, per: str = "head") -> pd.DataFrame:
        """A tidy frame of one statistic.

        Args:
            statistic: a captured per-query or per-key statistic.
            per: "head" averages over positions (rows that see no key, or have none of what is asked for, are left out,
                and so is padding where the pattern was kept: what its rows give others is not in `received`);
                "position" keeps them all.

        Returns:
            Columns forward, site, call, layer, kind, batch, (window,) head, (position,) and the statistic; `call`
            counts the calls of a site in one forward. Where sites have windows, `window` is the window of the row, 0 at
            sites without, and `batch` is as in the tensors, example · windows + window. Averages come with `n`, over
            how many positions they are.
        """
        expect(str, statistic=statistic)
        return tidy(self._forwards, self.sites, statistic, per)

    def pool(self) -> Capture:
        """All forwards as one, their batches joined; patterns are not joined.

        Raises:
            CaptureError: the forwards differ in sites or in a site's [head, query, key].
        """
        return self._with([pool(self._forwards)])

    def joined(self) -> Capture:
        """The capture of a generation as if each sequence had run in one forward: prompt and answer, without a cache.

        A forward whose keys are more than its queries goes on with the sequence of the forward before it in the same
        thread; any other begins one. The encoder of an encoder-decoder joins the decoding that follows. The result has
        one forward per call of `generate()`, with rows at absolute positions, the statistics of this capture streamed
        anew, and patterns of their own. A recurrence is joined where each step found the state that the step before
        left; what rows read of a state from before the capture is `cap[site].before`, which takes values=True.

        In `cap.calls[i]`, a single step, keys are counted from the oldest that the cache holds: with a cache that
        forgets (a sliding window) only `joined()` knows their positions in the sequence. Without a cache
        (`use_cache=False`) each step is a whole forward, and stays one. A site that could not be recorded at some steps
        is left out; the ledger names it.

        Raises:
            CaptureError: patterns were not kept (queries_keys=False) or cannot be joined, a sequence began before the
                capture, or the cache was changed between steps, as beam search and assisted generation do.
        """
        if self.settings is None:
            raise CaptureError("the capture does not tell which statistics to stream", hint="capture again")
        return self._with(join(self._forwards, self.settings, self.unrecorded))

    def gathered(
        self, *, result: bool = False, split: SplitSequence | None = None, stages: SplitSequence | None = None
    ) -> Capture:
        """The capture with what other processes hold: that of the whole model on the whole sequence.

        Of heads, under tensor parallelism, it sends what each process holds to all of them, so that every process of
        the group has to call it, with a capture of the same forwards. Where all heads are here, it is this capture.

        Each process captures for itself, and nothing is sent for it: heads have the numbers of the whole model, and
        those that are elsewhere are NaN. `cap.ledger` and `wb.sites` say which are here.

        Of positions (`split_over`) and of the layers of a pipeline, statistics alone are sent: rows are put side by
        side, what keys receive is added up. The capture has no patterns then.

        Args:
            result: also every head's result, which needs z=True; afterwards no process has the whole projection.
            split: of the sequence, whose other positions lie in other processes.
            stages: of the group whose processes hold one stage of a pipeline each, `SplitSequence.of(1, group)`; each
                stage's modules have the names that they have in the whole model.

        Raises:
            CaptureError: the processes captured different things, the capture comes from a file or a pickle, or the
                model is gone.
        """
        if split is not None or stages is not None:
            return self._across(split, stages)
        if all(site.here is None for site in self.sites):
            return self
        made = self._with(gather(self._forwards, result=result))
        made.model_sites = Sites(map(all_here, self.model_sites), self.model_sites.unread, self.model_sites.looked)
        return made

    def _across(self, split: SplitSequence | None, stages: SplitSequence | None) -> Capture:
        if split is not None and stages is not None:
            raise CaptureError("a capture is put together over positions or over stages", hint="one after the other")
        asked = None if self.settings is None else sorted(self.settings.statistics)
        facts = {"the model's class": str(self._provenance.get("model_class", "")), "the statistics": asked}
        if split is not None:
            facts["the model's weights"] = self.provenance.get("weights_sha256")
            return self._with(across_sequence(self._forwards, split, facts))
        assert stages is not None
        forwards, sites = across_stages(self._forwards, stages, list(self.model_sites), facts)
        made = self._with(forwards)
        made.model_sites = Sites(sites, self.model_sites.unread, self.model_sites.looked)
        return made

    def bytes_to_gather(self, split: SplitSequence) -> int:
        """Bytes that this process gives into `gathered(split=…)`, before it is called; `split.sent` counts them."""
        return bytes_of(self._forwards, split)

    def to_cache(self, forward: int = 0, *, limit: int | None = DENSE_LIMIT) -> Cache:
        """One forward under TransformerLens' names: `cache["blocks.3.attn.hook_pattern"]`, `cache["pattern", 3]`.

        Args:
            forward: which forward.
            limit: most bytes that a dense pattern or a result may take, 1 GiB by default; None for no limit.

        Raises:
            CaptureError: there is no such forward.
        """
        if not -len(self._forwards) <= forward < len(self._forwards):
            raise CaptureError(f"the capture holds {len(self._forwards)} forwards, no forward {forward}")
        rotary = bool(self._provenance.get("rotary", False))
        return Cache(self._forwards[forward], self.model_sites, rotary=rotary, limit=limit)

    def save(self, path: str | Path, *, pattern: bool = False, result: bool = False) -> Path:
        """Write a safetensors file.

        Args:
            pattern: add what is needed to rebuild every pattern. result: add every head's result, which needs z=True.

        Raises:
            FileError: the file cannot be written. CaptureError: what it should hold was not kept.
        """
        tensors: dict[str, Tensor] = {}
        forwards = []
        for forward in self._forwards:
            entries = []
            for name, site in forward.sites.items():
                entry, parts = pack(site, pattern=pattern, result=result)
                entries.append(entry)
                tensors |= {f"{forward.index}/{name}/{key}": tensor for key, tensor in parts.items()}
            tensors |= {f"{forward.index}//{stream}": ids for stream, ids in forward.ids.items()}
            where: dict[str, Any] = {"index": forward.index, "thread": forward.thread}
            if forward.packed is not None:
                where["packed"] = list(forward.packed)
            if forward.span is not None:
                where["span"] = list(forward.span)
            forwards.append(where | {"sites": entries, "tokens": dict(forward.tokens)})
        model_sites = [asdict(site) for site in self.model_sites]
        header = {
            "provenance": self.provenance,
            "model_sites": model_sites,
            "unread": [asdict(one) for one in self.model_sites.unread],
            "looked": self.model_sites.looked,
            "unrecorded": [asdict(one) for one in self.unrecorded.values()],
            "forwards": forwards,
        }
        if self.settings is not None:
            header["settings"], asked = self.settings.state()
            tensors |= {f"settings/{name}": tensor for name, tensor in asked.items()}
        return files.write(path, FORM, header, tensors)

    def show(self) -> None:
        """Display what was captured in a notebook: the heads, and what they look at."""
        for view in renderer().all_of(self):
            view.show()

    def __repr__(self) -> str:
        name = visible_text(str(self._provenance.get("model_name", "model")))
        lengths = {c.shape for f in self._forwards for c in f.sites.values()}
        shapes = ", ".join(str(list(shape)) for shape in sorted(lengths)[:3]) + (" …" if len(lengths) > 3 else "")
        n_unread = len(self.model_sites.unread)
        unread = f", {count(n_unread, 'mixer')} unread" if n_unread else ""
        if self.model_sites.looked is False:
            unread += ", others not looked for"
        here = next((f", {site.elsewhere}" for site in self.sites if site.elsewhere), "")
        if self.unrecorded:
            unread += f", {count(sum(one.calls for one in self.unrecorded.values()), 'call')} not recorded"
        packed = sum(f.packed is not None for f in self._forwards)
        of_rows = f", {packed} of them sequences of packed rows" if packed else ""
        return (
            f"Capture({name}: {count(len(self._forwards), 'forward')}{of_rows}, "
            f"{count(len(self.sites), 'site')}{unread}{here}, [batch, head, query, key] {shapes}; "
            f"{', '.join(self.statistics)}; {self.nbytes / 2**20:.1f} MiB)"
        )
