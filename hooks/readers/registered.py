"""The door for modules that mix tokens in their own way: a reader says what attention call such a module amounts to."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError, InterventionError
from workbench.hooks.nested import first_tensor
from workbench.hooks.tap import AttentionCall, Kind, StateLink
from workbench.kernels.patterns import Pattern


@dataclass(frozen=True)
class ModuleRun:
    """A module that has run, as its reader gets it.

    Attributes:
        site: the module's path. module: the module.
        inputs: what its forward was called with, by parameter name, defaults included.
        output: what it gave.
        continued: whether it went on from the cached state of earlier positions; None if that is not known.
        carried: that state, by name, as it was before the module ran; None if there was none or it is not known.
    """

    site: str
    module: nn.Module
    inputs: Mapping[str, Any]
    output: Any
    continued: bool | None = None
    carried: Mapping[str, Tensor] | None = None


def join_heads(z: Tensor) -> Tensor:
    """[batch, head, position, width] -> [batch, position, head · width]."""
    return z.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Mixing:
    """How a module has mixed its positions: `finish(pattern · values)` is what it gave.

    Attributes:
        pattern: the map [batch, head, query, key]; its own `grade`, `signed` and `normalised` say what it is.
        values: what the map is applied to, [batch, kv head, key, width].
        finish: maps A·V [batch, head, query, width] to the module's output (of several, to the first), through
            whatever the module does after mixing: a skip, a gate, a norm, a projection.
        kernel: a short name of the mechanism.
        others: further maps by name, such as its local and global halves, beside the `factors` of the pattern.
        queries, keys: [batch, group, position, d], where something plays their part.
    """

    pattern: Pattern
    values: Tensor
    finish: Callable[[Tensor], Tensor] = join_heads
    kernel: str = "module"
    others: Mapping[str, Pattern] = field(default_factory=dict)
    queries: Tensor | None = None
    keys: Tensor | None = None


Read = Callable[[ModuleRun], Mixing]
Continues = Callable[[nn.Module, Mapping[str, Any]], bool]
Held = Callable[[nn.Module, Mapping[str, Any], Any], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class Reader:
    """A registered reader; see `reader`."""

    read: Read
    kind: Kind
    when: Callable[[nn.Module], bool]
    continues: Continues | None = None
    follows: tuple[str, ...] = ()
    state: Held | None = None

    def __call__(self, run: ModuleRun) -> Mixing:
        """What the module's mixing amounts to."""
        return self.read(run)


_readers: dict[type | str, Reader] = {}


def reader(
    *modules: type[nn.Module] | str,
    kind: Kind = "state",
    when: Callable[[nn.Module], bool] = lambda module: True,
    continues: Continues | None = None,
    follows: Sequence[str] = (),
    state: Held | None = None,
) -> Callable[[Read], Reader]:
    """Register a function that reads modules which mix tokens in their own way; a decorator.

    Such a module is then a site: captured, verified, ablated, patched, saved like any attention. The reader runs
    without gradients after the module has run, and may call the module's parts. What it gives is proved at the first
    call of each capture: `finish(A·V)` must be what the module gave. Attention that the module itself calls belongs to
    it and is not reported again; attention in modules inside it is.

    Args:
        modules: classes, or their names for packages that need not be imported: "package.module.Class", or "Class"
            alone wherever it is defined. Subclasses are read too. A later reader takes the place of an earlier one.
        kind: of the sites, one of those of `workbench.hooks.tap.Kind`.
        when: whether an instance can be read, for classes that share a name.
        continues: whether a module that is about to run, with these inputs by name, goes on from a state of earlier
            positions; by default `workbench.hooks.readers.continues` asks the cache among its inputs.
        follows: names of modules inside whose own mixing the reader takes into account, such as a convolution of
            the values: these are not listed as unread.
        state: what the cache holds of a module with these inputs by name, tensors [batch, ...] by name, or None; it is
            also given what the module gave, None before it has run. A call that goes on from it is then read too:
            `run.carried` has them, and what the rows read of them, beside A·V, goes into the pattern's `before`.

    >>> from workbench.kernels.patterns import DensePattern
    >>> class Average(nn.Module):
    ...     def forward(self, x):
    ...         return x.mean(1, keepdim=True).expand_as(x)
    >>> @reader(Average, kind="self")
    ... def average(run):
    ...     x = run.inputs["x"]
    ...     weights = x.new_full((x.shape[0], 1, x.shape[1], x.shape[1]), 1 / x.shape[1])
    ...     return Mixing(DensePattern(weights), values=x[:, None])
    """
    if not modules or not all(isinstance(one, str) or inspect.isclass(one) for one in modules):
        raise CaptureError(f"a reader is for classes or their names, not {modules!r}", hint='reader("package.Class")')

    def register(read: Read) -> Reader:
        given = read.read if isinstance(read, Reader) else read
        made = Reader(given, kind, when, continues, tuple(follows), state)
        _readers.update(dict.fromkeys(modules, made))
        _of_class.clear()
        return made

    return register


_of_class: dict[type, Reader | None] = {}  # which reader a class has; asked for every module of a model


def reader_of(module: nn.Module) -> Reader | None:
    """The reader of a module; None if it has none.

    >>> reader_of(nn.Linear(2, 2)) is None
    True
    """
    cls = type(module)
    if cls not in _of_class:
        names = [
            name for base in cls.__mro__ for name in (base, f"{base.__module__}.{base.__qualname__}", base.__name__)
        ]
        _of_class[cls] = next((_readers[name] for name in names if name in _readers), None)
    found = _of_class[cls]
    return found if found is not None and found.when(module) else None


def bound_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's inputs by the names of the forward's parameters, defaults included."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def continues(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a module that is about to run goes on from the cached state of earlier positions.

    To be asked before it runs: after that its cache holds a state in any case. A cache is an input with
    `has_previous_state`, or one called `cache_params`; one that does not tell may hold a state. A reader may have a
    rule of its own.
    """
    inputs = bound_inputs(module, args, kwargs)
    found = reader_of(module)
    if found is not None and found.continues is not None:
        with _as_known(module):
            return found.continues(module, inputs)
    caches = [value for value in inputs.values() if hasattr(value, "has_previous_state")]
    if not caches:
        return inputs.get("cache_params") is not None
    return any(_holds_state(cache, module) for cache in caches)


@dataclass(frozen=True)
class Begun:
    """What was known of a module before it ran: whether it continues, and from which state."""

    continued: bool
    carried: Mapping[str, Tensor] | None = None


def before_reading(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Begun:
    """To be asked before a module runs: `continues`, and a copy of the state that it will go on from."""
    if not continues(module, args, kwargs):
        return Begun(False)
    held = _held(module, args, kwargs, None)
    return Begun(True, None if held is None else {name: t.detach().clone() for name, t in held.items()})


def _held(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Mapping[str, Tensor] | None:
    found = reader_of(module)
    if found is None or found.state is None:
        return None
    with _as_known(module):
        return found.state(module, bound_inputs(module, args, kwargs), output) or None


def _holds_state(cache: Any, module: Any) -> bool:
    known = cache.has_previous_state
    return bool(known(module.layer_idx) if callable(known) else known)


def read_module(
    site: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    *,
    begun: Begun | None = None,
) -> AttentionCall:
    """The call that a module which has run amounts to, by its reader.

    Args:
        site: the module's name.
        args, kwargs: what the module was called with. output: what it gave.
        begun: what `before_reading` said before it ran; needed only where it was given a cache.

    Raises:
        CaptureError: the module has no reader or gives no tensor; and what the reader raises.
    """
    found = reader_of(module)
    if found is None:
        raise CaptureError(f"{type(module).__name__} has no reader", site=site, hint="register one: workbench.reader")
    given = first_tensor(output)
    if given is None:
        raise CaptureError(f"the module gives {type(output).__name__}, which begins with no tensor", site=site)
    continued, carried = (None, None) if begun is None else (begun.continued, begun.carried)
    try:
        with _untouched(module), _as_known(module):
            mixing = found(ModuleRun(site, module, bound_inputs(module, args, kwargs), output, continued, carried))
    except CaptureError as error:
        raise type(error)(error.message, site=error.site or site, shape=error.shape, hint=error.hint) from error
    _check(mixing, site)
    others, left = dict(mixing.others), _held(module, args, kwargs, output)
    kind = mixing.values.device.type
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def finish(z: Tensor) -> Tensor:
        # What follows the map is in the dtypes in which the module ran, wherever it is asked for.
        with _untouched(module), _as_known(module, site), torch.autocast(kind, dtype, autocast):
            return mixing.finish(z)

    return AttentionCall(
        site=site,
        module=module,
        q=mixing.queries,
        k=mixing.keys,
        v=mixing.values,
        output=given[0],
        kernel=mixing.kernel,
        tap="reader",
        is_causal=mixing.pattern.mask.causal,
        finish=finish,
        state=StateLink.between(carried, left),
        build=lambda: copy.copy(mixing.pattern),
        build_others=lambda: {name: copy.copy(pattern) for name, pattern in others.items()},
    )


@contextmanager
def _as_known(module: nn.Module, site: str | None = None) -> Iterator[None]:
    """What goes wrong where a module lacks what its reader knows of it, or is called in another way, is said so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(
            f"this {type(module).__name__} is not built as those that its reader knows: "
            f"{type(error).__name__}: {error}",
            site=site,
            hint="is it another class of the same name, or another release? workbench.reader registers one of your own",
        ) from error


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """What running parts of a module again does to its buffers, such as running means, and to random numbers is undone.

    Outside of training there is no such thing.
    """
    if not any(part.training for part in module.modules()):
        yield
        return
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    devices = sorted({t.device.index for t in (*module.buffers(), *module.parameters()) if t.is_cuda})
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for buffer, was in buffers:  # past autograd, whose version of a buffer is that of the module's own run
                buffer.data.copy_(was)


def _check(mixing: Any, site: str) -> None:
    if not isinstance(mixing, Mixing):
        raise CaptureError(f"the reader gave {type(mixing).__name__}, expected a Mixing", site=site)
    bad = next((name for name in mixing.others if not str(name).isidentifier() or name == "pattern"), None)
    if bad is not None:
        raise CaptureError(f'a map cannot be called "{bad}"', site=site, hint='a plain word other than "pattern"')
    b, h, _, keys = mixing.pattern.shape
    v = mixing.values
    if v.dim() != 4 or v.shape[0] != b or v.shape[2] != keys or h % v.shape[1]:
        raise CaptureError(
            f"the reader's values are {list(v.shape)}, expected [{b}, kv head, {keys}, width] for a map of {h} heads",
            site=site,
            shape=v.shape,
        )


def check_gradients(call: AttentionCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare the gradients of what is read of a module with its own, in the inputs and parameters that have any.

    A map may hold some of its parts fixed; heads that are edited would then have other gradients than the model.

    Raises:
        InterventionError: they differ.
    """
    assert call.finish is not None
    again = call.finish(call.mixed)
    wanted = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
    wanted += [parameter for parameter in call.module.parameters() if parameter.requires_grad]
    direction = torch.randn(call.output.shape, generator=torch.Generator().manual_seed(0)).to(call.output)
    found: list[tuple[Tensor | None, ...]] = [(None,) * len(wanted)] * 2
    for i, y in enumerate((call.output, again)):
        if y.requires_grad:
            found[i] = torch.autograd.grad(y, wanted, direction, retain_graph=True, allow_unused=True)
    for own, read in zip(*found, strict=True):
        size = max((float(g.abs().max()) for g in (own, read) if g is not None and g.numel()), default=0.0)
        zero = torch.zeros(())
        off = float(((zero if read is None else read) - (zero if own is None else own)).abs().max()) if size else 0.0
        if off > _GRADIENTS_OFF.get(call.output.dtype, 1e-3) * size:
            raise InterventionError(
                f"gradients do not flow through what is read of a {type(call.module).__name__} as they do through it",
                site=call.site,
                hint="run the model under torch.no_grad(), or edit other sites; a reader's pattern must keep the "
                "history of what it is made of (workbench.kernels.history.own)",
            )


_GRADIENTS_OFF = {torch.float16: 5e-2, torch.bfloat16: 2e-1}


def in_place_of(call: AttentionCall, edited: Tensor, output: Any) -> Any:
    """What a module gives, with an edited tensor in the place of its own."""
    given = first_tensor(output)
    assert given is not None  # or it could not have been read
    return given[1](edited)
