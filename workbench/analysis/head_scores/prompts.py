"""Prompts as rows of ids, and the heads of a model's self-attention on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.logits.asked import sites_on_tokens
from workbench.capture.site_capture import SiteCapture
from workbench.errors import CaptureError, expect
from workbench.inputs import check_inputs, decoder_start, device_for_inputs, without_cache
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task

_SHORT = 4  # tokens that are enough to see what fires
Ids = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class HeadNames:
    """Layer, head and site of every head, in order."""

    layers: tuple[int, ...]
    numbers: tuple[int, ...]
    sites: tuple[str, ...]

    @classmethod
    def of(cls, several: Sequence[SiteCapture]) -> HeadNames:
        """Those of sites, in their order."""
        heads = [(one.site, head) for one in several for head in range(one.shape[1])]
        return cls(
            tuple(site.layer for site, _ in heads), tuple(head for _, head in heads),
            tuple(site.name for site, _ in heads),
        )  # fmt: skip


def is_one(given: Any) -> bool:
    """Whether this is one text, or the ids of one, and not several."""
    if isinstance(given, Tensor):
        return given.dim() <= 1
    return isinstance(given, str) or (isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], int))


def ids_of(wb: Workbench, given: Ids) -> Tensor:
    """[position] ids of a text, or of ids.

    Raises:
        CaptureError: no tokenizer for a text, or no whole numbers.
    """
    if isinstance(given, str):
        return wb.tokenize(given)["input_ids"][0]
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(f"a prompt is a text, or its ids, and no {type(given).__name__}") from error
    if found.dim() != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise CaptureError("ids are whole numbers [position], at least one", shape=found.shape)
    return found.long().to(device_for_inputs(wb.model))


def rows_of(wb: Workbench, prompts: Any) -> Iterator[Tensor]:
    """[position] ids of each prompt: a text or several, a Task, ids, or model inputs, of which padding is left out."""
    if isinstance(prompts, Task):
        for i in range(len(prompts)):
            yield ids_of(wb, prompts[i].prompt)
    elif is_one(prompts):
        yield ids_of(wb, prompts)
    elif isinstance(prompts, Mapping):
        ids, mask = prompts.get("input_ids"), prompts.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise CaptureError("the inputs have no input_ids [batch, position]")
        for i, row in enumerate(ids):
            yield row if mask is None else row[mask[i].bool()]
    else:
        expect(Iterable, prompts=prompts)
        for one in prompts:
            yield ids_of(wb, one)


def one_row(wb: Workbench, ids: Tensor) -> dict[str, Any]:
    """Model inputs of one prompt, without a cache.

    Raises:
        CaptureError: an encoder-decoder, or ids that the model does not take.
    """
    if decoder_start(wb.model) is not None:
        raise CaptureError("these scores are of models that write behind their prompt, not of an encoder-decoder")
    inputs = {"input_ids": ids[None], **without_cache(wb.model)}
    check_inputs(wb.model, (), inputs)
    return inputs


def self_attention(wb: Workbench, ids: Tensor) -> list[str]:
    """Names of the sites that are self-attention over these tokens.

    Raises:
        CaptureError: there are none, or the model does not run on tokens alone.
    """
    fired = sites_on_tokens(wb, one_row(wb, ids[:_SHORT]))
    names = [site.name for site in wb.sites if site.kind == "self" and site.name in fired]
    if not names:
        raise CaptureError("the model has no self-attention, whose keys a cache would keep")
    return names
