"""One forward of a model in which the input and output of every module are kept: what its layers are found from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import AttachError, CaptureError, WorkbenchError
from workbench.hooks.changes import Changes
from workbench.hooks.compiled.regions import check_not_compiled
from workbench.hooks.listener import Listener
from workbench.hooks.nested import walk
from workbench.hooks.observer import observed
from workbench.hooks.projections import ProjectionFinder
from workbench.hooks.tap import AttentionCall

_SMALLEST_FACTOR = 1e-6
_SUM = 1e-5  # by how much a sum may be off, number by number, of what is added up; at least two roundings
_PRODUCT = 1e-4  # by how much a product may be off, of its length at each position; at least four roundings


@dataclass
class Recording:
    """What modules were given and gave, in the order in which they ended, and the attention calls.

    Attributes:
        given, gave: copies of the first floating-point tensor of each module's inputs and outputs, by its name; copies,
            because models write into their tensors.
        flat: outputs [position, width] of modules that a model gives the positions of all examples in one axis, as OPT
            does, of the one example that was run: [1, position, width].
        live: the outputs themselves, with their autograd history.
        order: names in the order in which they ended. times: how often each ran.
        calls: attention calls by site. finder: knows the module that joins the heads of each site.
    """

    given: dict[str, Tensor] = field(default_factory=dict)
    gave: dict[str, Tensor] = field(default_factory=dict)
    flat: dict[str, Tensor] = field(default_factory=dict)
    live: dict[str, Tensor] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)
    calls: dict[str, list[AttentionCall]] = field(default_factory=dict)
    finder: ProjectionFinder = field(default_factory=ProjectionFinder)
    logits: Tensor | None = None

    @property
    def coarsest(self) -> torch.dtype:
        """The coarsest dtype in which a module gave its output: that of the model, or of autocast."""
        return max({gave.dtype for gave in self.gave.values()}, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def eps(self) -> float:
        """By how much one rounding changes a number, relatively, in the coarsest dtype."""
        return float(torch.finfo(self.coarsest).eps)

    @property
    def precision(self) -> str:
        """The dtypes of the modules' outputs, such as "bfloat16", or "bfloat16 and float32" under autocast."""
        return " and ".join(sorted({str(gave.dtype).removeprefix("torch.") for gave in self.gave.values()}))


@dataclass(frozen=True)
class _Calls(Listener):
    """Puts the attention calls into a recording."""

    made: Recording

    def takes_blocks(self) -> bool:
        """So that they can be refused."""
        return True

    def on_call(self, call: AttentionCall) -> None:
        if call.block is not None:
            raise CaptureError(
                f"the map of this site comes from {call.block.of} calls, in which no head is whole",
                site=call.site,
                hint="circuits are found in models whose sites are one call each",
            )
        self.made.calls.setdefault(call.site, []).append(call)
        if call.finish is None:
            self.made.finder.saw_call(call.site, call.module, call.z().transpose(1, 2))

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.made.finder.saw_module(name, module, args)


def record(
    model: nn.Module, inputs: Mapping[str, Any], grad_from: Collection[str], *, needs_logits: bool = True
) -> Recording:
    """Run the model once, with autograd from the inputs of the modules `grad_from` on.

    Raises:
        WorkbenchError: the model gives no logits, and they are needed; or numbers that are not finite; or it is
            compiled.
    """
    check_not_compiled(model)
    made = Recording()
    names = {module: name for name, module in model.named_modules()}

    def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = first_float((*args, *kwargs.values()))
        if first is None:
            return None
        if names[module] in grad_from:
            leaf = first.detach().requires_grad_()
            args = tuple(leaf if value is first else value for value in args)
            kwargs = {key: leaf if value is first else value for key, value in kwargs.items()}
            made.given[names[module]] = leaf.detach().clone()
            return args, kwargs
        made.given[names[module]] = first.detach().clone()
        return None

    def ends(module: nn.Module, args: Any, output: Any) -> None:
        name = names[module]
        made.times[name] = made.times.get(name, 0) + 1
        made.order.append(name)
        first = first_float(output)
        if first is not None:
            made.gave[name], made.live[name] = first.detach().clone(), first
        elif isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point():
            made.flat[name] = output.detach().clone()[None]

    with Changes() as changes:
        for module, name in names.items():
            if name:
                changes.before(module, begins, with_kwargs=True)
                changes.after(module, ends)
        with torch.enable_grad(), observed(model, _Calls(made)):
            output = model(**inputs)
    _check_finite(made, output)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        if not needs_logits:
            return made
        raise WorkbenchError(
            f"the model gives {type(output).__name__}, which has no logits [batch, position, vocab]",
            hint="circuits need a language model with its head",
        )
    made.logits = logits
    return made


def _check_finite(made: Recording, output: Any) -> None:
    """Raise a WorkbenchError where the model's output is spoiled, naming where that began; −inf hides, and may be."""

    def spoiled(tensor: Tensor) -> bool:
        return bool((tensor.isnan() | (tensor == torch.inf)).any())

    gave = first_float(output)
    if gave is None or not spoiled(gave):
        return
    where = next((name for name in made.order if name in made.gave and spoiled(made.gave[name])), "the model")
    raise WorkbenchError(
        f"{where} gives numbers that are not finite, and so does the model: nothing can be found in them",
        hint="are its weights finite, and does its dtype reach far enough?",
    )


def first_float(values: Any) -> Tensor | None:
    """The first floating-point tensor of at least three dimensions in what a module was given or gave."""
    return next((each for each in walk(values) if each.is_floating_point() and each.dim() >= 3), None)


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def check_batch_first(seen: Recording, block: str) -> None:
    """Refuse a block whose stream has its positions before the batch, as it is in the one example that was run.

    Raises:
        AttachError: it has.
    """
    given = seen.given.get(block)
    if given is not None and given.dim() == 3 and given.shape[0] != 1:
        raise AttachError(
            f"the block {block} reads {list(given.shape)} of one example, and no stream [batch, position, d_model]",
            hint="captures, ablations, head_importance and run_sweep work where positions come first",
        )


def same_sum(a: Tensor, b: Tensor, size: Tensor, eps: float) -> bool:
    """Whether two sums are equal up to roundings.

    Args:
        size: what was added up, without its sign, number by number. eps: of the coarsest dtype in which it was.
    """
    if a.shape != b.shape:
        return False
    off = (a.double() - b.double()).abs()
    return bool((off <= max(_SUM, 2 * eps) * size.double() + 1e-12 * size.double().amax()).all())


def same_product(a: Tensor, b: Tensor, eps: float) -> bool:
    """Whether two outputs [..., width] of a product are equal up to roundings, as vectors at each position."""
    if a.shape != b.shape:
        return False
    off, length = (a.double() - b.double()).norm(dim=-1), b.double().norm(dim=-1)
    return bool((off <= max(_PRODUCT, 4 * eps) * (length + 1e-6 * length.amax())).all())


def factors_between(before: Tensor, parts: Tensor, after: Tensor, eps: float) -> Tensor | None:
    """[part] numbers by which parts [..., part] make, of the stream before them, the one behind; all 1 if they can be.

    None where there are no such numbers, or where one is next to nothing. `eps` as of `same_sum`.
    """
    if before.shape != after.shape or parts.shape[:-1] != after.shape:
        return None
    before, parts = before.double(), parts.double()
    solved = torch.linalg.lstsq(parts.flatten(0, -2), (after.double() - before).flatten()[:, None]).solution[:, 0]
    for factors in (torch.ones_like(solved), solved):
        total, size = before + parts @ factors, before.abs() + parts.abs() @ factors.abs()
        if bool((factors.abs() > _SMALLEST_FACTOR).all()) and same_sum(after, total, size, eps):
            return factors
    return None
