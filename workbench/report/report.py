"""`Report`: gather captures, fit them into the size limit, write one HTML file."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ReportError
from workbench.report.collect import collect, single_call
from workbench.report.encode import base64_size, pool
from workbench.report.page import SectionData, render
from workbench.tokens import visible_text

if TYPE_CHECKING:
    from workbench.capture import Capture

LIMIT_BYTES = 6_000_000
N_TOP = 8
_SHARE_OF_EXACT = 0.4  # the part of the page that exact weights may take from the maps
_COARSEST = 8 * 8  # cells per head below which a map says nothing
_NAMES = 400  # characters of JSON around each map


@dataclass(frozen=True)
class _Section:
    capture: Capture
    text: str | None
    verification: Any
    batch: int
    note: str | None


class Report:
    """One HTML file about captures; it works from disk with the network off.

    >>> Report("Heads of a small model")
    Report('Heads of a small model', empty: add a capture)
    """

    def __init__(self, title: str) -> None:
        if not isinstance(title, str) or not title.strip():
            raise ReportError(f"a report needs a title, not {title!r}", hint='write Report("Heads of my model")')
        self.title = title
        self._sections: list[_Section] = []

    def add(
        self,
        capture: Capture,
        *,
        text: str | None = None,
        verification: Any = None,
        batch: int = 0,
        note: str | None = None,
    ) -> Report:
        """Add a section that shows one batch row of the capture's first forward call; returns the report.

        Args:
            text: the prompt as the person wrote it.
            verification: what `wb.verify(...)` returned for these inputs.
            note: a sentence to stand above the section.

        Raises `ReportError` when this is no capture, it is empty, or it has no such batch row.
        """
        call, _ = single_call(capture)
        if not call.sites:
            raise ReportError("no site fired in this capture", hint="call the model inside `with wb.capture() as cap:`")
        n_batch = int(call[call.sites[0].name].shape[0])
        if not 0 <= batch < n_batch:
            raise ReportError(f"the capture has batch rows 0 to {n_batch - 1}, not {batch}")
        self._sections.append(_Section(capture, text, verification, batch, note))
        return self

    def to_html(self, *, limit_bytes: int = LIMIT_BYTES) -> str:
        """The page as text of at most `limit_bytes` in UTF-8; maps are max-pooled until it fits.

        Raises `ReportError` when the report is empty or cannot be made to fit.
        """
        if not self._sections:
            raise ReportError("the report is empty", hint="add a capture: Report(title).add(cap)")
        n_top = _affordable_top(self._sections, limit_bytes)
        sections = []
        for section in self._sections:
            call, n_calls = single_call(section.capture)
            sections.append(
                SectionData(
                    sites=collect(call, section.batch, n_top),
                    provenance=dict(call.provenance or {}),
                    verification=section.verification,
                    text=section.text,
                    note=section.note,
                    batch=section.batch,
                    n_calls=n_calls,
                    n_top=n_top,
                )
            )
        _shrink(sections, limit_bytes - _size_without_maps(self.title, sections))
        page = render(self.title, sections)
        size = len(page.encode("utf-8"))
        if size > limit_bytes:
            raise ReportError(
                f"the page takes {size:,} bytes and the limit is {limit_bytes:,}",
                hint="capture fewer sites, add fewer captures, or raise limit_bytes",
            )
        return page

    def write(self, path: str | Path, *, limit_bytes: int = LIMIT_BYTES) -> Path:
        """Write the page and return its path; an older file there is replaced in one step or not at all.

        Raises `ReportError` when the folder does not exist, cannot be written, or the page would be too large.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise ReportError(f"there is no folder {target.parent}", hint="create it, or write somewhere else")
        if target.is_dir():
            raise ReportError(f"{target} is a folder", hint=f"write to {target / 'report.html'}")
        page = self.to_html(limit_bytes=limit_bytes)
        unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            unfinished.write_text(page, encoding="utf-8", newline="\n")
            os.replace(unfinished, target)
        except OSError as error:
            raise ReportError(f"{target} cannot be written: {error.strerror or error}") from error
        finally:
            unfinished.unlink(missing_ok=True)
        return target

    def __repr__(self) -> str:
        title = repr(visible_text(self.title, 80))
        if not self._sections:
            return f"Report({title}, empty: add a capture)"
        calls = [single_call(section.capture)[0] for section in self._sections]
        sites = sum(len(call.sites) for call in calls)
        heads = sum(int(call[site.name].shape[1]) for call in calls for site in call.sites)
        captures = f"{len(calls)} capture{'s' if len(calls) > 1 else ''}"
        return f"Report({title}, {captures}, {sites} sites, {heads} heads)"


def _affordable_top(sections: list[_Section], limit_bytes: int) -> int:
    """How many exact weights per row the page can hold: 8 when they fit, else fewer, down to none."""
    rows = 0
    for section in sections:
        call, _ = single_call(section.capture)
        rows += sum(int(call[site.name].shape[1]) * int(call[site.name].shape[2]) for site in call.sites)
    share = _SHARE_OF_EXACT * limit_bytes
    return next((n for n in (N_TOP, 4, 2, 1) if base64_size((6 * n + 4) * rows) <= share), 0)


def _size_without_maps(title: str, sections: list[SectionData]) -> int:
    """Bytes of everything else on the page."""
    bare = [replace(section, sites=[replace(site, map=None) for site in section.sites]) for section in sections]
    return len(render(title, bare).encode("utf-8"))


def _shrink(sections: list[SectionData], room: int) -> None:
    """Halve the finest maps until all fit into `room` bytes, so that no site pays for another.

    Raises `ReportError` when they do not even as coarse maps.
    """
    maps = [site.map for section in sections for site in section.sites if site.map is not None]
    room -= sum(each.extra_size() + _NAMES for each in maps)
    while maps and sum(each.size() for each in maps) > room:
        largest = max(each.coded[0].size for each in maps)
        if largest <= _COARSEST:
            raise ReportError(
                f"the patterns of {len(maps)} sites take {sum(each.size() for each in maps):,} bytes even when pooled "
                f"to {largest} cells a head, and the limit leaves them {max(room, 0):,}",
                hint="capture fewer sites, add fewer captures, or raise limit_bytes",
            )
        for each in maps:
            if each.coded[0].size == largest:
                each.coded, each.block, each.first = pool(each.coded), each.block * 2, each.first // 2
