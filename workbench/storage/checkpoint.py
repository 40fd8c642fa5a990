"""Checkpoints of a training, to go on from where they were written. They are pickles, and never passed on."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from workbench.storage import disk


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write what `torch.save` takes, replacing the checkpoint before only once it is whole.

    Raises:
        FileError: it cannot be written; the one before stays.
    """
    made = io.BytesIO()
    torch.save(state, made)
    disk.write(path, [made.getbuffer()])
