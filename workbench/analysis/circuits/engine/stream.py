"""Runs a model as residual streams: their senders and receivers can be read and changed, side by side and in part.

This is the one engine of the circuits. It uses plain hooks on the modules that `anatomy` found, so attention stays on
its kernel, and the sweep's prefix, so that a forward begins at the first layer that is changed. It is not the sweep's
own runner because what is put into a model here belongs to single batches, and comes from an earlier forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.engine.module_hooks import Hook, on_columns, on_heads, on_input, on_output, on_sum
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.shortcut import only_where_changed
from workbench.analysis.circuits.model.anatomy import Anatomy, find_anatomy
from workbench.analysis.circuits.model.modules import Branches
from workbench.analysis.circuits.model.recording import first_float
from workbench.errors import InterventionError, WorkbenchError
from workbench.hooks.changes import Changes
from workbench.hooks.split_models import check_unsplit
from workbench.inputs import check_inputs, dropout_in_training, shortened
from workbench.session.workbench import Workbench
from workbench.sweep.prefix import KeptBlocks, Prefix, exchanged, resumes_wrongly, starts_to_try
from workbench.sweep.variants import repeat

_SEVERAL = 3  # repeats from which on it is worth computing again what projections gave on the batch itself
# What a hook sees, and may give anew. In layer i, and in stream s (0, or 0 and 1: the encoder's and the decoder's):
# ("input", s)          [batch, position, d_model] what the first block reads
# ("resid", i)          the same, what the block of layer i reads: resid_pre, and resid_post of the block before it
# ("read", i)           the same, what the queries of layer i read (and, but for cross-attention, keys and values); to
#                       look at only
# ("read_mlp", i)       what its MLP reads; to look at only
# ("q" | "k" | "v", i)  [batch, position, head or group, width]
# ("x", i)              [batch, position, d_model] what a mixer is given, behind its norm, for all its heads
# ("z", i)              [batch, position, head, width] what heads give to their projection
# ("attn", i)           [batch, position, d_model] what the attention adds, its bias and a norm behind it included
# ("mid", i)            the stream behind the attention, as the sum of what is there and what it writes
# ("mlp_in", i)         what the MLP itself is given, behind its norm
# ("mlp", i)            what it writes
# ("final", s)          the stream after the last block; what the keys and values of cross-attention read
Key = tuple[str, int]
Hooks = Mapping[Key, Sequence[Hook]]
Finder = Callable[[Workbench, Mapping[str, Any]], Anatomy]


class Stream:
    """An attached model with its anatomy.

    Attributes:
        anatomy, graph: what was found. end: key of the stream that goes to the logits, at its end.
        resumed: whether forwards can begin at a later block, to the bit; None until it was tried.
    """

    def __init__(self, wb: Workbench, pair: Pair, finder: Finder = find_anatomy) -> None:
        wb.check_ready()
        wb.check_idle()
        check_unsplit()
        dropping = dropout_in_training(wb.model)
        if dropping:
            raise InterventionError(
                f"the model drops out at {len(dropping)} modules ({dropping[0]} …)", hint="call model.eval()"
            )
        check_inputs(wb.model, (), pair.clean)
        self.wb, self.model = wb, wb.model
        self.extra = _extra(wb.model)
        self._small = {**self.extra, **shortened(pair.clean)}
        self.anatomy = finder(wb, self._small)
        self.graph = self.anatomy.graph
        self.end = ("final", len(self.graph.streams) - 1)
        self.resumed: bool | None = None
        self.blocks = [layer.block for layer in self.anatomy.branches]
        self._last_output: Any = None  # of the last block: how it hands on the stream
        self._prefix: Prefix | None = None
        self._recorded: tuple[Any, Kept] | None = None  # the batch that later runs resume from, and what it showed

    @contextmanager
    def open(self) -> Iterator[Stream]:
        """Blocks can be skipped inside."""
        prefix = Prefix(self.model, self.wb.sites)
        with prefix.open():
            self._prefix = prefix
            try:
                yield self
            finally:
                self._prefix = self._recorded = None

    def record(
        self, batch: Mapping[str, Tensor], last: Tensor, hooks: Hooks | None = None, *, resume: bool = True
    ) -> tuple[Tensor, Kept]:
        """Logits at the last token [batch, vocab], and what senders wrote and receivers read.

        Args:
            batch: model inputs. last, hooks: as in `run`.
            resume: later runs of this batch may resume from this one.
        """
        kept = Kept()
        seen: dict[Key, list[Hook]] = {key: list(several) for key, several in (hooks or {}).items()}
        for key, hook in self.keeping(kept).items():
            seen.setdefault(key, []).append(hook)
        recording = self._prefix.recording(last.shape[0]) if self._prefix is not None and resume else nullcontext()
        with Changes() as changes, recording:
            changes.after(self.anatomy.modules[self.blocks[-1]], self._saw_last)
            kept.logits = self.run(batch, last, seen)
        if self._prefix is not None and resume:
            self._recorded = batch, kept
        return kept.logits, kept

    @property
    def recorded(self) -> Recorded:
        """The batch that later runs resume from, to go back to when others have been recorded.

        Raises:
            WorkbenchError: none was recorded.
        """
        if self._prefix is None or self._recorded is None:
            raise WorkbenchError("no batch was recorded that runs could resume from")
        return Recorded(*self._recorded, self._prefix.kept)

    def go_back(self, recorded: Recorded) -> None:
        """From here on runs resume from this batch again."""
        if self._prefix is None:
            raise WorkbenchError("the stream is closed")
        self._prefix.kept = recorded.prefix
        self._recorded = recorded.batch, recorded.kept

    def keeping(self, kept: Kept) -> dict[Key, Hook]:
        """Hooks that keep what senders write and receivers read."""
        keys: list[Key] = [(what, s) for s in range(len(self.graph.streams)) for what in ("input", "final")]
        for i, layer in enumerate(self.anatomy.layers):
            keys += [("read", i), ("z", i), *([("read_mlp", i), ("mlp", i)] if layer.mlp else [])]
        return {key: kept.keep(key) for key in keys}

    def _saw_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last_output = None if isinstance(output, Tensor) else output

    def run(
        self, batch: Mapping[str, Tensor], last: Tensor, hooks: Hooks | None = None, *, times: int = 1, start: int = 0
    ) -> Tensor:
        """Logits at the last token [times · batch, vocab] of a forward with these hooks.

        Args:
            batch: model inputs.
            last: [batch] index of each last token, or [batch, n] of n tokens: logits are [times · batch, n, vocab].
            times: how many repeats of the batch run side by side.
            start: the first layer that a hook changes; those before it are not run again where that is possible.

        Where the batch was recorded, MLPs and projections run only at positions that have changed.
        """
        if start > 0 and self.resumed is None and self._prefix is not None:
            self._try_resuming(batch, last)
        size = last.shape[0]
        inputs = {name: repeat(value, times, size) for name, value in {**self.extra, **batch}.items()}
        prefix = self._prefix if self.resumed and start > 0 else None
        with Changes() as changes:
            if hooks and self._recorded is not None and self._recorded[0] is batch and not torch.is_grad_enabled():
                self._skip_unchanged(changes, self._recorded[1], start, times)
            self._register(changes, hooks or {})
            where = last.repeat(times, *[1] * (last.dim() - 1))
            self._last_only(changes, where)
            with nullcontext() if prefix is None else prefix.resuming(self.blocks[start], times):
                output = self.model(**inputs)
        logits = output if isinstance(output, Tensor) else output.logits
        places = where.view(len(where), -1)
        if self.anatomy.head is None or logits.shape[1] != places.shape[1]:
            logits = logits[torch.arange(len(where), device=logits.device)[:, None], places]
        return logits[:, 0] if last.dim() == 1 else logits

    def _try_resuming(self, batch: Mapping[str, Tensor], last: Tensor) -> None:
        """Find out, on a batch that was recorded, whether a forward that begins later gives the same numbers."""
        self.resumed = True
        with torch.no_grad():
            whole = self.run(batch, last)
            first = [self.blocks.index(self.anatomy.blocks(s)[-1]) for s in range(len(self.graph.streams))]
            # From the end on: what a later start leaves behind, an earlier one does not read.
            self.resumed = not resumes_wrongly(
                lambda: self.run(exchanged(batch, len(last)), last),
                lambda start: torch.equal(whole, self.run(batch, last, start=start)),
                sorted({*first, *starts_to_try(range(len(self.blocks)))} - {0}, reverse=True),
            )

    def unembed(self, stream: Tensor) -> Tensor:
        """Logits [n, vocab] of vectors of the stream after the last block [n, d_model], by the model's own last part.

        The model runs on one token each, and its blocks are passed over.
        """
        inputs, blocks = self._one_token(stream), self.anatomy.blocks(self.end[1])
        with Changes() as changes:
            for block in blocks:
                passing = self._passing(stream[:, None] if block == blocks[-1] else None)
                changes.forward(self.anatomy.modules[block], passing)
            output = self.model(**inputs, **self.extra)
        logits = output if isinstance(output, Tensor) else output.logits
        return logits[:, 0]

    def _one_token(self, stream: Tensor) -> dict[str, Any]:
        """Inputs of one token for each vector of the stream, without work for an encoder where that is possible."""
        n = stream.shape[0]
        ids = torch.zeros(n, 1, dtype=torch.long, device=stream.device)
        if self.end[1] == 0:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "encoder_outputs" in inspect.signature(self.model.forward).parameters:
            return {"encoder_outputs": (stream.new_zeros(n, 1, self.graph.d_model),), "decoder_input_ids": ids}
        return {**repeat(self._small, n, 1), "decoder_input_ids": ids}

    def _passing(self, given: Tensor | None) -> Callable[..., Any]:
        """A block's forward that hands on its input, or `given`, as the last block does."""
        like = self._last_output

        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = first_float((*args, *kwargs.values())) if given is None else given
            if like is None:
                return stream
            seen = first_float(like)
            return type(like)(stream if value is seen else value for value in like)

        return forward

    def _skip_unchanged(self, changes: Changes, clean: Kept, start: int, times: int) -> None:
        anatomy = self.anatomy
        for i, layer in enumerate(anatomy.layers):
            if i < start:
                continue
            if layer.mlp is not None:
                given = anatomy.function(layer.mlp_norm)(clean["read_mlp", i])
                modules = [anatomy.modules[name] for name in layer.mlp]
                only_where_changed(changes, modules, given, clean["mlp", i])
            if times < _SEVERAL:
                continue
            for name, part in {each.name: part for part, each in layer.projections.items()}.items():
                given = anatomy.function(layer.projections[part].norm)(clean[anatomy.read_at(i, part)])
                only_where_changed(changes, [anatomy.modules[name]], given)
            only_where_changed(changes, [layer.out_module], clean["z", i].flatten(-2))

    def _last_only(self, changes: Changes, last: Tensor) -> None:
        """The head is given the last tokens alone: the logits of all others are the largest tensor of a forward.

        Args:
            last: [batch], or [batch, n].
        """
        head = self.anatomy.head
        if head is None:
            return
        rows, places = torch.arange(len(last), device=last.device)[:, None], last.view(len(last), -1)

        def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0][rows, places], *args[1:])

        changes.before(self.anatomy.modules[head], cut)

    def _register(self, changes: Changes, hooks: Hooks) -> None:
        for (what, i), functions in hooks.items():
            if functions:
                self._hook(changes, what, i, list(functions))

    def _reader(self, i: int) -> nn.Module:
        return self.anatomy.modules[self.anatomy.layers[i].reader]

    def _hook(self, changes: Changes, what: str, i: int, functions: list[Hook]) -> None:
        anatomy = self.anatomy
        if what in ("input", "final"):
            blocks = anatomy.blocks(i)
            if what == "input":
                on_input(changes, anatomy.modules[blocks[0]], functions)
            else:
                on_output(changes, anatomy.modules[blocks[-1]], functions)
            return
        branch = anatomy.branches[i]
        if what == "resid":
            on_input(changes, anatomy.modules[branch.block], functions)
            return
        if what == "mid":
            own = [each for each in anatomy.branches[: i + 1] if each.block == branch.block]
            writers = [(anatomy.modules[each.out], each.factor) for each in own]
            on_sum(changes, anatomy.modules[branch.block], writers, functions)
            return
        if what in ("attn", "mlp"):
            name = branch.out if what == "attn" else _mlp(branch)[-1]
            on_output(changes, anatomy.modules[name], functions)
            return
        layer = anatomy.layers[i]
        if what == "read":
            on_input(changes, self._reader(i), functions, first_only=True)
        elif what == "read_mlp":
            on_input(changes, anatomy.modules[layer.mlp_norm or _mlp(layer)[0]], functions, first_only=True)
        elif what == "z":
            on_input(changes, layer.out_module, [on_heads(f, layer.n_heads) for f in functions])
        elif what == "mlp_in":
            on_input(changes, anatomy.modules[_mlp(layer)[0]], functions)
        elif what == "x" and layer.mixer is not None:
            on_input(changes, anatomy.modules[layer.mixer], functions)
        else:
            part = layer.projections[what]
            on_output(changes, part.module, [on_columns(f, part) for f in functions])


class Kept:
    """What one forward of a batch showed, by key (see the top of this file), and its logits [batch, vocab]."""

    logits: Tensor

    def __init__(self) -> None:
        self.tensors: dict[Key, Tensor] = {}

    def keep(self, key: Key) -> Hook:
        """A hook that keeps what it sees."""

        def hook(tensor: Tensor) -> None:
            self.tensors[key] = tensor.detach().clone()  # models add to their stream in place

        return hook

    def __getitem__(self, key: Key) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: Key) -> bool:
        return key in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds; of tensors that are broadcast, only those that are there."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Recorded:
    """A batch that runs can resume from: its inputs, what it showed, and what its blocks gave."""

    batch: Mapping[str, Tensor]
    kept: Kept
    prefix: KeptBlocks

    @property
    def nbytes(self) -> int:
        """Bytes of what it showed and of what its blocks gave."""
        return self.kept.nbytes + self.prefix.nbytes


def _mlp(layer: Branches) -> tuple[str, ...]:
    if layer.mlp is None:
        raise WorkbenchError(f"the layer of {layer.site.name} has no MLP")
    return layer.mlp


def _extra(model: nn.Module) -> dict[str, Any]:
    """Keyword inputs that keep a model from collecting keys and values."""
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes else {}
