"""What was seen of the sites that a capture asked for: errors where nothing is left, warnings where something is."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import nn

from workbench.capture.capture import Capture
from workbench.capture.settings import Settings
from workbench.errors import CaptureError
from workbench.hooks.layouts import Layouts
from workbench.hooks.placing import STATE_IT
from workbench.hooks.sites import Sites, Unread, without
from workbench.session.compiled_models import unseen_in

_NEXT = "wb.look(**inputs) tells what mixes tokens unread, workbench.reader has it read"
_OTHERWISE = (
    "it ran and called nothing that is read: its weights may be no softmax over the last axis (sigmoid, ReLU²), or "
    "something may lie between softmax and values (talking heads)"
)


def readable(root: nn.Module, layouts: Layouts, sites: Sites) -> Sites:
    """The sites without those that turned out to be none, or cannot be shown; the latter are unread."""
    unread = {one.name: one for one in sites.unread}
    for name, reason in layouts.refused.items():
        unread[name] = Unread(name, type(root.get_submodule(name)).__name__, reason, proved=False)
    gone = {*layouts.refused, *layouts.gates}
    return Sites(without(sites, gone), unread.values(), sites.looked)


def with_idle(root: nn.Module, sites: Sites, idle: Collection[str], called: Collection[str]) -> Sites:
    """The sites, with those that ran without a call among the unread, unless a look or a site inside has told of them.

    Args:
        idle: sites whose module has run in some forward without a call. called: sites that made one.
    """
    unread = [one for one in sites.unread if one.reason != _OTHERWISE or one.name not in called]
    if not sites.looked and not unseen_in(root):
        known = {*called, *(one.name for one in unread)}
        for name in (site.name for site in sites if site.name in idle and site.name not in known):
            if not any(other.startswith(f"{name}.") for other in called):
                unread.append(Unread(name, type(root.get_submodule(name)).__name__, _OTHERWISE, proved=False))
    return Sites(sites, unread, sites.looked)


def check_fired(
    root: nn.Module, sites: Sites, capture: Capture, settings: Settings, refused: Mapping[str, str]
) -> None:
    """What the model did inside a capture, against what was asked for.

    Raises:
        CaptureError: nothing ran, or nothing can be shown of what was asked for. What else is left out is warned of.
    """
    if not capture.calls:
        raise CaptureError("the model did not run inside the capture", hint="call the model inside the `with`")
    _check_refused(capture, settings, refused)
    _check_recorded(capture, settings)
    wanted = settings.sites or frozenset(site.name for site in sites)
    silent = [name for name in capture.silent if name in wanted and name not in capture.unrecorded]
    ran = [one.name for one in sites.unread if one.reason == _OTHERWISE and one.name in silent]
    hint = unseen_in(root) or _hint(ran)
    if not capture.sites or (silent and settings.sites is not None):
        names = ", ".join(silent[:5]) + (" …" if len(silent) > 5 else "")
        raise CaptureError(f"no attention call was seen at {names or 'any site'}", hint=hint)
    if silent:
        said = f"{len(silent)} of {len(wanted)} sites did not fire: {', '.join(silent[:5])}"
        also = unseen_in(root) or (f"{', '.join(ran[:5])} ran without a call: {_NEXT}" if ran else "")
        warnings.warn(f"{said}: {also}" if also else said, UserWarning, stacklevel=4)


def _hint(ran: list[str]) -> str:
    reached = f"{', '.join(ran[:5])} ran: {_NEXT}" if ran else f"does the forward reach it? {_NEXT}"
    return (
        f"{reached}. Seen are scaled_dot_product_attention, Hugging Face's backends, PyTorch's attention modules, and "
        "a softmax over the last axis whose result is multiplied with values"
    )


def _check_refused(capture: Capture, settings: Settings, refused: Mapping[str, str]) -> None:
    """Sites whose axes or rows could not be proved: an error if they were asked for or are all that there is."""
    if not refused:
        return
    name, reason = next(iter(refused.items()))
    if not capture.sites or (settings.sites is not None and set(refused) & settings.sites):
        hint = STATE_IT % name
        if "account for" in reason:
            hint = "a part of a head is not shown as if it were the head"
        elif "rows" in reason:
            hint = f"a part of a head is not shown as if it were the head; where each call is a map of its own, {hint}"
        raise CaptureError(f"what its kernel gives could not be placed: {reason}", site=name, hint=hint)
    warnings.warn(
        f"{len(refused)} sites were not captured, they stand in sites.unread: {name}: {reason}",
        UserWarning,
        stacklevel=5,
    )


def _check_recorded(capture: Capture, settings: Settings) -> None:
    """Calls that were left out: an error where nothing is left of what was asked for."""
    if not capture.unrecorded:
        return
    gone = [name for name in capture.unrecorded if name in capture.silent or not capture.sites]
    for name in gone if settings.sites is not None or not capture.sites else []:
        raise CaptureError(f"nothing could be recorded: {capture.unrecorded[name].reason}", site=name or None)
    name, first = next(iter(capture.unrecorded.items()))
    n_calls = sum(one.calls for one in capture.unrecorded.values())
    warnings.warn(
        f"{n_calls} calls of {len(capture.unrecorded)} sites were not recorded, the ledger lists them: "
        f"{name or 'the model'}: {first}",
        UserWarning,
        stacklevel=5,
    )
