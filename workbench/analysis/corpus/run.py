"""`head_atlas_over`: every head over a corpus, in memory that does not grow with it but for a few numbers a window."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.corpus.measuring import STATISTICS, Rows, measure
from workbench.analysis.corpus.result import CorpusAtlas, CorpusAtlasInterrupted
from workbench.analysis.corpus.running import Sums, Words
from workbench.analysis.corpus.texts import Corpus, Frame, length_for, unknown_id, windows_of
from workbench.analysis.head_scores.prompts import HeadNames, self_attention
from workbench.analysis.logits.asked import check_model
from workbench.analysis.weights.copying import ov_copying
from workbench.errors import CaptureError, FormatError, WorkbenchError, expect
from workbench.hooks.split_models import check_unsplit
from workbench.hooks.together import check_as_far
from workbench.inputs import device_for_inputs, without_cache
from workbench.session.workbench import Workbench
from workbench.storage.resumable import file_of, kept_when_stopped
from workbench.sweep.inputs import check_resumed
from workbench.tokens import piece, visible
from workbench.workers.engine import Engine, opened
from workbench.workers.protocol import Job

_SAVED_EVERY = 60.0  # seconds


def head_atlas_over(
    wb: Workbench,
    corpus: Corpus,
    *,
    tokens: int | None = 1_000_000,
    length: int | None = None,
    batch: int = 8,
    sinks: int = 4,
    recent: int = 64,
    n_examples: int = 4,
    resume: str | Path | None = None,
    engine: str | Engine = "local",
    progress: bool = True,
) -> CorpusAtlas:
    """What every self-attention head does over a corpus.

    The texts stand one behind the other and are cut into windows, each with what the tokenizer puts around a text. Of
    every head and window, means over positions of the text:

    - induction: weight on keys that follow an earlier copy of the query's token; over queries that have one
    - previous: weight on the position before
    - duplicate: weight on earlier copies of the query's token; over queries that have one
    - sink: weight on the first key
    - retrieval: share of the queries whose next token stands in the window already, at which the key of the largest
      weight is a copy of that next token. The score of Wu et al. 2024 (arXiv 2404.15574) on text as it is: theirs is of
      needles (`retrieval_scores`)
    - streaming: weight on the first `sinks` and the last `recent` keys, over queries that see more
      (arXiv 2309.17453); `streaming_scores` also tells what a head's output loses

    The token for unknown words is no copy of itself, and is in no example: it stands for many words.

    Also deciles of entropy and distance over all positions, `ov_copying`, the strongest looks with their words, and how
    the second half of the corpus differs from the first. Definitions of weights: `docs/statistics.md`.

    Args:
        corpus: a text, a file or a folder of UTF-8 texts, or several texts, paths or rows of ids.
        tokens: of text, at most; None for the whole corpus. A corpus that ends before is a warning.
        length: of windows; by default 256, or the model's context where that is less.
        batch: windows to a forward.
        resume: a file that is written once a minute and at the end. If it is there, it is gone on with: the corpus is
            read again as far as it was done, and must be the same.
        engine: "local", "ray", or a `workbench.RayWorkers`: who runs the windows.

    Raises:
        CaptureError: no tokenizer for a text, a file that is no UTF-8, fewer than two windows, or a model that does not
            run on tokens alone. What was done before is in `resume`.
        FormatError: `resume` is of another model, corpus or settings.
        CorpusAtlasInterrupted: Ctrl-C; it holds what is done.
    """
    expect(Workbench, wb=wb)
    check_model(wb)
    for name, value, least in (
        ("batch", batch, 1),
        ("sinks", sinks, 0),
        ("recent", recent, 1),
        ("n_examples", n_examples, 1),
    ):
        if value < least:
            raise CaptureError(f"{name} is at least {least}, not {value}")
    check_unsplit()
    frame = Frame.of(wb)
    length = length_for(wb, frame, length)
    room = frame.room(length)
    most = None if tokens is None else max(2, tokens // room)
    work = _Work(wb, frame, length, batch, sinks, recent, n_examples, file_of(resume))
    rows = (
        windows_of(wb, corpus, frame, length) if most is None else islice(windows_of(wb, corpus, frame, length), most)
    )
    bar = tqdm(total=most and most * room, unit="token", unit_scale=True, disable=not progress, desc="atlas")
    with opened(engine, wb) as workers, bar, kept_when_stopped(work.path, work.save, CorpusAtlasInterrupted):
        for done in work.over(rows, workers):
            bar.update(done * room)
    n_tokens = work.windows * room
    if work.windows < 2:
        raise CaptureError(
            f"the corpus has {work.windows} windows of {length} tokens, and halves take two",
            hint="pass more text, or a smaller length=",
        )
    if tokens is not None and most is not None and work.windows < most:
        warnings.warn(f"the corpus ended after {n_tokens:,} of {tokens:,} tokens", UserWarning, stacklevel=2)
    return work.finished()


class _Work:
    """The work on one atlas: what is done so far, and what it takes to go on."""

    def __init__(
        self, wb: Workbench, frame: Frame, length: int, batch: int, sinks: int, recent: int, examples: int,
        path: Path | None,
    ) -> None:  # fmt: skip
        self.wb, self.frame, self.length, self.batch, self.path = wb, frame, length, batch, path
        self.sinks, self.recent, self.examples = sinks, recent, examples
        self.text = slice(len(frame.before), length - len(frame.behind))
        self.unknown = unknown_id(wb.tokenizer)
        self.sums: Sums | None = None
        self.heads: HeadNames | None = None
        self.kv_heads: tuple[int, ...] = ()
        self._pieces: dict[int, str] = {}
        self._saved = time.monotonic()
        self.identity: dict[str, Any] = {
            "model class": f"{type(wb.model).__module__}.{type(wb.model).__qualname__}",
            "model weights": wb.weights_identity(), "length": length,
            "around": [list(frame.before), list(frame.behind)], "unknown": self.unknown, "sinks": sinks,
            "recent": recent, "examples": examples,
        }  # fmt: skip
        self.held = CorpusAtlas.load(path) if path is not None and path.exists() else None
        if self.held is not None:
            told = {name: value for name, value in self.held.identity.items() if name != "corpus"}
            check_resumed(told, self.identity, path.name if path else "", "atlas")

    @property
    def windows(self) -> int:
        """How many are done."""
        return 0 if self.sums is None else self.sums.done

    def over(self, rows: Iterator[Tensor], workers: Engine) -> Iterator[int]:
        """Go over windows; gives how many are done, batch by batch."""
        done = self._skip(rows)
        check_as_far(self.wb.model, done)
        yield done
        batches = self._batches(rows)
        first = next(batches, None)
        if first is None:
            return
        names = self_attention(self.wb, first[0].to(device_for_inputs(self.wb.model)))
        seen = partial(_seen, self.wb, names, self.text, self.sinks, self.recent, self.unknown)
        for ids, found in workers.over(Job(self.wb, seen, chain([first], batches))):
            self._add(ids, *found)
            yield len(ids)
            if self.path is not None and time.monotonic() - self._saved > _SAVED_EVERY:
                self.save()

    def _skip(self, rows: Iterator[Tensor]) -> int:
        """Read what a file has done already, and see that it is the same corpus."""
        if self.held is None:
            return 0
        done, read = 0, hashlib.sha256()
        for row in islice(rows, len(self.held.windows)):
            read.update(row.numpy().tobytes())
            done += 1
        if done < len(self.held.windows) or read.hexdigest() != self.held.identity.get("corpus"):
            raise FormatError(
                f"{self.path.name if self.path else ''} is of another corpus", hint="give a new file, or the same texts"
            )
        self.sums = Sums.of(self.held, read)
        self.heads = HeadNames(self.held.layers, self.held.numbers, self.held.sites)
        self.kv_heads = self.held.kv_heads
        return done

    def _batches(self, rows: Iterator[Tensor]) -> Iterator[Tensor]:
        while several := list(islice(rows, self.batch)):
            yield torch.stack(several)

    def _add(self, ids: Tensor, heads: HeadNames, kv_heads: tuple[int, ...], found: list[Any]) -> None:
        if self.sums is None or self.heads is None:
            self.heads, self.kv_heads = heads, kv_heads
            self.sums = Sums(len(heads.layers), self.length, self.examples)
        rows = Rows.of(ids, self.text, self.sinks, self.recent, self.unknown)
        self.sums = self.sums.after(rows, found, self._words(ids))

    def _words(self, ids: Tensor) -> Words:
        if self.wb.tokenizer is None:
            return Words([[str(i) for i in row] for row in ids.tolist()])
        for i in ids.unique().tolist():
            if i not in self._pieces:
                self._pieces[i] = visible(piece(self.wb.tokenizer, i))
        return Words([[self._pieces[i] for i in row] for row in ids.tolist()])

    def so_far(self) -> CorpusAtlas | None:
        """The atlas of what is done; None where nothing is."""
        if self.sums is None or self.heads is None or not self.sums.done:
            return None
        made = CorpusAtlas(
            layers=self.heads.layers, numbers=self.heads.numbers, sites=self.heads.sites, kv_heads=self.kv_heads,
            windows=self.sums.whole(), entropies=self.sums.entropies, distances=self.sums.distances,
            entropy_range=self.sums.entropy_range,
            copying=torch.full((len(self.heads.layers),), torch.nan, dtype=torch.float64),
            totals=self.sums.totals, weights=self.sums.weights, places=self.sums.places,
            texts=tuple(map(tuple, self.sums.texts)), example_ids=self.sums.ids,
            length=self.length, n_tokens=self.sums.done * (self.text.stop - self.text.start),
            n_unknown=self.sums.unknown, sinks=self.sinks,
            recent=self.recent, identity=self.identity | {"corpus": self.sums.corpus.hexdigest()}, complete=False,
            provenance=self.wb.provenance(),
        )  # fmt: skip
        return self.sums.in_order(made)

    def save(self) -> CorpusAtlas | None:
        """Write down what is done, if there is a file."""
        made = self.so_far()
        if made is not None and self.path is not None:
            made.save(self.path)
        self._saved = time.monotonic()
        return made

    def finished(self) -> CorpusAtlas:
        """The whole atlas."""
        made = self.so_far()
        assert made is not None
        copying, note = self._copying(made)
        made = replace(made, copying=copying, complete=True, provenance=made.provenance | note)
        if self.path is not None:
            made.save(self.path)
        return made

    def _copying(self, made: CorpusAtlas) -> tuple[Tensor, dict[str, str]]:
        """[head] copying scores, and why there are none."""
        try:
            found = ov_copying(self.wb)
        except WorkbenchError as error:
            return made.copying, {"copying_note": f"not known: {error.message}"}
        known = {(site, head): float(s) for site, head, s in zip(found.sites, found.numbers, found.scores, strict=True)}
        each = [known.get(one, torch.nan) for one in zip(made.sites, made.numbers, strict=True)]
        return torch.tensor(each, dtype=torch.float64), {}


def _seen(
    wb: Workbench, names: list[str], text: slice, sinks: int, recent: int, unknown: int | None, ids: Tensor
) -> tuple[HeadNames, tuple[int, ...], list[Any]]:
    """Of windows [window, token]: the heads, the kv head of each, and what was measured at each site."""
    inputs = {"input_ids": ids.to(device_for_inputs(wb.model)), **without_cache(wb.model)}
    with torch.inference_mode(mode=False), torch.no_grad():
        with wb.capture(STATISTICS, names, limit=None) as cap:
            wb.model(**inputs)
        seen = [site for site in cap if site.site.call == 0]
        rows = Rows.of(ids, text, sinks, recent, unknown)
        kv = tuple(head * site.pattern.n_kv_heads // site.shape[1] for site in seen for head in range(site.shape[1]))
        return HeadNames.of(seen), kv, [measure(site, rows) for site in seen]
