"""Models whose layers share more than the stream: forwards that begin at a later block would miss it, and are whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import workbench
from workbench import AttachError, attach

D, H, WORDS = 8, 2, 12


class Attention(nn.Module):
    """Every second layer has the keys and values of the one before, which lie in a dict."""

    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.num_heads, self.shares = H, shares
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        if not self.shares:
            shared["kv"] = self.kv(x)
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (self.q(x), *shared["kv"].chunk(2, -1)))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, shares: bool) -> None:
        super().__init__()
        self.attn = Attention(shares)

    def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
        return x + self.attn(x, shared)


class Model(nn.Module):
    def __init__(self, layers: int, kept: bool) -> None:
        super().__init__()
        self.embed, self.head, self.kept, self.shared = nn.Embedding(WORDS, D), nn.Linear(D, WORDS), kept, {}
        self.blocks = nn.ModuleList(Block(i % 2 == 1) for i in range(layers))

    def forward(self, input_ids: Tensor) -> Tensor:
        x, shared = self.embed(input_ids), self.shared if self.kept else {}
        for block in self.blocks:
            x = block(x, shared)
        return self.head(x)


def ids(batch: int) -> Tensor:
    return torch.randint(0, WORDS, (batch, 5), generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(("layers", "kept", "batch"), [(4, True, 3), (4, True, 1), (3, True, 3), (4, False, 3)])
def test_sweeps_are_those_of_whole_forwards(layers: int, kept: bool, batch: int) -> None:
    torch.manual_seed(0)
    batches = [{"input_ids": ids(batch)}]

    def scores(wb: workbench.Workbench, **how: Any) -> Tensor:
        found = workbench.head_importance(wb, batches, lambda y, batch: y[:, -1, 1], "zero", progress=False, **how)
        return next(iter(found.scores.values()))

    with attach(Model(layers, kept).eval()) as wb:
        with pytest.warns(UserWarning, match="runs whole forwards: a forward resumed at"):
            found = scores(wb)
        torch.testing.assert_close(found, scores(wb, batched=False, resumed=False), atol=1e-6, rtol=0)


def test_patches_are_those_of_whole_forwards() -> None:
    torch.manual_seed(0)
    model, clean = Model(4, True).eval(), ids(3)
    task = workbench.tasks.from_inputs({"input_ids": clean}, {"input_ids": clean.roll(1, 0)}, [1, 2, 3], [4, 5, 6])
    with attach(model) as wb:
        found = workbench.patch_layers(wb, task, progress=False)
    assert found.effects.shape[:2] == (4, 5)
    # The last block's input at the last position is all that its queries see of the stream.
    with torch.no_grad():
        kept: list[Tensor] = []
        handle = model.blocks[3].register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
        model(clean)
        handle.remove()

        def put(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].clone()
            x[:, -1] = kept[0][:, -1]
            return (x, *args[1:])

        def metric(logits: Tensor) -> Tensor:
            rows = torch.arange(3)
            return (logits[rows, -1, rows + 1] - logits[rows, -1, rows + 4]).double()

        before = metric(model(clean.roll(1, 0)))
        handle = model.blocks[3].register_forward_pre_hook(put)
        change = metric(model(clean.roll(1, 0))) - before
        handle.remove()
    torch.testing.assert_close(found.effects[3, 4], change, atol=1e-5, rtol=0)


def test_gemma_3n_whose_last_layers_share_keys() -> None:
    torch.manual_seed(0)
    several = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_kv_shared_layers": 1}
    config = hf.Gemma3nTextConfig(
        **several, vocab_size=12, vocab_size_per_layer_input=12, hidden_size=8, hidden_size_per_layer_input=4,
        num_hidden_layers=3, intermediate_size=[8] * 3, laurel_rank=2, altup_num_inputs=2, sliding_window=8,
        activation_sparsity_pattern=[0.0] * 3, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    batch = {"input_ids": 1 + ids(2) % 11}
    task = workbench.tasks.from_inputs(batch, {"input_ids": batch["input_ids"].flip(0)}, [1, 2], [2, 1])
    with attach(hf.Gemma3nForCausalLM(config).eval()) as wb:
        with pytest.warns(UserWarning, match="ends in KeyError"):
            found = workbench.head_importance(wb, [batch], "loss", "zero", progress=False)
        with torch.no_grad(), wb.ablate("L2H1"):
            harmed = workbench.metrics.loss(wb.model(**batch), batch)
        with pytest.raises(AttachError, match="no one residual stream"):
            workbench.patch_layers(wb, task, progress=False)
    change = harmed.double() - found.clean["loss"]
    torch.testing.assert_close(found.scores["zero", "loss"][5], change, atol=1e-6, rtol=0)
