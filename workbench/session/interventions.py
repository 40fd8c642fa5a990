"""Interventions on a running model: ablate heads, patch them, edit their patterns, steer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.capture.capture import Capture
from workbench.errors import InterventionError
from workbench.hooks.compiled.regions import check_not_compiled
from workbench.hooks.edits import (
    Ablation,
    Edit,
    Factor,
    GateEdit,
    HeadFunction,
    OutputEdit,
    Patch,
    PatternEdit,
    Source,
    Steer,
    SteerOutput,
    Threads,
    zero,
)
from workbench.hooks.heads import each_head, find_block, find_heads, find_module, parse_heads
from workbench.hooks.positions import Positions, Where
from workbench.hooks.sites import Site, Sites
from workbench.session.ablations import find_ablation
from workbench.session.open_contexts import OpenContexts
from workbench.session.reference import Reference


class Interventions:
    """The interventions of a `Workbench`: context managers that change what the model computes, and leave no trace.

    They apply to every forward inside the `with`, nested ones in the order they were entered; a capture sees the edited
    heads whichever was entered first. Heads are given one or several at a time, as `(layer, head)`, `(site, head)`,
    "L9H6", or all query heads of a kv group as "L2KV1" or `KVGroup(layer, group)`. Positions count along the queries of
    each call: None, an int, a slice, ints, or a bool or integer tensor (see `workbench.hooks.positions`).

    All raise InterventionError: bad input; a head that a site does not have; and at the end of the `with`, if no other
    exception is on its way, a site that never fired. A site that is called several times in a forward is edited at
    each of its calls.

    By default an edit acts on the forwards of every thread. On a server that answers several requests at once pass
    `threads="this"`: then it acts only on what the thread that opened it runs, and in asyncio only on the task that
    opened it and those that it has started.
    """

    model: nn.Module
    sites: Sites
    _contexts: OpenContexts

    def check_open(self) -> None:
        """Raise an AttachError if the workbench is detached."""
        raise NotImplementedError

    def check_ready(self) -> None:
        """Raise an error if the model cannot be edited: the workbench is detached, or the model compiled."""
        self.check_open()
        check_not_compiled(self.model)

    def check_idle(self) -> None:
        """Raise an InterventionError if an intervention or a capture is open, for what runs the model on its own."""
        if self._contexts.any:
            raise InterventionError(
                "an intervention or a capture is open", hint="end it first, or give a sweep its edits as base="
            )

    @contextmanager
    def editing(self, *edits: Edit | OutputEdit, threads: Threads = "all", must_fire: bool = True) -> Iterator[None]:
        """Edits of one's own (see `workbench.hooks.edits`) apply to every forward inside the `with`.

        Args:
            edits: in the order in which they apply.
            threads: "this" keeps them to forwards of the thread that opens them.
            must_fire: whether it is an error if a site of theirs was never reached.

        Raises:
            InterventionError: at the end, a site never fired.
        """
        self.check_ready()
        with self._contexts.editing(*edits, threads=threads, must_fire=must_fire):
            yield

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Interventions and captures that are open have no part in the forwards that this thread runs inside."""
        self.check_open()
        with self._contexts.undisturbed():
            yield

    @contextmanager
    def ablate(
        self,
        heads: Any,
        how: str = "zero",
        *,
        reference: Mapping[str, Any] | Iterable[Mapping[str, Any]] | Capture | None = None,
        positions: Where = None,
        seed: int = 0,
        draw: int = 0,
        threads: Threads = "all",
    ) -> Iterator[None]:
        """Replace the output z of heads by what does not depend on the input.

        Args:
            heads: which heads.
            how: "zero"; "mean" of z over the reference's examples and real positions; "mean_positional", over its
                examples for each real position; "resample", z of another reference example of the nearest length for
                each example of the input, aligned on real positions (see `workbench.session.resampling`).
            reference: what the means and examples come from: a dict of model inputs, several (each is run once, without
                gradients, interventions or capture), or a Capture with z=True. Positions that an `attention_mask` (for
                a decoder, `decoder_attention_mask`) of a dict, or the masks of a capture's self-attention, mark as
                padding do not count. A capture does not say which examples it holds, so that none is resampled from it.
            positions: where z is replaced.
            seed, draw: for "resample", choose the examples: an example has several donors, of which all heads take the
                one of number `draw`, the same in every forward. A single draw says little; a sweep and the analyses
                average over all.

        >>> import torch
        >>> import workbench
        >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 5, 16)
        >>> with workbench.attach(model) as wb, wb.ablate({(0, 1), "L0H3"}, "mean", reference={"src": x}):
        ...     y = model(x)
        """
        self.check_ready()
        kind = find_ablation(how)
        chosen = self._heads(heads, positions)
        source: Source = zero
        begin = None
        if kind.needs == "reference":
            if reference is None:
                raise InterventionError(
                    f'how="{how}" needs a reference',
                    hint="reference= is a dict of model inputs, several, or a Capture with z=True",
                )
            found = Reference(chosen, how, seed)
            if isinstance(reference, Capture):
                found.read(reference)
            else:
                found.run(self, reference)
            begin, source = found.begin, getattr(found, how)
            if kind.singles:
                if not 0 <= draw < found.draws:
                    raise InterventionError(f"each example has {found.draws} donors, there is no draw {draw}")
                source = partial(found.resample, draw=draw)
        with self.editing(Ablation(chosen, source, Positions(positions), begin), threads=threads):
            yield

    @contextmanager
    def patch(
        self,
        heads: Mapping[Any, Float[Tensor, "... d_head"] | HeadFunction],
        positions: Where = None,
        *,
        threads: Threads = "all",
    ) -> Iterator[None]:
        """Replace the output z of heads by a tensor, or by what a function makes of it.

        Args:
            heads: for each head a tensor z [batch, position, d_head] of the model's dtype and device, or a function
                `f(z, site, head)` that takes and gives such a tensor. A tensor may be [d_head] or [position, d_head],
                and its batch and position may be 1; they stand for all. The position axis is that of the whole input,
                also where `positions` chooses some of it.
            positions: where z is replaced.

        >>> import torch
        >>> import workbench
        >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> clean, corrupted = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> with workbench.attach(model) as wb:
        ...     with wb.capture(z=True) as cap:
        ...         _ = model(clean)
        ...     with wb.patch({(0, 1): cap[0].z[:, :, 1]}, positions=-1):
        ...         y = model(corrupted)
        """
        self.check_ready()
        if not isinstance(heads, Mapping):
            raise InterventionError(
                f"patch takes a dict, not {type(heads).__name__}", hint="{(layer, head): tensor or function}"
            )
        given: dict[Site, dict[int, Tensor | HeadFunction]] = {}
        for one in each_head(heads):
            what = heads[one]
            if not isinstance(what, Tensor) and not callable(what):
                raise InterventionError(
                    f"the patch of {one!r} is {type(what).__name__}, expected a tensor or a function f(z, site, head)"
                )
            for site, head in find_heads(self.sites, one):
                if head in given.setdefault(site, {}):
                    raise InterventionError(f"head {head} has two patches", site=site.name)
                given[site][head] = what
        _check_positions(given, positions)
        with self.editing(Patch(given, Positions(positions)), threads=threads):
            yield

    @contextmanager
    def set_gate(
        self,
        heads: Any,
        to: float | Float[Tensor, "... position"] | HeadFunction | Capture = 1.0,
        positions: Where = None,
        *,
        threads: Threads = "all",
    ) -> Iterator[None]:
        """Give gates another factor: 1 lets through what they multiply, 0 nothing.

        So can the heads of sites of kind "gate" be set, and those of attention that weighs its heads (`pattern.gates`).
        Gradients flow to what is multiplied, and, where `to` is a function, to the factor that the model made; what
        comes of a kernel of `workbench.kernels` is a constant, as in `edit_pattern`.

        Args:
            heads: which heads; a site, or its name, for all of its heads.
            to: a number; a tensor [batch, position], of which batch may be 1 or left out, and position 1; a function
                `f(g, site, head)` that takes and gives factors [batch, position]; or a capture, of which each head
                takes its mean factor over examples and positions. Tensors are float64 where the model is, else float32.
            positions: where it is set.

        >>> import torch
        >>> import workbench
        >>> from workbench.mechanisms import Place, get
        >>> gate = get("van").build(Place(8, 2, 12, causal=False, grid=(3, 4))).eval()
        >>> x = torch.randn(1, 12, 8)
        >>> with workbench.attach(gate) as wb:
        ...     with wb.capture() as cap:
        ...         y = gate(x)
        ...     with wb.set_gate({(0, 1), (0, 5)}, to=0.0), wb.set_gate((0, 2), to=cap):
        ...         without = gate(x)
        """
        self.check_ready()
        one = isinstance(heads, Site) or any(heads in (site.name, *site.aliases) for site in self.sites)
        chosen = self._heads([(heads, head) for head in self._all_heads(heads)] if one else heads, positions)
        if not isinstance(to, (int, float, Tensor, Capture)) and not callable(to):
            raise InterventionError(
                f"a gate is set to {type(to).__name__}",
                hint="a number, a tensor, a function f(g, site, head), a Capture",
            )
        if isinstance(to, (int, float)) and not math.isfinite(to):
            raise InterventionError(f"a gate is set to {to}, which is not finite")
        given: dict[Site, dict[int, Factor]] = {}
        for site, numbers in chosen.items():
            means = _mean_factors(to, site) if isinstance(to, Capture) else None
            if means is not None and max(numbers) >= len(means):
                raise InterventionError(
                    f"the capture has {len(means)} heads, no head {max(numbers)}: it is of another model",
                    site=site.name,
                )
            for head in numbers:
                factor = float(to) if isinstance(to, (int, float)) else to
                given.setdefault(site, {})[head] = factor if means is None else float(means[head])  # type: ignore[assignment]
        with self.editing(GateEdit(given, Positions(positions)), threads=threads):
            yield

    @contextmanager
    def edit_pattern(
        self, heads: Any, edit: HeadFunction, queries: Where = None, *, threads: Threads = "all"
    ) -> Iterator[None]:
        """Let heads read their values through other rows of their pattern.

        Only the chosen rows of the chosen heads are computed anew, as rows' · V; all else is what the fast kernel gave,
        to the bit. Gradients flow to V through the new rows, and to queries and keys (and biases) through the rows that
        `edit` is given: those of every softmax, and those that a model wrote out. Rows of the other kernels of
        `workbench.kernels` are constants to it. In training the new rows are dropped out as the kernel drops its own.
        A capture sees the heads' new output, while its pattern stays the one that queries and keys make.

        Args:
            heads: which heads.
            edit: `edit(rows, site, head)` takes rows [batch, query, key] of one head, in float64 for float64 queries
                and else in float32, and gives rows of the same shape and dtype; they need not sum to one. Of nested
                edits the inner one is given the rows that the outer one made.
            queries: the rows to edit; as many for each example.

        >>> import torch
        >>> import workbench
        >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> with workbench.attach(model) as wb, wb.edit_pattern("L0H1", lambda rows, site, head: rows.roll(1, -1)):
        ...     y = model(torch.randn(2, 5, 16))
        """
        self.check_ready()
        if not callable(edit):
            raise InterventionError(f"edit is {type(edit).__name__}, expected a function edit(rows, site, head)")
        chosen = self._heads(heads, queries)
        with self.editing(PatternEdit(chosen, edit, Positions(queries)), threads=threads):
            yield

    @contextmanager
    def steer(
        self,
        where: Any,
        direction: Float[Tensor, " width"],
        scale: float = 1.0,
        positions: Where = None,
        *,
        threads: Threads = "all",
    ) -> Iterator[None]:
        """Add a direction to the output of heads, of a module, or to the residual stream.

        Args:
            where: one or several heads; or the path, site or alias of a module, of whose output (if it is a tuple, its
                first tensor) [batch, position, d_model] is steered; or `("resid", 3)`, the output of block 3.
            direction: [d_head] for heads, [d_model] for modules, in the model's dtype and on its device. Gradients flow
                to it.
            scale: factor on the direction.
            positions: where it is added.

        >>> import torch
        >>> import workbench
        >>> model = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> with workbench.attach(model) as wb, wb.steer("self_attn", torch.ones(16), scale=2.0, positions=-1):
        ...     y = model(torch.randn(2, 5, 16))
        """
        self.check_ready()
        if not isinstance(direction, Tensor) or direction.dim() != 1 or not direction.is_floating_point():
            got = list(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
            raise InterventionError(f"the direction is {got}, expected a floating-point tensor [width]")
        if direction.layout != torch.strided or direction.is_meta:
            kept = "on meta" if direction.is_meta else f"laid out as {direction.layout}"
            raise InterventionError(f"the direction is {kept}", hint="make it dense, on the model's device")
        if not isinstance(scale, (int, float)):
            raise InterventionError(f"scale is a number, not {scale!r}")
        if not bool(direction.detach().isfinite().all()) or not math.isfinite(scale):
            raise InterventionError(f"the direction or its scale {scale} is not finite")
        moved, at = direction * scale, Positions(positions)
        edit: Edit | OutputEdit
        if isinstance(where, tuple) and len(where) == 2 and where[0] == "resid":
            edit = SteerOutput(find_block(self.model, self.sites, where[1]), moved, at)
        elif isinstance(where, Site) or (isinstance(where, str) and self._is_module(where)):
            edit = SteerOutput(find_module(self.model, self.sites, where), moved, at)
        else:
            edit = Steer(self._heads(where, positions), moved, at)
        with self.editing(edit, threads=threads):
            yield

    def _is_module(self, where: str) -> bool:
        """Whether a string names a module rather than a head; what names neither is reported as a module."""
        try:
            parse_heads(self.sites, where)
        except InterventionError:
            return not where.startswith("L") or where in dict(self.model.named_modules())
        return False

    def _all_heads(self, where: str | Site) -> range:
        site = self.sites.find(where if isinstance(where, str) else where.name)
        if site.n_heads is None:
            raise InterventionError(
                "how many heads the site has is not known yet", site=site.name, hint="run one small capture first"
            )
        return range(site.n_heads)

    def _heads(self, heads: Any, positions: Where) -> dict[Site, list[int]]:
        found = {self.sites.find(name): chosen for name, chosen in parse_heads(self.sites, heads).items()}
        _check_positions(found, positions)
        return found


def _check_positions(sites: Iterable[Site], positions: Where) -> None:
    for site in sites:
        if positions is not None and site.kind == "channel":
            raise InterventionError("a channel site mixes channels, it has no token positions", site=site.name)


def _mean_factors(capture: Capture, site: Site) -> Tensor:
    """[head] means of the factors of a captured gate, over forwards, examples and positions."""
    found = [f.sites[site.name].factors for f in capture.forwards if site.name in f.sites]
    kept = [factors for factors in found if factors is not None]
    if not kept or len(kept) < len(found):
        raise InterventionError(
            "the capture does not have the site's factors", site=site.name, hint="capture the site; if it is attention "
            "that weighs its heads, with queries_keys=True",
        )  # fmt: skip
    return torch.cat([factors.double().transpose(0, 1).flatten(1) for factors in kept], dim=1).mean(1)
