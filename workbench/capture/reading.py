"""Captures from files: every part is checked against the others before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from workbench.capture.capture import FORM, Capture
from workbench.capture.settings import APART, Settings
from workbench.capture.site_capture import KEPT, PATTERN, Forward, SiteCapture
from workbench.capture.timing import CallTimes
from workbench.capture.unrecorded import Unrecorded
from workbench.errors import CaptureError, FormatError, WorkbenchError
from workbench.hooks.sites import Site, Sites, Unread
from workbench.hooks.tap import StateLink
from workbench.kernels.families import rebuild
from workbench.kernels.gradients import GRADIENT_SUMS
from workbench.kernels.masks import Mask
from workbench.kernels.patterns import Pattern
from workbench.kernels.statistics import STATISTICS, VALUE_WEIGHTED
from workbench.storage import files, typed
from workbench.storage.parts import Part, each_text

_LONGEST = 2**40  # of any axis
_SMALL = 2**20  # of what options count
_ROWS = 8  # of each map that are added up
_FAR = 0.1  # from 1, beyond all rounding in half precision
# What a constructor of a pattern raises when its parts are not those of any pattern.
_REFUSALS = (WorkbenchError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
_STREAMS = ("input", "decoder")  # whose ids lie where the tensors of a site without a name do


def read_file(path: str | Path) -> Capture:
    """A capture that `Capture.save` wrote.

    Raises:
        FormatError: not such a file, truncated, or changed after it was written.
    """
    header, tensors = files.read(path, FORM)
    named: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition("/")
        named.setdefault(owner, {})[name] = tensor
    forwards = [_forward(entry, named) for entry in header["forwards"].list()]
    unread, looked = header.get("unread"), header.get("looked")  # older files have neither
    model_sites = Sites(
        (typed.record(site, Site) for site in header["model_sites"].list()),
        () if unread is None else [typed.record(one, Unread) for one in unread.list()],
        None if looked is None else looked.flag(),
    )
    provenance = header["provenance"]
    provenance.items()
    asked = header.get("settings")
    settings = None if asked is None else settings_of(asked, named.get("settings", {}))
    missed = header.get("unrecorded")
    unrecorded = [] if missed is None else [typed.record(one, Unrecorded) for one in missed.list()]
    return Capture(
        forwards, model_sites, provenance.value, settings=settings, unrecorded={one.site: one for one in unrecorded}
    )


def _forward(entry: Part, named: Mapping[str, dict[str, Tensor]]) -> Forward:
    index = entry["index"].integer(0)
    sites = {}
    for each in entry["sites"].list():
        site = typed.record(each["site"], Site)
        held = named.get(f"{index}/{site.name}", {})
        own = {name: tensor for name, tensor in held.items() if site.name or name not in _STREAMS}
        sites[site.name] = site_capture(each, site, own)
    tokens = {stream: [each_text(row) for row in rows.list()] for stream, rows in entry["tokens"].items().items()}
    unnamed = named.get(f"{index}/", {})
    ids = {name: tensor for name, tensor in unnamed.items() if "" not in sites or name in _STREAMS}
    for stream, tensor in ids.items():
        if tensor.dim() != 2 or tensor.is_floating_point() or tensor.is_complex():
            raise FormatError(f"{entry.place} has no ids [batch, position] as {stream!r}", shape=tensor.shape)
    thread, span, packed = entry.get("thread"), entry.get("span"), entry.get("packed")
    forward = Forward(index, sites, ids, tokens, 0 if thread is None else thread.integer(0))
    if span is not None:
        began, ended = (time.number() for time in span.list(2, 2))
        forward.span = (began, ended)
    if packed is not None:
        row, start, stop = (number.integer(0, _LONGEST) for number in packed.list(3, 3))
        forward.packed = (row, start, stop)
    return forward


def site_capture(entry: Part, site: Site, parts: dict[str, Tensor], *, rows: bool = True) -> SiteCapture:
    """A site capture of the facts and tensors that `pack` gave.

    Args:
        parts: is emptied of what are no statistics.
        rows: make some rows of each pattern, to see that its parts belong together; that reads them.

    Raises:
        FormatError: they do not fit each other.
    """
    batch, heads, queries, keys = (size.integer(0, _LONGEST) for size in entry["shape"].list(4, 4))
    shape = (batch, heads, queries, keys)
    if site.n_heads_here is not None and not 0 <= site.first_head < site.first_head + site.n_heads_here <= heads:
        raise FormatError(f"{entry.place} holds heads that are none of its {heads}", shape=shape)
    patterns = _patterns(entry, parts, shape, rows)
    kept: dict[str, Any] = {field: parts.pop(key, None) for key, field in KEPT.items()}
    for field, tensor in kept.items():
        wanted = (*shape, None) if field == "weights" else (batch, queries, heads, None)
        if tensor is not None and not (_fits(tensor, wanted[:4]) and tensor.is_floating_point()):
            raise FormatError(f"{entry.place} has a {field} that does not fit {list(shape)}", shape=tensor.shape)
    for name, tensor in parts.items():
        if not _fits(tensor, _shape_of(name, tensor, shape)):
            raise FormatError(f"{entry.place} has a {name} that does not fit {list(shape)}", shape=tensor.shape)
    times, n_calls, state = entry.get("times"), entry.get("n_calls"), entry.get("state")
    lazy = patterns.pop("pattern", None)
    if lazy is not None and kept["before"] is not None:
        lazy.before = kept["before"].transpose(1, 2)
    return SiteCapture(
        site=site,
        shape=shape,
        kernel=entry["kernel"].text(),
        signed=entry["signed"].flag(),
        normalised=entry["normalised"].flag(),
        n_calls=1 if n_calls is None else n_calls.integer(1, _SMALL),
        times=None if times is None else typed.record(times, CallTimes),
        **kept,
        statistics=parts,
        lazy=lazy,
        state=StateLink() if state is None else _state_link(state, batch),
        others=patterns,
    )


def _state_link(entry: Part, batch: int) -> StateLink:
    made: dict[str, tuple[int, ...] | None] = {}
    for name in ("found", "left"):
        numbers = entry.get(name)
        made[name] = None if numbers is None else tuple(n.integer() for n in numbers.list(batch, batch))
    return StateLink(**made)


def _patterns(
    entry: Part, parts: dict[str, Tensor], shape: tuple[int, int, int, int], rows: bool
) -> dict[str, Pattern]:
    """The patterns by name, their tensors taken out of `parts`; older files have only one, under another key."""
    one, several = entry.get("pattern"), entry.get("patterns")
    told = {"pattern": one} if one is not None else {} if several is None else several.items()
    found = {}
    for name, facts in told.items():
        start = PATTERN if one is not None else f"{PATTERN}{name}."
        held = {key.removeprefix(start): parts.pop(key) for key in list(parts) if key.startswith(start)}
        found[name] = made = _pattern(facts, held, rows)
        # What a reader gives besides has the examples and heads of the site, and queries and keys of its own.
        if made.shape != shape if name == "pattern" else made.shape[:2] != shape[:2]:
            raise FormatError(f"{facts.place} has another shape than its site, {list(shape)}", shape=made.shape)
    return found


def _pattern(entry: Part, held: dict[str, Tensor], rows: bool) -> Pattern:
    facts = {name: part.value for name, part in entry.items().items()}
    family = entry["family"].text()
    del facts["family"]
    _check_facts(entry)
    try:
        made = rebuild(family, facts, held)
    except _REFUSALS as error:
        said = error.message if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
        raise FormatError(f"{entry.place} is no {family}: {said}") from None
    _check_fit(made, entry.place, rows)
    return made


def _check_fit(pattern: Pattern, place: str, rows: bool) -> None:
    """Scores, mask and denominators belong together: some rows are made, and must add up to 1.

    Rows with sink logits add up to less, and rows that see no key to 0.
    """
    if not -pattern.n_queries < pattern.mask.offset <= pattern.n_keys:
        raise FormatError(f"{place} has its queries at {pattern.mask.offset}, beyond its keys", shape=pattern.shape)
    if not rows or not pattern.has_scores or not pattern.denominators_known:
        return
    step = max(1, pattern.n_queries // (_ROWS - 1))
    some = sorted({*range(0, pattern.n_queries, step), pattern.n_queries - 1})
    try:
        sums = pattern.rows(some).sum(-1)
    except CaptureError:
        return  # numbers that are none: said where they are used
    off = sums - 1 if pattern.normalised else (sums - 1).clamp(min=0)
    wrong = (off.abs() > _FAR) & (sums != 0)
    if bool(wrong.any()):
        far = float(sums[wrong][0])
        raise FormatError(f"{place} has rows that add up to {far:.3g}: its scores, mask and lse do not belong together")


def _check_facts(entry: Part) -> None:
    """The facts that patterns share: how scores are scaled, and the rules of the mask."""
    for name in ("scale", "softcap"):
        number = entry.get(name)
        if number is not None:
            number.number()
    if (here := entry.get("here")) is not None:  # of the heads that a process has of a pattern
        _check_facts(here)
    if (rules := entry.get("mask")) is not None:
        wanted = {"n_queries", "n_keys", "causal", "offset", "window"}
        if rules.items().keys() != wanted:
            raise rules.wrong(f"rules that tell of {', '.join(sorted(wanted))}")
        typed.check(Mask, rules.value, rules.place)


def settings_of(entry: Part, tensors: Mapping[str, Tensor]) -> Settings:
    """The settings whose `state` these are."""
    values: dict[str, Any] = {name: part.value for name, part in entry.items().items()}
    known = {field.name for field in fields(Settings)} - APART
    if values.keys() != known:
        raise FormatError(f"{entry.place} does not fit this version: {', '.join(sorted(values.keys() ^ known))}")
    values["statistics"] = tuple(each_text(entry["statistics"]))
    sites, sinks = entry.get("sites"), entry.get("sink_keys")
    values["sites"] = None if sites is None else frozenset(each_text(sites))
    values["sink_keys"] = None if sinks is None else tuple(key.integer(0, _LONGEST) for key in sinks.list())
    for name in ("n_top", "block"):
        entry[name].integer(1, _SMALL)
    values["tokens"] = tensors.get("tokens")
    typed.check(Settings, values, entry.place)
    return Settings(**values)


def _shape_of(name: str, tensor: Tensor, shape: tuple[int, int, int, int]) -> tuple[int | None, ...]:
    """What the shape of a statistic has to be; None where an axis may have any length."""
    batch, heads, queries, keys = shape
    base = name.removeprefix(VALUE_WEIGHTED)
    known = {out: each.axes for each in STATISTICS.values() for out in each.outputs}
    axes: str | None = GRADIENT_SUMS[base].axes if base in GRADIENT_SUMS else known.get(base)
    last = {"query": (queries,), "key": (keys,), "query top": (queries, None), "block": (None, None), "": ()}
    return (batch, heads, *(last[axes] if axes is not None else (None,) * (tensor.dim() - 2)))


def _fits(tensor: Tensor, wanted: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(wanted) and all(n in (None, size) for n, size in zip(wanted, tensor.shape, strict=True))
