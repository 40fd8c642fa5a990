"""A text as a section of a report: verified, captured, shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import CaptureError
from workbench.hooks.configs import read

if TYPE_CHECKING:
    from workbench.report.report import Report
    from workbench.session.workbench import Workbench

_STATISTICS = ("entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "received")
_NEW_TOKENS = 32


def inputs(wb: Workbench, text: str) -> dict[str, Any]:
    """Model inputs for a text; an encoder-decoder also gets the tokens that it generates itself.

    Raises:
        CaptureError: the model does not take text.
    """
    model: Any = wb.model
    takes = getattr(model, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise CaptureError(f"the model takes {takes}, not text", hint="attach and capture it from Python")
    found: dict[str, Any] = dict(wb.tokenize(text))
    if read(read(model, "config"), "is_encoder_decoder", False):
        found["decoder_input_ids"] = model.generate(**found, max_new_tokens=_NEW_TOKENS, do_sample=False)
    return found


def add_prompt(report: Report, wb: Workbench, text: str, *, title: str | None = None, note: str | None = None) -> None:
    """Verify the model on a text, capture it there, and add the capture to the report.

    Raises:
        CaptureError: the model does not take text, or a check failed.
    """
    with torch.inference_mode():
        given = inputs(wb, text)
        verification = wb.verify(**given).raise_if_failed()
        names = [*_STATISTICS, "induction"] if "decoder_input_ids" not in given else list(_STATISTICS)
        with wb.capture(names) as capture:
            wb.model(**given)
    report.add(capture, title=title, text=text, verification=verification, note=note)
