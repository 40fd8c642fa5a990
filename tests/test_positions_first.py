"""Models whose blocks have positions before the batch, as PyTorch's layers by default, are as others or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from workbench import AttachError, InterventionError, Workbench, attach
from workbench.hooks.edits import SteerOutput
from workbench.hooks.positions import Positions

D, H, WORDS = 8, 2, 12


class Attention(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.num_heads, self.turned = H, turned
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        q, k, v = self.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        z = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return z.transpose(0, 1) if self.turned else z


class Block(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(D), Attention(turned), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x).relu()


class Model(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.embed, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.blocks = nn.ModuleList(Block(turned) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x.transpose(0, 1) if self.turned else x
        for block in self.blocks:
            x = block(x)
        return self.head(x.transpose(0, 1) if self.turned else x)


def both() -> list[Model]:
    torch.manual_seed(0)
    first, turned = Model(False).eval(), Model(True).eval()
    turned.load_state_dict(first.state_dict())
    return [first, turned]


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, WORDS, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [5, 3])
def test_sweeps_edit_what_single_forwards_edit(length: int) -> None:
    """Also where there are as many positions as examples."""
    batch = {"input_ids": ids(3, length)}
    found = []
    for model in both():
        with attach(model) as wb:
            found.append(
                workbench.head_importance(
                    wb, [batch], lambda y, batch: y[:, -1, 1], "zero", progress=False, batched=not model.turned
                )
            )
            if model.turned:
                with pytest.warns(UserWarning, match="variants run one by one"):
                    found.append(
                        workbench.head_importance(wb, [batch], lambda y, batch: y[:, -1, 1], "zero", progress=False)
                    )
    (want, *others) = (next(iter(one.scores.values())) for one in found)
    assert want.abs().min() > 1e-4
    for one in others:
        torch.testing.assert_close(one, want, atol=1e-6, rtol=0)


def test_a_pytorch_encoder_in_a_model_is_swept_rightly() -> None:
    torch.manual_seed(0)
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, H, 8), 2, enable_nested_tensor=False)

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = layers

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x.transpose(0, 1)).transpose(0, 1)

    x = torch.randn(3, 5, D)
    with attach(Turning().eval()) as wb:
        with pytest.warns(UserWarning, match="one by one"):
            found = workbench.head_importance(wb, [{"x": x}], lambda y, batch: y[:, 0, 0], "zero", progress=False)
        with torch.no_grad(), wb.ablate("L1H1"):
            without = wb.model(x)[:, 0, 0]
        with torch.no_grad():
            change = wb.model(x)[:, 0, 0] - without
    torch.testing.assert_close(next(iter(found.scores.values()))[3], change.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("positions", [1, [0, -1], torch.tensor([[1], [2], [4]])], ids=["one", "two", "each"])
def test_directions_are_added_at_positions(positions: Any) -> None:
    found = []
    for model in both():
        with attach(model) as wb, torch.no_grad(), wb.steer("blocks.0", torch.linspace(-1, 1, D), positions=positions):
            found.append(model(ids(3, 5)))
    torch.testing.assert_close(found[1], found[0])


def test_an_order_that_nothing_shows_is_refused() -> None:
    inside = nn.Sequential(nn.TransformerEncoderLayer(D, H))  # it might turn what it gives
    wrapped = type("Wrapped", (nn.Module,), {"__module__": "mine"})()
    wrapped.inside = inside
    edit = SteerOutput("m", torch.ones(D), Positions(1))
    edit.on_inputs({"x": torch.zeros(3, 5, D)})
    assert edit("m", inside, torch.zeros(5, 3, D)).sum(-1).nonzero()[:, 0].unique().tolist() == [1]
    assert edit("m", wrapped, torch.zeros(5, 3, D)).sum(-1).nonzero()[:, 0].unique().tolist() == [1]
    with pytest.raises(InterventionError, match="cannot be told"):
        edit("m", wrapped, torch.zeros(3, 5, D))


ANALYSES: list[Callable[[Workbench], Any]] = [
    lambda wb: workbench.logit_lens(wb, {"input_ids": ids(1, 5)}),
    lambda wb: workbench.logit_attribution(wb, {"input_ids": ids(2, 5)}),
    lambda wb: workbench.attention_rollout(wb, {"input_ids": ids(1, 5)}, method="norm"),
    lambda wb: workbench.attention_rollout(wb, {"input_ids": ids(1, 5)}, method="value_zeroing"),
    lambda wb: workbench.patch_layers(
        wb, workbench.tasks.from_inputs({"input_ids": ids(2, 5)}, {"input_ids": ids(2, 5).flip(0)}, [1, 2], [2, 1])
    ),
]


@pytest.mark.parametrize("analysis", ANALYSES)
def test_analyses_of_a_stream_refuse_it(analysis: Callable[[Workbench], Any]) -> None:
    with attach(both()[1]) as wb, pytest.raises(AttachError, match=r"blocks\.\d reads \[\d, 1, 8\]"):
        analysis(wb)


class Over(nn.Module):
    """Attention over the frames of a clip [batch, frame, place, d], each place a row of its own."""

    def __init__(self, places_first: bool) -> None:
        super().__init__()
        self.num_heads, self.places_first = H, places_first
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.permute(2, 0, 1, 3) if self.places_first else x.transpose(1, 2)
        q, k, v = self.qkv(turned.flatten(0, 1)).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)
        z = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).view(turned.shape)
        return x + (z.permute(1, 2, 0, 3) if self.places_first else z.transpose(1, 2))


@pytest.mark.parametrize("places_first", [False, True])
def test_windows_run_side_by_side_only_where_examples_lie_together(places_first: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Over(places_first), Over(places_first)).eval(), torch.randn(2, 3, 4, D)
    with attach(model) as wb:
        variants = [workbench.Variant((site.name, head)) for site in wb.sites for head in range(H)]
        how: dict[str, Any] = {"metrics": lambda y, batch: y[:, 0, 0, 0], "progress": False}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = workbench.run_sweep(wb, variants, [{"input": x}], **how)
        one_by_one = workbench.run_sweep(wb, variants, [{"input": x}], batched=False, resumed=False, **how)
    assert found.batched != places_first
    assert any("reaches those of another" in str(one.message) for one in said) == places_first
    torch.testing.assert_close(found.values, one_by_one.values, atol=1e-6, rtol=0)
