"""The page itself: facts and data put into the template, and a policy that names the only script and style it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from workbench.json_text import digest, json_for_html
from workbench.report.collect import METRICS, SiteData, SiteMap
from workbench.report.encode import pack, text64
from workbench.tokens import visible, visible_text

SCRIPTS = ("colour.js", "data.js", "dom.js", "heads.js", "pattern.js", "row.js", "main.js")
"""Joined in this order into one module; each file is one subject."""


@dataclass
class SectionData:
    """One capture on the page."""

    sites: list[SiteData]
    provenance: dict[str, Any]
    verification: Any
    text: str | None
    note: str | None
    batch: int
    n_calls: int
    n_top: int


def render(title: str, sections: list[SectionData]) -> str:
    """The whole HTML file. The same captures give the same text."""
    script = "\n".join(_asset(name) for name in SCRIPTS)
    style = _asset("page.css")
    tokens = _TokenTables()
    data = json_for_html({"sections": [_section_json(section, tokens) for section in sections], "tokens": tokens.rows})
    provenance = json_for_html([section.provenance for section in sections])
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        title=visible_text(title.strip()),
        policy=Markup(policy),  # made of our own words and hashes; escaped, its quotes would be hard to read
        style=Markup(style),
        script=Markup(script),
        data=Markup(data),
        data_digest=digest(data),
        provenance=Markup(provenance),
        provenance_digest=digest(provenance),
        sections=[_section_facts(section, i, len(sections)) for i, section in enumerate(sections)],
    )


class _TokenTables:
    """Lists of visible tokens, each kept once: most sites of a model share theirs."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self._known: dict[tuple[str, ...], int] = {}

    def index(self, tokens: list[str] | None) -> int | None:
        if tokens is None:
            return None
        shown = tuple(visible(token) for token in tokens)
        if shown not in self._known:
            self._known[shown] = len(self.rows)
            self.rows.append(list(shown))
        return self._known[shown]


def _asset(name: str) -> str:
    # The policy hashes the text between the tags, and a browser reads \r\n there as \n.
    text = files("workbench.report").joinpath("assets", name).read_text(encoding="utf-8")
    return text.replace("\r\n", "\n")


def _section_json(section: SectionData, tokens: _TokenTables) -> dict[str, Any]:
    used = [name for name in METRICS if any(name in site.means for site in section.sites)]
    groups: dict[str, list[int]] = {}
    for index, site in enumerate(section.sites):
        groups.setdefault(site.group, []).append(index)
    return {
        "metrics": [
            {"name": name, "label": METRICS[name][0], "unit": METRICS[name][1], "meaning": METRICS[name][2]}
            for name in used
        ],
        "groups": [{"label": visible(label), "sites": sites} for label, sites in groups.items()],
        "sites": [_site_json(site, tokens) for site in section.sites],
    }


def _site_json(site: SiteData, tokens: _TokenTables) -> dict[str, Any]:
    return {
        "name": visible(site.name),
        "layer": site.layer,
        "group": visible(site.group),
        "heads": site.n_heads,
        "queries": site.shape[2],
        "keys": site.shape[3],
        "weights": site.weights,
        "queryTokens": tokens.index(site.queries),
        "keyTokens": tokens.index(site.keys),
        "means": {name: [_seven_digits(v) for v in values] for name, values in site.means.items()},
        "missing": None if site.missing is None else visible_text(site.missing),
        "map": None if site.map is None else _map_json(site.map),
    }


def _map_json(found: SiteMap) -> dict[str, Any]:
    data, packed = pack(found.coded)
    top_keys = found.top_keys.astype(f"<u{found.key_bytes}")  # -1 becomes the largest number
    return {
        "block": found.block,
        "rows": found.coded.shape[1],
        "columns": found.coded.shape[2],
        "packed": packed,
        "error": float(f"{found.error:.2g}"),
        "first": found.first,
        "data": text64(data),
        "sink": None if found.sink is None else text64(found.sink.astype("<f4").tobytes()),
        "top": found.top_weights.shape[2],
        "wide": found.key_bytes == 4,
        "topKeys": text64(np.ascontiguousarray(top_keys).tobytes()),
        "topWeights": text64(np.ascontiguousarray(found.top_weights.astype("<f4")).tobytes()),
    }


def _seven_digits(value: float) -> float | None:
    """What a float32 is worth; None for NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _section_facts(section: SectionData, index: int, n_sections: int) -> dict[str, Any]:
    sites = section.sites
    heads = sum(site.n_heads for site in sites)
    lengths = dict.fromkeys((site.group, *site.shape[2:]) for site in sites)
    sizes = {sizes for _, *pair in lengths for sizes in [tuple(pair)]}
    if len(sizes) == 1 and sites[0].shape[2] == sites[0].shape[3]:
        tokens = _count(sites[0].shape[2], "token")
    else:
        tokens = "; ".join(f"{visible(group)}: {q:,} queries × {k:,} keys" for group, q, k in lengths)
    facts = [
        ("Length", tokens),
        ("Attention", f"{_count(len(sites), 'site')}, {_count(heads, 'head')}"),
        ("Kernel", ", ".join(dict.fromkeys(visible(site.kernel) for site in sites))),
    ]
    if section.n_calls > 1:
        facts.append(("Shown", f"the first of {section.n_calls:,} forward calls"))
    if sites[0].shape[0] > 1:
        facts.append(("Batch row", f"{section.batch} of 0 to {sites[0].shape[0] - 1}"))
    name = _model_name(section.provenance)
    return {
        "index": index,
        "heading": name if n_sections == 1 else f"{index + 1}. {name}",
        "facts": facts,
        "text": None if section.text is None else visible_text(section.text),
        "note": None if section.note is None else visible_text(section.note),
        "verification": _verification(section.verification),
        "sites": [
            {
                "name": visible(site.name),
                "layer": site.layer,
                "kind": visible(f"{site.tower} {site.kind}".strip()),
                "heads": site.n_heads,
                "kv_heads": _or_unknown(site.n_kv_heads),
                "d_head": _or_unknown(site.d_head),
                "kernel": visible(site.kernel),
                "weights": site.weights,
                "shape": " × ".join(f"{size:,}" for size in site.shape),
            }
            for site in sites
        ],
        "provenance": [(visible_text(key), visible_text(value)) for key, value in _flat(section.provenance)],
    }


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _model_name(provenance: dict[str, Any]) -> str:
    """The first of the usual keys; a model without a name is called by its class."""
    flat = dict(_flat(provenance))
    for key in ("model name", "model", "name", "model path", "model class", "class"):
        if flat.get(key):
            # A model loaded from a folder is called by its path; the last part says enough.
            return visible_text(PurePath(flat[key]).name or flat[key], 120)
    return "Capture"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as pairs to read: {"versions": {"torch": "2"}} gives ("versions torch", "2")."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in _flat(item, f"{prefix} {key}".strip())]
    if isinstance(value, (list, tuple)):
        text = ", ".join(str(item) for item in value)
    elif isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, int):
        text = f"{value:,}"
    else:
        text = "unknown" if value is None else str(value)
    return [(prefix.replace("_", " "), text)]


def _verification(found: Any) -> dict[str, Any] | None:
    """The verdict as lines to read, and one row per check."""
    if found is None:
        return None
    checks = list(found.checks)
    fired = [check for check in checks if check.get("fired")]
    lines = [(len(fired) == len(checks) > 0, f"{len(fired)} of {_count(len(checks), 'check')} saw their site fire")]
    if len(fired) == len(checks) > 0:
        lines = [(True, f"All {_count(len({check['site'] for check in checks}), 'site')} fired")]
    same = getattr(found, "identical", None)
    if same is not None:
        with_or_without = "Output identical to the bit with and without the capture"
        lines.append((bool(same), with_or_without if same else "The capture changed the model’s output"))
    for key, meaning in (("row_sum_error", "Rows sum to 1"), ("output_error", "A·V equals the kernel’s output")):
        errors = [(float(check[key]), check) for check in fired if check.get(key) is not None]
        if key == "row_sum_error":  # NaN where rows need not sum to 1
            errors = [pair for pair in errors if not math.isnan(pair[0])]
        if errors:
            # NaN compares with nothing, and it is the worst there is.
            worst, check = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
            fine = all(error <= each.get("tolerance", math.inf) for error, each in errors)
            lines.append((fine, f"{meaning}: largest error {worst:.2g}, at {visible(str(check['site']))}"))
    return {
        "ok": bool(found.ok),
        "lines": lines,
        "rows": [
            {
                "site": visible(str(check["site"])),
                "ok": _yes(check.get("ok")),
                "fired": _yes(check.get("fired")),
                "row_sum_error": _error(check.get("row_sum_error")),
                "output_error": _error(check.get("output_error")),
                "tolerance": _error(check.get("tolerance")),
                "kernel": visible(str(check["kernel"])) if check.get("kernel") else "none",
            }
            for check in checks
        ],
    }


def _yes(value: bool | None) -> str:
    return "not checked" if value is None else "yes" if value else "no"


def _error(value: float | None) -> str:
    return "not checked" if value is None or math.isnan(value) else f"{float(value):.2g}"
