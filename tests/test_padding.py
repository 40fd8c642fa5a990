"""A prompt in a padded batch has the means that it has alone, on whichever side its padding stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import workbench
from support.tiny import family, make
from workbench import Capture
from workbench.capture.padding import padding_of

NAMES = ("entropy", "sink", "distance", "received", "received_mean", "value_weighted_received", "previous")


def captured(model: Any, ids: Tensor, mask: Tensor | None = None) -> Capture:
    with torch.no_grad(), workbench.attach(model) as wb, wb.capture(NAMES, values=True) as cap:
        model(input_ids=ids, attention_mask=mask)
    return cap


@pytest.mark.parametrize("name", ["llama-gqa", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(name: str, side: str) -> None:
    model = make(family(name))
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    hidden, own = (slice(5, 9), slice(0, 5)) if side == "right" else (slice(0, 4), slice(4, 9))
    mask[0, hidden] = 0
    together = captured(model, ids, mask)
    # Positions count from the left, so that with padding on the left only relative ones give the numbers of the prompt.
    alone = captured(model, ids[:1, own]) if side == "right" else None
    gone = padding_of(together[0])
    assert gone is not None
    assert gone.tolist() == (mask == 0).tolist()
    for statistic in NAMES:
        table = together.table(statistic)
        assert table.loc[table["batch"] == 1, "n"].max() == 9 - (statistic == "previous")
        mine = table.loc[table["batch"] == 0]
        assert set(mine["n"]) == {5 - (statistic == "previous")}
        if alone is not None:
            np.testing.assert_allclose(mine[statistic], alone.table(statistic)[statistic], atol=2e-6)


def test_what_is_no_padding_counts() -> None:
    """Without a mask, and where tokens do not see themselves, all rows count."""
    ids = torch.randint(3, 40, (2, 7))
    assert padding_of(captured(make(family("llama-gqa")), ids)[0]) is None
    strict = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril(-1)
    strict[..., 0, 0] = True

    class Strict(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=strict)

    model = Strict()
    with torch.no_grad(), workbench.attach(model, check=False) as wb, wb.capture(["entropy"]) as cap:
        model(torch.randn(1, 2, 7, 4))
    assert padding_of(cap[0]) is None
    assert set(cap.table("entropy")["n"]) == {7}
