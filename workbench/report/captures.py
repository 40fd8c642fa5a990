"""The section of a capture: facts, verdict, sites, head atlas, attention pattern, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench import views
from workbench.counting import count
from workbench.errors import ReportError, WorkbenchError
from workbench.report import verdict
from workbench.report.sections import Section, Table
from workbench.tokens import visible, visible_text
from workbench.views.base.spec import ViewSpec
from workbench.views.results.recurrences import recurrences

if TYPE_CHECKING:
    from workbench.capture.capture import Capture
    from workbench.capture.site_capture import SiteCapture

_MOST_TOKENS = 20_000  # in a strip of its own


def first_call(capture: Capture) -> Capture:
    """The call that a report shows.

    Raises:
        ReportError: the capture holds none, or no site fired in it.
    """
    if not capture.calls:
        raise ReportError("the capture is empty", hint="call the model inside `with wb.capture() as cap:`")
    call = capture.calls[0]
    if not call.sites:
        raise ReportError("no site fired in this capture", hint="call the model inside `with wb.capture() as cap:`")
    return call


def check_batch(call: Capture, batch: int) -> None:
    """Raises ReportError unless every site has this batch row."""
    rows = min(int(site.shape[0]) for site in call)
    if not 0 <= batch < rows:
        raise ReportError(f"the capture has batch rows 0 to {rows - 1}, not {batch}")


def section(
    capture: Capture,
    *,
    title: str | None,
    text: str | None,
    verification: Any,
    batch: int,
    note: str | None,
    caption: str | None,
    budget: int,
) -> Section:
    """The section of one batch row of the capture's first forward.

    Args:
        budget: most cells of the attention pattern's maps together.
    """
    call = first_call(capture)
    name = _model_name(call.provenance)
    found = Section(
        heading=visible_text(title, 200) if title else name,
        note=note,
        prompt=None if text is None else visible_text(text),
        facts=_facts(capture, call, batch),
        verdict=verdict.verdict(verification),
        tables=[_sites(call)],
        figures=_figures(call, batch, budget, caption),
        limits=[*verdict.limits(verification), *_limits(capture, call)],
        origin=dict(call.provenance),
        data={
            "prompt": None if text is None else visible_text(text),
            "tokens": _all_tokens(call, batch),
            "batch_row": batch,
            "shapes": sorted({tuple(site.shape) for site in call}),
        },
    )
    if verification is not None:
        found.tables.append(verdict.table(verification))
    return found


def _figures(call: Capture, batch: int, budget: int, caption: str | None) -> list[ViewSpec]:
    made: list[views.View] = [views.head_atlas(call)] if call.statistics else []
    if any(site.lazy is not None or site.weights is not None for site in call):
        made.append(views.attention_pattern(call, batch=batch, budget=budget))
    if any(pattern.log_decay is not None for _, pattern in recurrences(call)):
        title = "Content and decay of recurrent layers"
        apart = views.attention_pattern(call, batch=batch, apart=True, budget=budget // 2, title=title)
        made += [views.half_lives(call), apart]
    strip = _strip(call, batch)
    if strip is not None:
        made.append(strip)
    return [view.spec for view in made]


def _strip(call: Capture, batch: int) -> views.View | None:
    """How much attention each token receives, where the tokens and that statistic are known."""
    sites = [site for site in call if site.site.kind == "self" and "received" in site.statistics]
    tokens = call.key_tokens(sites[0].site.name) if sites else None
    if tokens is None or not 1 < len(tokens[batch]) <= _MOST_TOKENS:
        return None
    n = len(tokens[batch])
    same = [site for site in sites if site.shape[2:] == (n, n)]
    if not same:
        return None
    received = np.stack([site.received[batch].double().mean(0).cpu().numpy() for site in same])
    channels = {"all layers": received.mean(0)}
    channels |= {f"layer {site.site.layer}": row for site, row in zip(same, received, strict=True) if len(same) <= 48}
    return views.token_strip(
        tokens[batch],
        channels,
        unit="weight, summed over queries",
        title="Attention received by each token",
        caption=f"The weight that each of {n:,} tokens receives, summed over the queries and averaged over the heads "
        f"of {count(len(same), 'site')}.{_of_early(same)}",
        provenance=call.provenance,
    )


def _of_early(sites: Sequence[SiteCapture]) -> str:
    """What a causal mask does to the sums, where there is one."""
    for site in sites:
        try:
            if site.pattern.mask.causal:
                return " Under the causal mask early tokens can be seen by more queries."
        except WorkbenchError:
            continue  # the pattern was not kept
    return ""


def _all_tokens(call: Capture, batch: int) -> dict[str, list[str]]:
    forward = call._only()
    return {stream: [visible(token) for token in rows[batch]] for stream, rows in forward.tokens.items() if rows}


def _facts(capture: Capture, call: Capture, batch: int) -> list[tuple[str, str]]:
    sites = list(call)
    heads = sum(int(site.shape[1]) for site in sites)
    lengths = dict.fromkeys((f"{site.site.tower} {site.site.kind}".strip(), *site.shape[2:]) for site in sites)
    if len({size for _, q, k in lengths for size in (q, k)}) == 1:
        tokens = count(int(sites[0].shape[2]), "token")
    else:
        tokens = "; ".join(f"{visible(name)}: {q:,} queries × {k:,} keys" for name, q, k in lengths)
    facts = [
        ("Length", tokens),
        ("Attention", f"{count(len(sites), 'site')}, {count(heads, 'head')}"),
        ("Kernel", ", ".join(dict.fromkeys(visible(str(site.kernel or "unknown")) for site in sites))),
    ]
    if len(capture.calls) > 1:
        facts.append(("Shown", f"the first of {len(capture.calls):,} forward calls"))
    if sites[0].shape[0] > 1:
        facts.append(("Batch row", f"{batch} of 0 to {sites[0].shape[0] - 1}"))
    return facts


def _sites(call: Capture) -> Table:
    rows = []
    for record in call:
        site = record.site
        rows.append(
            [
                visible(site.name),
                str(site.layer),
                visible(f"{site.tower} {site.kind}".strip()),
                str(record.shape[1]),
                _or_unknown(site.n_kv_heads),
                _or_unknown(site.d_head),
                visible(str(record.kernel or "unknown")),
                record.marks,
                " × ".join(f"{size:,}" for size in record.shape),
            ]
        )
    columns = ["Site", "Layer", "Kind", "Heads", "KV heads", "d_head", "Kernel", "Weights"]
    numeric = [name in ("Layer", "Heads", "KV heads", "d_head") for name in columns]
    return Table("Sites", [*columns, "Batch × head × query × key"], rows, len(rows), [*numeric, False])


def _limits(capture: Capture, call: Capture) -> list[str]:
    sites = list(call)
    found = []
    if len(capture.calls) > 1:
        found.append(f"only the first of {len(capture.calls):,} forward calls is shown")
    if sites[0].shape[0] > 1:
        found.append(f"only one of {int(sites[0].shape[0]):,} batch rows is shown")
    signed = [site for site in sites if site.marks != "normalised"]
    if signed:
        found.append(
            f"the weights of {count(len(signed), 'site')} are signed or do not sum to 1: statistics and maps are of "
            "|A|, normalised per row"
        )
    missing = [site for site in sites if site.lazy is None and site.weights is None]
    if missing:
        found.append(f"the patterns of {count(len(missing), 'site')} were not kept, so they are not shown")
    if call.silent:
        listed = ", ".join(visible(name) for name in call.silent[:5])
        found.append(f"{count(len(call.silent), 'site')} never fired: {listed}{' …' if len(call.silent) > 5 else ''}")
    if call.unchosen:
        found.append(f"{count(len(call.unchosen), 'more site')} of the model not asked for")
    unread = call.model_sites.unread
    if unread:
        listed = ", ".join(visible(f"{one.name} ({one.cls})") for one in unread[:5])
        found.append(
            f"{count(len(unread), 'module')} not read, where tokens are mixed or may be: "
            f"{listed}{' …' if len(unread) > 5 else ''}"
        )
    if call.model_sites.looked is False:
        found.append("whether other modules mix tokens was not looked at (wb.look, wb.verify)")
    for name, missed in list(call.unrecorded.items())[:5]:
        found.append(visible(f"{name or 'the model'}: {missed}"))
    if len(call.unrecorded) > 5:
        found.append(f"calls of {count(len(call.unrecorded) - 5, 'more site')} were not recorded")
    if call.provenance.get("training"):
        found.append("the model was in training mode, so dropout may have acted")
    if not call.provenance.get("weights_sha256"):
        found.append("the weights have no hash: they changed after the capture, or were never hashed")
    return found


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _model_name(provenance: Any) -> str:
    """What the model is called; one without a name goes by its class."""
    for key in ("model_name", "model", "name", "model_class"):
        if provenance.get(key):
            # A model loaded from a folder is called by its path; the last part says enough.
            name = str(provenance[key])
            return visible_text(PurePath(name).name or name, 120)
    return "Capture"
