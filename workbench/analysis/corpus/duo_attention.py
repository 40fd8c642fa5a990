"""DuoAttention's files of head scores, which kvpress reads too: a matrix with tabs, and a configuration beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from workbench.errors import FormatError, WorkbenchError
from workbench.storage import disk
from workbench.storage.parts import parse

HEADS, CONFIG = "full_attention_heads.tsv", "config.json"


def write_duo_attention(folder: str | Path, rows: Sequence[Sequence[float]], *, sinks: int, recent: int) -> Path:
    """Write scores [layer, kv head] from 0 (streaming) to 1 (the whole cache).

    Raises:
        FileError: it cannot be written. WorkbenchError: layers have different numbers of heads, or a score is none.
    """
    if len({len(row) for row in rows}) != 1:
        raise WorkbenchError("the file has the same number of heads in every layer; this model's layers differ")
    if not all(math.isfinite(score) for row in rows for score in row):
        raise WorkbenchError("a head has no score", hint="windows must be longer than sinks= and recent= together")
    target = disk.folder(folder)
    lines = ["\t".join(repr(min(1.0, max(0.0, score))) for score in row) for row in rows]
    disk.write(target / HEADS, "\n".join(lines) + "\n")
    disk.write(target / CONFIG, json.dumps({"sink_size": sinks, "recent_size": recent}))
    return target


def read_duo_attention(folder: str | Path) -> tuple[Tensor, int, int]:
    """Scores [layer, kv head] of such a folder, and how many sinks and recent keys streaming heads keep.

    Raises:
        FormatError: it is no such folder.
    """
    where = disk.readable(folder)
    try:
        text, config = disk.text(where / HEADS), disk.content(where / CONFIG)
        rows = [[float(number) for number in line.split("\t")] for line in text.splitlines() if line.strip()]
        scores = torch.tensor(rows, dtype=torch.float64)
    except OSError as error:
        raise FormatError(f"{where.name} has no scores of DuoAttention: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise FormatError(f"{HEADS} is no matrix of numbers: {error}") from None
    if scores.dim() != 2 or not scores.isfinite().all():
        raise FormatError(f"{HEADS} is no matrix [layer, kv head] of finite numbers")
    facts = parse(config, CONFIG)
    return scores.clamp(0, 1), facts["sink_size"].integer(0), facts["recent_size"].integer(0)
