"""Analyses of models whose weights are elsewhere until a module runs: as those of the same model in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import workbench
from support.circuits import Words, random_task, tiny


def offloaded(model: nn.Module) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    found: nn.Module = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(found.parameters()).device.type == "meta"
    return found


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_offloaded_models_are_patched_and_explained(name: str) -> None:
    model = tiny(name, torch.float32)
    task = random_task(2, 5, 60, written=name == "t5")
    ids = torch.tensor([[5, 9, 13, 7]])

    def of(model: nn.Module) -> list[torch.Tensor]:
        with workbench.attach(model, Words()) as wb:
            how: dict[str, Any] = {"hypothesis": torch.tensor([8, 11]), "progress": False}
            found = [workbench.saliency(wb, {"input_ids": ids}, "occlusion", **how).scores]
            found += [
                workbench.patch_layers(wb, task, what, progress=False).effects for what in ("resid_pre", "attn_out")
            ]
            return [*found, task.logit_diff(model, Words())]

    for here, there in zip(of(model), of(offloaded(model)), strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-4, equal_nan=True)
