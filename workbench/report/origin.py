"""The provenance block of a report: what was run on what, by which software, as JSON that the page also shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.counting import numbered
from workbench.report.sections import Section, flat
from workbench.storage.json_text import finite
from workbench.storage.provenance import command_line, commit, now, repeatable, versions

SCHEMA_VERSION = 1
_PER_RUN = ("created",)  # keys in which runs of the same thing differ
_WANTED = ("model_name", "weights_sha256", "tokenizer_sha256", "device", "dtype", "attention_backend")


def build(
    *,
    title: str,
    question: str | None,
    seeds: Any,
    wall_time: float,
    sections: Sequence[Section],
    figures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole block; what is not known stands in it as null.

    Args:
        wall_time: seconds; left out where SOURCE_DATE_EPOCH asks for the same bytes in every run.
        figures: id, kind and title of each.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        "question": question,
        "created": now(),
        "command_line": command_line(),
        "wall_time_seconds": None if repeatable() else round(wall_time, 1),
        "seeds": finite(seeds),
        "software": {"versions": versions(), "commit": commit()},
        "sources": _sources(sections),
        "data": [{"section": i + 1, **section.data} for i, section in enumerate(sections) if section.data],
        "metric": sorted({str(s.origin["metric"]) for s in sections if s.origin.get("metric")}) or None,
        "figures": [dict(figure) for figure in figures],
    }


def _sources(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Each model or analysis once, with the sections that come from it."""
    found: list[dict[str, Any]] = []
    for number, section in enumerate(sections, 1):
        if not section.origin:
            continue
        facts = {**dict.fromkeys(_WANTED), **finite(section.origin)} if "model_class" in section.origin else None
        facts = finite(section.origin) if facts is None else facts
        core = {key: value for key, value in facts.items() if key not in _PER_RUN}
        known = next((source for source in found if source["facts"] == core), None)
        if known is None:
            found.append({"sections": [number], "facts": core})
        else:
            known["sections"].append(number)
    return found


def shown(block: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The block as groups of pairs to read; tokens and figures are in the JSON only."""
    run = {key: block[key] for key in ("created", "command_line", "wall_time_seconds", "seeds", "metric")}
    if run["wall_time_seconds"] is None:
        run["wall_time_seconds"] = "left out (SOURCE_DATE_EPOCH is set)"
    for key in ("seeds", "metric"):
        run[key] = "none" if run[key] is None else run[key]
    groups = [("This run", flat({**run, "report_schema": block["schema_version"]}))]
    software = dict(block["software"])
    software["commit"] = software["commit"] or "not a git checkout"
    groups.append(("Software", flat(software)))
    for source in block["sources"]:
        numbers = source["sections"]
        which = numbered("Section", numbers)
        # The versions of this run stand above already.
        facts = {k: v for k, v in source["facts"].items() if k != "versions" or v != block["software"]["versions"]}
        groups.append((which, flat(facts)))
    data = [(f"Prompt of section {each['section']}", each["prompt"]) for each in block["data"] if each.get("prompt")]
    return [*groups, *([("Data", data)] if data else [])]
