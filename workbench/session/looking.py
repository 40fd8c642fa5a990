"""A look at every module of a model while it runs: what mixes tokens unread, and what the keys of each site are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.code import scripted_attention
from workbench.hooks.finding import site_name, with_call
from workbench.hooks.layouts import Layouts
from workbench.hooks.listener import Listener
from workbench.hooks.look.keys import probe_keys
from workbench.hooks.look.replay import OnCall, Replays, copied
from workbench.hooks.look.unread import find_unread
from workbench.hooks.observer import observed
from workbench.hooks.sites import Kind, Sites, Unread, with_kind, without
from workbench.hooks.tap import AttentionCall

LIMIT = 1 << 31
"""Most bytes of activations that a look keeps, 2 GiB."""


@dataclass(frozen=True)
class _Calls(Listener):
    """Hands on the calls; PyTorch's own modules leave their native path, where there is nothing to hold fixed."""

    take: Callable[..., Tensor | None]

    def on_call(self, call: Any) -> Tensor | None:
        return self.take(call)

    def leaves_native_path(self) -> bool:
        return True

    def takes_blocks(self) -> bool:
        return True


def look_at(
    model: nn.Module,
    sites: Sites,
    layouts: Layouts,
    args: tuple[Any, ...],
    inputs: Mapping[str, Any],
    limit: int = LIMIT,
) -> Sites:
    """The model's sites with their kinds, and all that mixes tokens and is none.

    The model runs on copies of the inputs, once to place its kernel calls and once to be recorded; then modules are run
    again one by one, until each mixing is accounted for: in all the time of about 7 forwards (11 for images) where
    every mixer is a site, and of 15 to 40 where some are not.

    Raises:
        CaptureError: the copies of what modules were given would exceed the limit.
    """

    def observe(on_call: OnCall) -> AbstractContextManager[None]:
        return observed(model, _Calls(on_call), layouts)

    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})

    def note(call: AttentionCall) -> None:
        fired.setdefault(call.site, call)

    fired: dict[str, AttentionCall] = {}
    with torch.random.fork_rng(devices), torch.no_grad(), observe(note):
        given, named = copied((args, dict(inputs)))
        model(*given, **named)
    sites = _with_fired(sites, fired)
    with layouts.settled(), _alone(), Replays(model, args, inputs, observe, limit) as replays:
        unread = {one.name: one for one in find_unread(replays)}
        for call in replays.calls:
            name = site_name(call.name)
            if name not in {site.name for site in sites} or call.read_whole or sites[name].kind in ("state", "channel"):
                continue
            # Of several calls that make one map the one with the most keys says what they are.
            for keys in sorted(probe_keys(replays, call), key=lambda one: -one.number)[:1]:
                kind = _kind(sites[name].kind, keys.over)
                sites = with_kind(sites, name, kind)
                if keys.over == "summaries":
                    reason = "its keys are no positions, each sums up all of them: what mixes tokens comes before"
                    unread.setdefault(name, Unread(name, type(call.module).__name__, reason))
                if keys.mixed and not any(other.startswith(f"{name}.") for other in unread):
                    what = "tokens" if keys.over == "pooled" else "neighbours"
                    reason = f"mixes {what} before its kernel: a key reads several positions"
                    unread.setdefault(name, Unread(name, type(call.module).__name__, reason))
    unread |= {one.name: one for one in _scripted(model)}
    for name, reason in layouts.refused.items():
        module = model.get_submodule(name)
        unread[name] = Unread(name, type(module).__name__, reason, proved=name in unread)
    order = [name for name, _ in model.named_modules()]
    listed = sorted(unread.values(), key=lambda one: order.index(one.name))
    # What ran without a call, though its code speaks of attention, is no site: an unread mixer, or only around others.
    phantoms = {site_name(call.name) for call in replays.calls} - set(fired)
    return Sites(without(sites, {*layouts.refused, *layouts.gates, *phantoms}), listed, looked=True)


def _with_fired(sites: Sites, fired: Mapping[str, AttentionCall]) -> Sites:
    """The sites with what their calls have shown, also those that only these show."""
    for call in fired.values():
        sites = with_call(sites, call)
    return sites


@contextmanager
def _alone() -> Iterator[None]:
    """Where a module fails when it is run again by itself, nothing can be said of it.

    Its weights may be there only while the whole model runs, as those that FSDP brings in are.
    """
    try:
        yield
    except WorkbenchError:
        raise
    except Exception as error:
        raise CaptureError(
            f"a module cannot be run again by itself: {type(error).__name__}: {str(error)[:120]}",
            hint="the sites are as good; what else mixes tokens is not known",
        ) from error


def _kind(kind: Kind, over: str) -> Kind:
    if over in ("pooled", "summaries"):
        return "pooled"
    of_self: dict[str, Kind] = {"elsewhere": "memory", "others": "cross", "moved": "halo"}
    return of_self.get(over, kind) if kind == "self" else kind


def unlooked(sites: Sites, error: CaptureError) -> Sites:
    """The sites where a look was not possible, which says so."""
    known = [one for one in sites.unread if one.name]
    return Sites(sites, [*known, Unread("", "", f"{error.message}; {error.hint}", proved=False)], looked=False)


def _scripted(model: nn.Module) -> list[Unread]:
    reason = "compiled code that calls attention, which runs where nothing sees it"
    return [Unread(name, "TorchScript", reason, proved=False) for name in scripted_attention(model)]


def nominated(model: nn.Module, sites: Sites) -> list[Unread]:
    """What seems to mix tokens and is no site: parts in TorchScript whose code calls attention, and blocks without a
    site whose neighbours of the same class have one.
    """
    found = _scripted(model)
    names = [site.name for site in sites]
    for path, parent in model.named_modules():
        if not isinstance(parent, nn.ModuleList):
            continue
        having: dict[bool, list[tuple[str, nn.Module]]] = {True: [], False: []}
        for child, module in parent.named_children():
            name = f"{path}.{child}".lstrip(".")
            having[any(site == name or site.startswith(f"{name}.") for site in names)].append((name, module))
        classes = {type(module) for _, module in having[True]}
        for name, module in having[False]:
            if type(module) in classes:
                reason = "no attention was found in it, as in its neighbours; it was not looked at"
                found.append(Unread(name, type(module).__name__, reason, proved=False))
    return found
