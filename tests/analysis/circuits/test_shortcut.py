"""Runs that skip unchanged positions give what whole runs give, and leave the modules as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.circuits import ENCODER_DECODERS, SlotModel, Words, task_for, tiny
from workbench.analysis.circuits.engine.setup import open_setup
from workbench.analysis.circuits.engine.shortcut import only_where_changed
from workbench.analysis.circuits.model.anatomy import find_anatomy
from workbench.errors import AttachError
from workbench.hooks.changes import Changes


@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt-neox", *ENCODER_DECODERS])
def test_it_is_the_whole_run(name: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    with (
        workbench.attach(tiny(name), Words()) as wb,
        open_setup(wb, task_for(name, 3, lengths=2), batch_size=3) as setup,
        torch.no_grad(),
    ):
        pair, stream = setup.pairs[0], setup.stream
        logits, _, twin = setup.record(pair)
        last = len(setup.graph.layers) - 1
        module = stream.anatomy.modules[(stream.anatomy.layers[last].mlp or ("",))[0]]
        handle = module.register_forward_pre_hook(lambda module, args: rows.append(args[0].numel()))
        whole = module.forward
        where = torch.arange(3), pair.last

        def at_the_end(old: Tensor) -> Tensor:
            new = old.clone()
            for n in range(times):
                new[3 * n : 3 * n + 3][where] = (n + 1) * twin["z", last - 1][where]
            return new

        hooks: Any = {("z", last - 1): [at_the_end]}
        seen: list[int] = []
        monkeypatch.setattr(module, "forward", lambda x: (seen.append(x.numel()), whole(x))[1])
        fast = stream.run(pair.clean, pair.last, hooks, times=times)
        few = sum(seen)
        stream._recorded = None
        slow = stream.run(pair.clean, pair.last, hooks, times=times)
        assert sum(seen) - few == rows[-1]
        assert few < rows[-1] or pair.clean.get("decoder_input_ids", torch.zeros(1, 9)).shape[1] < 3
        assert torch.allclose(fast, slow, atol=1e-11 if name not in ("llama-gqa", "t5") else 1e-5)
        assert not torch.allclose(fast[:3], logits, atol=1e-6)
        handle.remove()
        monkeypatch.undo()
    assert not any("forward" in module.__dict__ for module in wb.model.modules())


def test_where_nothing_changes_it_gives_what_was_given_to_the_bit() -> None:
    torch.manual_seed(0)
    chain = [nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)]
    given = torch.randn(2, 5, 6)
    gave = nn.Sequential(*chain)(given).detach()
    with torch.no_grad(), Changes() as changes:
        only_where_changed(changes, chain, given, gave)
        same = nn.Sequential(*chain)(given.repeat(3, 1, 1))
        other = given.repeat(3, 1, 1)
        other[4, 2] += 1
        changed = nn.Sequential(*chain)(other)
        longer = nn.Sequential(*chain)(torch.randn(2, 7, 6))
    assert torch.equal(same, gave.repeat(3, 1, 1))
    moved = (changed != same).any(-1).nonzero().tolist()
    assert moved == [[4, 2]]
    assert torch.allclose(changed, nn.Sequential(*chain)(other), atol=1e-6)
    assert longer.shape == (2, 7, 6)
    assert not any("forward" in module.__dict__ for module in chain)


class Shifting(nn.Module):
    """An MLP that looks at the position before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.cumsum(1))


def test_mlps_that_mix_positions_are_refused() -> None:
    model = SlotModel(noise=0.3)
    mixer = Shifting(model.embed.weight.shape[1]).double()

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)

    for block in model.blocks:
        block.mlp = mixer
        block.forward = forward.__get__(block)
    model.blocks[1].mlp = Shifting(model.embed.weight.shape[1]).double()
    with workbench.attach(model) as wb, pytest.raises(AttachError, match="first position is left out"):
        find_anatomy(wb, {"input_ids": torch.tensor([[1, 2, 3, 4]])})
