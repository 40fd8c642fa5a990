"""A `Workbench` on a model, which captures and verifies its attention; `attaching` makes it."""

from __future__ import annotations

import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from workbench.capture.capture import Capture
from workbench.capture.settings import Settings
from workbench.capture.store.writing import StoreWriter, open_writer
from workbench.counting import count
from workbench.errors import AttachError, CaptureError, expect
from workbench.hooks.compiled.doors import Doors, eager_door
from workbench.hooks.compiled.regions import check_not_compiled, find_regions, uncompiled
from workbench.hooks.heads import parse_heads
from workbench.hooks.layouts import Layouts
from workbench.hooks.sites import Sites
from workbench.inputs import (
    check_inputs,
    check_text,
    device_for_inputs,
    dropout_in_training,
    to_ids,
    with_own_positions,
)
from workbench.kernels.checks import deferred
from workbench.kernels.patterns import DENSE_LIMIT
from workbench.kernels.statistics import check_names
from workbench.session.choosing import SiteChoice, choose
from workbench.session.compiled_models import check_gradients, whose_bits
from workbench.session.interventions import Interventions
from workbench.session.looking import LIMIT, look_at, nominated, unlooked
from workbench.session.open_contexts import OpenContexts
from workbench.session.recorder import Recorder
from workbench.session.row_watch import RowWatch, Step
from workbench.session.verification import Verification, verify_model
from workbench.session.what_fired import check_fired, readable, with_idle
from workbench.storage.provenance import describe
from workbench.storage.weights import WeightsThen, latest_hash
from workbench.tokens import piece

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Workbench]] = weakref.WeakKeyDictionary()


def attached_to(model: nn.Module) -> Workbench | None:
    """The workbench that is attached to a model, not compiled; None if there is none."""
    other = _attached.get(model)
    return None if other is None else other()


class Workbench(Interventions):
    """A model under observation. Made by `attach`; a context manager that detaches at its end.

    Attributes:
        model, tokenizer: what was attached; where a compiled model runs uncompiled, the model as it was before.
        sites: where the model mixes tokens; prints as a table. `sites.unread` lists what mixes tokens and is no site.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, sites: Sites, layouts: Layouts, *, eager: bool = False
    ) -> None:
        inner = uncompiled(model)
        self._doors = Doors(find_regions(model, inside=True) if eager else (), eager_door)
        self._leave = weakref.finalize(self, self._doors.close)
        self.model, self.tokenizer = inner if eager else model, tokenizer
        self.sites = Sites(sites, nominated(inner, sites), looked=False)
        self._inner, self._layouts = inner, layouts
        self._open = True
        self._contexts = OpenContexts(inner, layouts, lambda: find_regions(model))
        self._warned = False
        _attached[inner] = weakref.ref(self)
        self._doors.open()

    def detach(self) -> None:
        """Let go of the model; nothing of ours is left on it, whatever was interrupted. It may be called twice."""
        self._open = False
        self._contexts.close()
        self._leave()
        _attached.pop(self._inner, None)

    def __enter__(self) -> Workbench:
        self.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def stated_layout(self) -> dict[str, str]:
        """By site, what `attach` was told of its axes."""
        return dict(self._layouts.stated)

    def check_open(self) -> None:
        """Raise an AttachError if the workbench is detached."""
        if not self._open:
            raise AttachError("this Workbench is detached", hint="call workbench.attach(model) again")

    @contextmanager
    def capture(
        self,
        statistics: Sequence[str] = ("entropy", "received"),
        sites: SiteChoice = None,
        *,
        z: bool = False,
        pattern: bool = False,
        queries_keys: bool = True,
        values: bool = False,
        gradients: bool = False,
        tokens: Any = None,
        sink_keys: Sequence[int] | None = None,
        n_top: int = 8,
        block: int = 16,
        limit: int | None = DENSE_LIMIT,
        store: str | Path | None = None,
        keep_on: Literal["device", "host"] = "device",
    ) -> Iterator[Capture]:
        """Capture the attention of every forward inside the `with`; the model's outputs stay the same to the bit.

        Args:
            statistics: names from `workbench.kernels.statistics.STATISTICS`, also as `value_weighted_<name>`.
            sites: names, TransformerLens names, indices, Sites or a test on a Site; None for all.
            z: keep each head's output [batch, query, head, d_head], which `cap[site].result()` is made from.
            pattern: keep dense patterns [batch, head, query, key].
            queries_keys: keep queries and keys, so that `cap[site].pattern` can give any part of the pattern later.
            values: keep values too, for value-weighted statistics later.
            gradients: keep ∂L/∂z as `z_gradient` [batch, query, head, d_head], and sums of A∘∂L/∂A (attention times
                gradient) as `query_gradient`, `key_gradient`, `key_gradient_magnitude`, `head_gradient`; see
                `workbench.kernels.gradients.GRADIENT_SUMS`. Call `loss.backward()` inside the `with`: they are there
                after it, and a further backward adds to them. L is the tensor that backward was called on.
            tokens: ids [batch, position] for `induction`; by default those the model is called with.
            sink_keys: keys whose joint mass is `sink`; by default the first visible key of each row.
            n_top: number of `top_keys`. block: edge of `pooled_*` blocks, in tokens.
            limit: most bytes to keep, 1 GiB by default; None for no limit. With a store: in memory, of the forwards
                under way.
            store: a folder, such as "runs/a.zarr", that each forward is written to as soon as it is over, and read from
                when it is asked for, so that captures may be larger than memory. A store that is there is gone on
                with. `workbench.load_capture` opens it, also while it grows; see `docs/scale.md`.
            keep_on: where queries, keys, masks and values are kept of a model on a device: there, by reference where
                nothing else would be held by it, or in the "host"'s memory, pinned, to which they are copied while the
                device goes on. Patterns are then computed on the host; they are there at the end of the `with`.

        Yields:
            The capture; it is filled as the model runs and complete at the end of the `with`.

        Raises:
            CaptureError: unknown statistic or site, limit exceeded, bad input, captures nested, nothing fired, or
                gradients that were asked for did not arrive; a store of another model or with other settings.
            FileError: the store cannot be written; what was finished before is in it.
            FormatError: what stands there is no store, or of another version.
        """
        self.check_open()
        if gradients:
            check_gradients(self.model)
        if keep_on not in ("device", "host"):
            raise CaptureError(f'keep_on is "device" or "host", not {keep_on!r}')
        settings = Settings(
            statistics=check_names(statistics),
            sites=choose(self.sites, sites),
            z=z,
            pattern=pattern,
            queries_keys=queries_keys,
            values=values,
            gradients=gradients,
            tokens=None if tokens is None else to_ids(tokens),
            sink_keys=None if sink_keys is None else tuple(sink_keys),
            n_top=n_top,
            block=block,
            limit=limit,
            keep_on=keep_on,
        )
        self._warn_of_dropout()
        weights = WeightsThen(self._inner)
        provenance = describe(self._inner, self.tokenizer) | {"statistics": list(settings.statistics)}
        with nullcontext() if store is None else self._storing(store, settings, provenance) as writer:
            decode = self._decode if self.tokenizer is not None else None
            recorder = Recorder(model=self._inner, sites=self.sites, settings=settings, decode=decode, store=writer)
            capture = Capture(recorder.forwards, self.sites, provenance, weights, settings, recorder.unrecorded)
            try:
                with deferred(recorder.pending), self._contexts.recording(recorder):
                    yield capture
            finally:
                try:
                    recorder.finish()
                finally:
                    recorder.gradients.close()
                told = readable(self._inner, self._layouts, recorder.sites)
                told = with_idle(self._inner, told, recorder.idle, {*recorder.called, *recorder.unrecorded})
                self.sites = capture.model_sites = told
                how = {"statistics_engine": ", ".join(sorted(recorder.engines))}
                how |= {"statistics_cost": "; ".join(recorder.costs)} if recorder.costs else {}
                how |= whose_bits(recorder.compiled, eager=self._doors.are_open)
                provenance |= how
                if writer is not None:
                    writer.say(self.sites, list(recorder.unrecorded.values()), how)
        if recorder.failure is not None:
            raise recorder.failure
        recorder.pending.check()
        check_fired(self._inner, self.sites, capture, settings, recorder.refused)
        recorder.gradients.check(all_must_arrive=settings.sites is not None)

    def _storing(
        self, store: str | Path, settings: Settings, provenance: dict[str, Any]
    ) -> AbstractContextManager[StoreWriter]:
        """The store, to be added to; it is of these weights."""
        provenance |= {"weights_sha256": self.weights_hash()}
        identity = {
            name: provenance.get(name) for name in ("model_class", "weights_sha256", "tokenizer_sha256", "dtype")
        }
        return open_writer(store, settings, provenance, identity)

    @contextmanager
    def watch_rows(self, heads: Any, tell: Callable[[Step], object]) -> Iterator[None]:
        """Tell what chosen heads look at, as the model runs: at each forward inside the `with`, such as each step of
        `generate()`, the weights of its last query. Nothing is kept, and the model's outputs stay the same to the bit.

        Args:
            heads: as in `ablate`: (layer, head), "L9H6", or several.
            tell: is given a `Step` when a forward is over: `step.rows["L9H6"]` is [batch, key]. Of packed rows, and of
                continuous batches, one for each sequence. What it raises leaves through the model's forward; in threads
                that did not open the `with` it is logged.

        Models that call their attention through Hugging Face's registry carry, from their second forward on, hooks on
        the chosen heads' modules and what these are parts of, and nothing else is watched.

        Raises:
            InterventionError: no such head. CaptureError: no call of a chosen head was seen, or one cannot be told.

        >>> import torch
        >>> import workbench
        >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> with workbench.attach(model) as wb, wb.watch_rows("L0H2", lambda step: print(step.rows["L0H2"].shape)):
        ...     _ = model(torch.randn(2, 5, 16))
        torch.Size([2, 5])
        """
        self.check_ready()
        watch = RowWatch(self._inner, self.sites, parse_heads(self.sites, heads), tell, self._contexts.checked)
        with self._contexts.watching(watch):
            yield
        watch.finish()

    def look(self, *args: Any, limit: int = LIMIT, **inputs: Any) -> Sites:
        """Look at every module while the model runs on these inputs: `sites.unread` is complete after it.

        Modules are run again one by one with one position of their inputs changed, while all that is read gives what it
        gave: 7 forwards' time for most models (11 for images), up to 40 for some. Inputs of 16 or more positions in
        several examples say most; sizes that are all different tell axes apart. `verify` looks too.

        Args:
            limit: most bytes of activations that are kept meanwhile.

        Returns:
            The sites.

        Raises:
            CaptureError: the limit is exceeded, or the workbench is capturing.
        """
        self.check_open()
        if self._contexts.any:
            raise CaptureError("this Workbench is capturing or editing", hint="look before or after it")
        check_not_compiled(self.model)
        check_inputs(self.model, args, inputs)
        self.sites = look_at(self.model, self.sites, self._layouts, args, inputs, limit)
        return self.sites

    def _warn_of_dropout(self) -> None:
        dropping = dropout_in_training(self.model)
        if dropping and not self._warned:
            self._warned = True
            warnings.warn(
                f"the model is in train mode and drops out at {len(dropping)} modules ({', '.join(dropping[:3])} …); "
                "patterns are those before dropout. Call model.eval() for the usual analysis.",
                UserWarning,
                stacklevel=4,
            )

    def verify(self, *args: Any, **inputs: Any) -> Verification:
        """Check that the taps tell the truth: run the model bare, observed, and with each site in turn switched off.

        Every site must fire, the observed outputs must be the same to the bit, rows must sum to 1, A·V must equal what
        the kernel gave, and switching off a site's heads must change the model's output, or at least be seen by its
        gradient: such sites are `idle`.

        Returns:
            A report with `.ok`, `.table` and `.raise_if_failed()`.
        """
        self.check_open()
        if self._contexts.capturing:
            raise CaptureError("this Workbench is capturing", hint="verify before or after the capture")
        check_not_compiled(self.model)
        check_inputs(self.model, args, inputs)
        try:
            self.sites = look_at(self.model, self.sites, self._layouts, args, inputs)
        except CaptureError as error:  # the sites can be verified all the same
            self.sites = unlooked(self.sites, error)
        return verify_model(self.model, self.sites, self._layouts, args, inputs)

    def estimate(
        self,
        batch: int,
        queries: int,
        keys: int | None = None,
        statistics: Sequence[str] = ("entropy", "received"),
        *,
        where: Literal["all", "device"] = "all",
        **keep: Any,
    ) -> int:
        """Bytes that one forward of this size would keep, masks aside; the model may be on the "meta" device.

        Args:
            where: of all, or only those that stay on the model's device: with `keep_on="host"` the statistics, z and
                dense patterns.
            keep: as in `capture` (z, pattern, queries_keys, values, keep_on).

        Raises:
            CaptureError: sizes of a site are not known before the model has run once.
        """
        settings = Settings(statistics=check_names(statistics), **keep)
        if where == "device":
            settings = settings.on_device
        total = 0
        for site in self.sites:
            if site.n_heads is None or site.n_kv_heads is None or site.d_head is None:
                raise CaptureError(
                    "the sizes of a site are not known yet", site=site.name, hint="run one small capture"
                )
            shape = (batch, site.n_heads, queries, queries if keys is None else keys)
            total += settings.bytes_for(shape, site.n_kv_heads, site.d_head, self._itemsize())
        return total

    def _itemsize(self) -> int:
        return next((p.element_size() for p in self.model.parameters()), 4)

    def tokenize(self, text: str | Sequence[str]) -> dict[str, Tensor]:
        """Model inputs for a text or several, on the model's device; padded where the tokenizer pads, on the left with
        `position_ids` that each text has alone.

        Raises:
            CaptureError: no tokenizer was attached, or a text is empty or too long for the model.
        """
        if self.tokenizer is None:
            raise CaptureError("no tokenizer is attached", hint="attach(model, tokenizer), or pass ids yourself")
        several = not isinstance(text, str)
        expect(Iterable, text=text)
        texts = [check_text(one) for one in ([text] if isinstance(text, str) else text)]
        encoded = dict(self.tokenizer(texts, return_tensors="pt", padding=several))
        device = device_for_inputs(self.model)
        inputs = {name: value.long().to(device) for name, value in encoded.items()}
        inputs = with_own_positions(self.model, inputs)
        check_inputs(self.model, (), inputs)
        return inputs

    def _decode(self, ids: Tensor) -> list[list[str]]:
        known: dict[int, str] = {}
        for i in ids.unique().tolist():
            known[i] = piece(self.tokenizer, i)
        return [[known[i] for i in row] for row in ids.tolist()]

    def provenance(self) -> dict[str, Any]:
        """What a result says of the model and of the software that ran it, with the weights' hash: plain values."""
        return describe(self._inner, self.tokenizer) | {"weights_sha256": self.weights_hash()}

    def weights_hash(self) -> str | None:
        """SHA-256 over the model's parameters and buffers, computed anew only where they have changed.

        None if some are offloaded to where they cannot be read.
        """
        return latest_hash(self._inner)

    def weights_identity(self) -> str:
        """What is the same for the same weights only: their hash, or where there is none what is never the same."""
        return self.weights_hash() or f"unread {uuid.uuid4().hex}"

    def __repr__(self) -> str:
        state = "" if self._open else ", detached"
        heads = sum(site.n_heads or 0 for site in self.sites)
        return (
            f"Workbench({type(self._inner).__name__}: {count(len(self.sites), 'site')}, {count(heads, 'head')}{state})"
        )
