"""What a sweep tries out: variants of a model, and several of them in one forward, side by side along the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import InterventionError
from workbench.hooks.edits import Ablation, Edit, HeadFunction, OutputEdit, PatternEdit, Source, zero
from workbench.hooks.heads import parse_heads
from workbench.hooks.nested import items_of, map_tensors, rebuilt, tensors
from workbench.hooks.positions import Positions, Where
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.kernels.patterns import Pattern
from workbench.session.ablations import ABLATIONS, find_ablation
from workbench.session.reference import Reference
from workbench.session.workbench import Workbench

AnyEdit = Edit | OutputEdit


@dataclass(frozen=True)
class Variant:
    """One way in which a model is changed.

    Attributes:
        heads: one or several heads, as `Workbench.ablate` takes them.
        how: what stands in their place, as in `Workbench.ablate`.
        positions: query positions where it does.
        edit: `edit(rows, site, head)` for an edit of the heads' pattern, in place of an ablation; or, without heads,
            one or several edits of `workbench.hooks.edits`.
        label: its name in the result; made from the heads if empty.
    """

    heads: Any = None
    how: str = "zero"
    positions: Where = None
    edit: HeadFunction | AnyEdit | Sequence[AnyEdit] | None = None
    label: str = ""


@dataclass(frozen=True)
class Resolved:
    """A variant for one model, and a text that tells it from every other.

    Attributes:
        draws: its edits; several where it is resampled several times, over which metrics are averaged.
    """

    label: str
    draws: tuple[tuple[AnyEdit, ...], ...]
    about: str

    @property
    def edits(self) -> tuple[AnyEdit, ...]:
        """The edits of the first draw."""
        return self.draws[0]

    @property
    def sites(self) -> frozenset[str]:
        """Names of the modules that it touches."""
        return frozenset().union(*(edit.sites for edit in self.edits))


def resolve(
    wb: Workbench,
    variants: Sequence[Variant],
    reference: Any,
    about_reference: str,
    seed: int,
    batches: Sequence[Mapping[str, Any]],
) -> tuple[list[Resolved], list[Reference]]:
    """The edits of variants, and the references that they use, which are run once for all of them.

    Args:
        seed: of resampling. batches: that are to be ablated.

    Raises:
        InterventionError: a variant that is none, heads that are none, an unknown `how`, a missing reference.
    """
    chosen = [_heads(wb, variant) for variant in variants]
    sources: dict[str, Reference] = {}
    for how in dict.fromkeys(v.how for v, heads in zip(variants, chosen, strict=True) if heads and v.edit is None):
        if find_ablation(how).needs == "nothing":
            continue
        if reference is None:
            raise InterventionError(f'how="{how}" needs a reference', hint="reference= is a dict of inputs, or several")
        of_this = [h for v, h in zip(variants, chosen, strict=True) if h and v.edit is None and v.how == how]
        found = Reference(_union(of_this), how, seed)
        found.run(wb, reference, batches)
        sources[how] = found
    resolved = [
        _resolve_one(variant, heads, sources, about_reference) for variant, heads in zip(variants, chosen, strict=True)
    ]
    return resolved, list(sources.values())


def _heads(wb: Workbench, variant: Variant) -> dict[Site, list[int]]:
    if not isinstance(variant, Variant):
        raise InterventionError(f"a variant is a Variant, not {type(variant).__name__}")
    if variant.heads is None:
        return {}
    found = {wb.sites.find(name): heads for name, heads in parse_heads(wb.sites, variant.heads).items()}
    for site in found:
        if variant.positions is not None and site.kind == "channel":
            raise InterventionError("a channel site mixes channels, it has no token positions", site=site.name)
    return found


def _union(several: Iterable[Mapping[Site, Sequence[int]]]) -> dict[Site, list[int]]:
    union: dict[Site, set[int]] = {}
    for heads in several:
        for site, chosen in heads.items():
            union.setdefault(site, set()).update(chosen)
    return {site: sorted(chosen) for site, chosen in union.items()}


def _resolve_one(
    variant: Variant, heads: dict[Site, list[int]], sources: Mapping[str, Reference], about_reference: str
) -> Resolved:
    listed = {site.name: chosen for site, chosen in heads.items()}
    label = variant.label or " ".join(site.label(head) for site, chosen in heads.items() for head in chosen)
    if not heads:
        edits = variant.edit if isinstance(variant.edit, Sequence) else (variant.edit,)
        if not edits or not all(isinstance(edit, (Edit, OutputEdit)) for edit in edits):
            raise InterventionError(
                f"the variant {label or variant!r} has neither heads nor an edit",
                hint="Variant(heads), or Variant(edit=…)",
            )
        own = tuple(edit for edit in edits if isinstance(edit, (Edit, OutputEdit)))
        return Resolved(label or " ".join(type(edit).__name__ for edit in own), (own,), f"{label} {about(own)}")
    where = Positions(variant.positions)
    if variant.edit is not None:
        if not callable(variant.edit) or isinstance(variant.edit, (Edit, OutputEdit)):
            raise InterventionError(
                f"edit is {type(variant.edit).__name__}, expected a function edit(rows, site, head)"
            )
        edit: Edit = PatternEdit(heads, variant.edit, where)
        return Resolved(label, ((edit,),), f"{label} {listed} {about(variant.edit)} {about(where)}")
    shared = ABLATIONS[variant.how].needs == "reference"
    each: list[Source] = [zero]
    if shared:
        reference = sources[variant.how]
        each = [_of_shared(reference, variant.how, heads, draw) for draw in range(reference.draws)]
    told = f"{label} {listed} {variant.how} {about(where)} {about_reference if shared else ''}"
    return Resolved(label, tuple((Ablation(heads, source, where),) for source in each), told)


def _of_shared(reference: Reference, how: str, heads: Mapping[Site, Sequence[int]], draw: int) -> Source:
    """Of a reference that holds the heads of many variants, those of one."""
    places = {site.name: [reference.chosen[site].index(head) for head in chosen] for site, chosen in heads.items()}
    make: Source = getattr(reference, how)

    def source(call: AttentionCall, old: Tensor) -> Tensor:
        if reference.kind.singles:
            return reference.resample(call, old, draw, places[call.site])
        return make(call, old)[:, places[call.site]]

    return source


def about(value: Any) -> str:
    """A short text that differs where values differ; a function is told by its name."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()[:16]
        return f"{value.dtype}{list(value.shape)}:{digest}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{about(key)}: {about(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(about, value)) + "]"
    if isinstance(value, (frozenset, set)):
        return about(sorted(map(about, value)))
    if value is None or isinstance(value, (bool, int, float, str, slice)):
        return repr(value)
    if isinstance(value, Site):
        return value.name
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return type(value).__qualname__
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    held = {key: item for key, item in vars(value).items() if key not in ("fired", "_checked", "__wrapped__")}
    return f"{name}{about(held) if held else ''}"


class Unrepeated(InterventionError):
    """A module that does not run on every repeat of a batch."""


class Stack(Edit):
    """Side by side along the batch, each repeat of it with the edits of its own variant.

    Attributes:
        plan: for each repeat, its edits. size: examples of one. touched: names of the modules that an edit has changed.
        windowed: names of those that had more rows than there are examples.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__(sites)
        self.plan: Sequence[tuple[AnyEdit, ...]] = ((),)
        self.size = 1
        self.touched: set[str] = set()
        self.windowed: set[str] = set()

    def check_rows(self, sizes: Sequence[int], site: str) -> None:
        """Raise an `Unrepeated` where a module runs on another number of examples than all repeats have together.

        Args:
            sizes: of what it gives, along the first axis, and the second if that may be the batch.
        """
        whole = len(self.plan) * self.size
        if len(self.plan) > 1 and (sizes[0] % whole or (whole in sizes[1:] and sizes[0] != whole)):
            raise Unrepeated(
                f"{len(self.plan)} variants side by side have {whole} examples, and this site has {sizes[0]} rows",
                site=site, hint="pass batched=False: is the batch no first axis of what its blocks give?",
            )  # fmt: skip

    def __call__(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z with each repeat's heads edited."""
        self.check_rows(z.shape[:1], call.site)
        if z.shape[0] > len(self.plan) * self.size:
            self.windowed.add(call.site)
        size, new = z.shape[0] // len(self.plan), None
        for number, edits in enumerate(self.plan):
            own = [edit for edit in edits if isinstance(edit, Edit) and call.site in edit.sites]
            if not own:
                continue
            self.touched.add(call.site)
            rows = slice(number * size, (number + 1) * size)
            part, edited = _part(call, z.shape[0], rows), z[rows]
            for edit in own:
                edited = edit(part, edited)
            if len(self.plan) == 1:
                return edited
            new = z.clone() if new is None else new
            new[rows] = edited
        return z if new is None else new


class OutputStack(OutputEdit):
    """The same for the outputs of modules; `plan` and `touched` are those of the stack beside it."""

    def __init__(self, sites: Iterable[str], stack: Stack) -> None:
        super().__init__(sites)
        self.stack = stack

    def __call__(self, name: str, module: nn.Module, output: Any) -> Any:
        """The output with each repeat edited."""
        plan = self.stack.plan
        mine = [[edit for edit in edits if isinstance(edit, OutputEdit) and name in edit.sites] for edits in plan]
        if not any(mine):
            return output
        self.stack.touched.add(name)
        first = next((each for each in tensors(output) if each.dim()), None)
        if first is not None:
            self.stack.check_rows(first.shape[: max(1, min(2, first.dim() - 1))], name)
        parts = split(output, len(plan))
        for number, edits in enumerate(mine):
            for edit in edits:
                parts[number] = edit(name, module, parts[number])
        return join(parts)


def _part(call: AttentionCall, total: int, rows: slice) -> AttentionCall:
    """The call as it would be for some examples alone."""
    if rows.start == 0 and rows.stop == total:
        return call

    def cut(tensor: Tensor | None) -> Tensor | None:
        whole = tensor is None or tensor.dim() < 3 or tensor.shape[0] != total
        return tensor if whole else tensor[rows]  # type: ignore[index]

    if call.axes is not None:
        call = replace(call, output=call.z(), axes=None, layout="bhqd")
    axis = 0 if call.finish is not None else call.layout.index("b")
    each = call.output.shape[axis] // total
    output = call.output.narrow(axis, rows.start * each, (rows.stop - rows.start) * each)
    q, k, v = (None if t is None else t.narrow(0, *_scaled(t, total, rows)) for t in (call.q, call.k, call.v))
    assert v is not None
    changed: dict[str, Any] = {name: cut(getattr(call, name)) for name in ("mask", "bias", "lse", "weights")}
    if call.build is not None:
        changed["build"] = _refuse(call)
    return replace(call, q=q, k=k, v=v, output=output, **changed)


def _scaled(tensor: Tensor, total: int, rows: slice) -> tuple[int, int]:
    """Start and length of the rows on a tensor's first axis, which may be batch times heads, or shared by all."""
    each = tensor.shape[0] // total
    return (0, tensor.shape[0]) if each == 0 else (rows.start * each, (rows.stop - rows.start) * each)


def _refuse(call: AttentionCall) -> Callable[[], Pattern]:
    def build() -> Pattern:
        raise InterventionError(
            f"{call.kernel} gives no pattern for a part of the batch",
            site=call.site,
            hint="run the sweep with batched=False",
        )

    return build


def split(output: Any, parts: int, rows: int | None = None) -> list[Any]:
    """A model's output, or a module's, for each of `parts` equal parts of the batch.

    Single numbers, such as a loss, belong to all parts at once and are left out (None).

    Args:
        rows: examples of the whole batch; what is not a multiple of it along its first axis belongs to all parts.
    """
    if isinstance(output, Tensor):
        if output.dim() == 0:
            return [None if parts > 1 else output] * parts
        if output.shape[0] == 0 or output.shape[0] % (rows or parts):
            return [output] * parts
        return list(output.tensor_split(parts))
    items = items_of(output)
    if items is None:
        return [output] * parts
    made = {key: split(item, parts, rows) for key, item in items.items()}
    if isinstance(output, Mapping):
        return [rebuilt(output, {key: of[i] for key, of in made.items() if of[i] is not None}) for i in range(parts)]
    return [rebuilt(output, {key: of[i] for key, of in made.items()}) for i in range(parts)]


def join(parts: Sequence[Any]) -> Any:
    """The inverse of `split` for what modules give."""
    first = parts[0]
    if isinstance(first, Tensor):
        return first if all(part is first for part in parts) else torch.cat(list(parts))
    items = items_of(first)
    if items is None:
        return first
    several = [items_of(part) or {} for part in parts]
    return rebuilt(first, {key: join([one[key] for one in several]) for key in items})


def repeat(value: Any, times: int, batch: int) -> Any:
    """A nested value with those tensors that have `batch` rows repeated; the others hold for every example."""

    def repeated(tensor: Tensor) -> Tensor:
        mine = tensor.dim() > 0 and tensor.shape[0] == batch
        return tensor.repeat(times, *[1] * (tensor.dim() - 1)) if mine and times > 1 else tensor

    return map_tensors(repeated, value)
