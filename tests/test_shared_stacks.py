"""Layers that run several times in one forward, in models as they are used: each call stands under its own site."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import workbench
from support.judges import judges, missing

IDS = torch.randint(3, 60, (2, 13), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def albert(*, groups: int) -> nn.Module:
    config = transformers.AlbertConfig(**SIZES, embedding_size=16, num_hidden_layers=4, num_hidden_groups=groups)
    return transformers.AlbertModel(config, add_pooling_layer=False)


class Siamese(nn.Module):
    """One encoder for two texts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = transformers.BertModel(transformers.BertConfig(**SIZES, num_hidden_layers=2), False)

    def forward(self, input_ids: Tensor) -> Tensor:
        a, b = (self.encoder(ids).last_hidden_state.mean(1) for ids in (input_ids, input_ids.flip(1)))
        return a @ b.T


class Universal(nn.Module):
    """One layer again and again, with the number of the step added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.steps = nn.Embedding(64, 32), nn.Parameter(torch.randn(3, 32))
        self.layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for step in self.steps:
            x = self.layer(x + step)
        return x


def tied() -> nn.Module:
    with judges():
        try:
            import x_transformers
        except ModuleNotFoundError as error:
            missing(error)
        layers = x_transformers.Decoder(dim=32, depth=3, heads=4, attn_dim_head=8, weight_tie_layers=True)
        made: nn.Module = x_transformers.TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers)
    return made


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {  # calls by site
    "one group": (lambda: albert(groups=1), {"encoder.albert_layer_groups.0.albert_layers.0.attention": 4}),
    "two groups": (lambda: albert(groups=2), {
        f"encoder.albert_layer_groups.{i}.albert_layers.0.attention": 2 for i in range(2)}),
    "siamese": (Siamese, {f"encoder.encoder.layer.{i}.attention.self": 2 for i in range(2)}),
    "universal": (Universal, {"layer.self_attn": 3}),
    "tied": (tied, {"attn_layers.layers.0.1.attend": 3}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_calls_of_shared_layers(name: str) -> None:
    torch.manual_seed(0)
    make, calls = MODELS[name]
    model = make().eval()
    with workbench.attach(model) as wb:
        found = wb.verify(IDS).raise_if_failed()
        assert not wb.sites.unread
        with wb.capture(z=True) as cap:
            bare = model(IDS)
        assert cap.ledger == calls
        assert len(found.checks) == sum(calls.values())
        assert {site.name: site.layer for site in cap.sites if not site.call} == {s.name: s.layer for s in wb.sites}
        for site, n in calls.items():
            each = [cap[site, call] for call in range(n)]
            assert [one.site.path for one in each] == [site] * n
            for one, other in pairwise(each):
                assert not torch.equal(one.pattern.dense(), other.pattern.dense())
        table = cap.table("entropy")
        assert table.groupby("site").call.nunique().to_dict() == calls
        with wb.ablate((wb.sites[0].layer, 1)):
            edited = model(IDS)
        for one in (cap.sites[1].label(1), (cap.sites[1].name, 1), (cap.sites[1], 1)):
            with pytest.raises(workbench.InterventionError, match="is one call of its site"), wb.ablate([one]):
                model(IDS)
    bare, edited = (getattr(one, "last_hidden_state", one) for one in (bare, edited))
    assert not torch.equal(bare, edited)
