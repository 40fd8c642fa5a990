"""What every mechanism is shown: one short text, three scenes, and the examples on which heads are ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.mechanisms.training import Scenes, copying, corpus, recall, scenes, text_batch, text_ids
from workbench.mechanisms.training.text import BOS, IGNORE
from workbench.metrics import Metric

TEXT = "def add(row):\n    s = sum(row)\n    return s\n\ndef avg(row):\n    s = sum(row)\n    return "
"""Nobody was trained on it. Its second half begins again, and what comes next can be copied."""
_SCENES = 3
_SEED = 5


class Characters:
    """Bytes as characters, in the place of a tokenizer, so that captures have texts."""

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """The characters of some ids."""
        return "".join("BOS" if i == BOS else chr(i) for i in map(int, ids))


def shown_text() -> Tensor:
    """[1, token]: the text behind BOS."""
    return text_ids(TEXT)


def shown_scenes() -> Scenes:
    """Scenes of three digits each."""
    return scenes(_SCENES, torch.Generator().manual_seed(_SEED), n_digits=3)


class Examples(dict[str, Tensor]):
    """Model inputs, with what is right beside them: classes, or the next bytes, `IGNORE` where none counts."""

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        super().__init__(inputs)
        self.labels = labels


def _loss(output: Tensor, batch: Examples) -> Tensor:
    nats = F.cross_entropy(output.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORE, reduction="none")
    nats, counts = nats.view(batch.labels.shape), batch.labels != IGNORE
    return (nats * counts).sum(-1) / counts.sum(-1) if nats.dim() == 2 else nats


LOSS = Metric("loss", _loss, higher_is_better=False, unit="nats")


def text_examples(length: int, rows: int) -> list[Examples]:
    """As many rows of held-out code as of recall and copying together."""
    random = torch.Generator().manual_seed(_SEED)
    made = rows // 2
    parts = [text_batch(corpus("held out"), rows - made, length, random)]
    parts += [recall(made - made // 2, length, random), copying(made // 2, length, random)] if made else []
    return [Examples({"ids": ids}, labels) for ids, labels in parts if len(ids)]


def scene_examples(rows: int) -> list[Examples]:
    """Scenes of three digits."""
    found = scenes(rows, torch.Generator().manual_seed(_SEED + 1), n_digits=3)
    return [Examples({"images": found.images}, found.classes)]
