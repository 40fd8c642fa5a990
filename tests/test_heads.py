"""Heads, layers and modules as users name them."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.tiny import FAMILIES, make
from workbench.errors import InterventionError
from workbench.hooks.finding import find_sites
from workbench.hooks.heads import KVGroup, find_block, find_module, parse_heads
from workbench.hooks.sites import Site, Sites

ONE_TOWER = Sites(Site(f"h.{i}.attn", i, "self", 6, 2, 8) for i in range(3))
UNKNOWN = Sites([Site("h.0.attn", 0, "self")])
TWO_TOWERS = find_sites(make(FAMILIES[-1]))


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ((1, 5), {"h.1.attn": [5]}),
        ("L1H5", {"h.1.attn": [5]}),
        (("h.1.attn", 5), {"h.1.attn": [5]}),
        (("blocks.1.attn", 5), {"h.1.attn": [5]}),
        (("blocks.1.attn.hook_z", 5), {"h.1.attn": [5]}),
        ((ONE_TOWER[1], 5), {"h.1.attn": [5]}),
        ((np.int64(1), torch.tensor(5)), {"h.1.attn": [5]}),
        ([(1, 5)], {"h.1.attn": [5]}),
        (((1, 5), (0, 2)), {"h.0.attn": [2], "h.1.attn": [5]}),
        (("L1H5", "L0H2"), {"h.0.attn": [2], "h.1.attn": [5]}),
        ({"L2H3", (2, 1), ("h.2.attn", 3)}, {"h.2.attn": [1, 3]}),
        (((layer, 0) for layer in (2, 0)), {"h.0.attn": [0], "h.2.attn": [0]}),
        ("L2KV1", {"h.2.attn": [3, 4, 5]}),
        (KVGroup(2, 0), {"h.2.attn": [0, 1, 2]}),
        ([KVGroup("blocks.0.attn", 1), (0, 0)], {"h.0.attn": [0, 3, 4, 5]}),
        ((KVGroup(ONE_TOWER[0], 1), KVGroup(1, 1)), {"h.0.attn": [3, 4, 5], "h.1.attn": [3, 4, 5]}),
    ],
    ids=range(16),
)
def test_heads(given: Any, want: dict[str, list[int]]) -> None:
    found = parse_heads(ONE_TOWER, given)
    assert found == want
    assert list(found) == list(want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 6), "no head 6: the site has 6 heads, 0 to 5"),
        ((1, -1), "no head -1"),
        ((3, 0), "no layer 3: the model has 0 to 2"),
        ((-1, 0), "no layer -1"),
        ("L1KV2", "no kv group 2: the site has 2, 0 to 1"),
        (KVGroup(1, True), "no kv group True"),
        ("h.1.attn", "'h.1.attn' is no head"),
        ("L1", "is no head"),
        ("l1h2", "is no head"),
        (("h.1.atn", 0), 'did you mean "h.1.attn"'),
        ((1.0, 0), "neither a layer nor a site"),
        ((True, 0), "neither a layer nor a site"),
        ((1, True), "is no head"),
        ((1, 2.0), "is no head"),
        ([1, 2], "1 is no head"),
        ((1, 2, 3), "1 is no head"),
        (7, "7 names no head"),
        (None, "None names no head"),
        ([], "no head was chosen"),
        ({}, "no head was chosen"),
    ],
    ids=str,
)
def test_what_is_no_head(given: Any, message: str) -> None:
    with pytest.raises(InterventionError) as caught:
        parse_heads(ONE_TOWER, given)
    assert message in str(caught.value)


def test_a_layer_with_several_sites_is_refused_and_they_are_listed() -> None:
    for given in ((0, 1), "L0H1", "L0KV1", KVGroup(0, 1)):
        with pytest.raises(InterventionError) as caught:
            parse_heads(TWO_TOWERS, given)
        assert all(f'"{site.alias}"' in str(caught.value) for site in TWO_TOWERS if site.layer == 0)
    found = parse_heads(TWO_TOWERS, {("decoder.0.cross_attn", 1), ("encoder.0.attn", 2)})
    assert found == {"model.encoder.layers.0.self_attn": [2], "model.decoder.layers.0.encoder_attn": [1]}


def test_sizes_that_are_not_known_yet() -> None:
    assert parse_heads(UNKNOWN, (0, 500)) == {"h.0.attn": [500]}
    with pytest.raises(InterventionError, match="no head -1"):
        parse_heads(UNKNOWN, (0, -1))
    with pytest.raises(InterventionError, match="run one small capture"):
        parse_heads(UNKNOWN, "L0KV0")


def test_a_site_without_heads() -> None:
    sites = Sites([Site("mixer", 0, "state", 0), Site("heads", 1, "state")])
    with pytest.raises(InterventionError, match='of kind "state" and has no heads'):
        parse_heads(sites, (0, 0))
    assert parse_heads(sites, (1, 0)) == {"heads": [0]}


@pytest.mark.parametrize(
    ("name", "layer", "block"),
    [
        ("gpt2", 1, "transformer.h.1"),
        ("llama-gqa", 0, "model.layers.0"),
        ("bert", 1, "encoder.layer.1"),
        ("vit", 1, "layers.1"),
    ],
)
def test_the_block_of_a_layer(name: str, layer: int, block: str) -> None:
    model = make(next(family for family in FAMILIES if family.name == name))
    found = find_block(model, find_sites(model), layer)
    assert found.endswith(block)
    assert isinstance(model.get_submodule(found.rpartition(".")[0]), nn.ModuleList)


def test_blocks_of_two_towers() -> None:
    for family, want in ((FAMILIES[-1], '"model.encoder.layers.1", "model.decoder.layers.1"'),
                         (FAMILIES[6], '"encoder.block.1", "decoder.block.1"')):  # fmt: skip
        model = make(family)
        with pytest.raises(InterventionError) as caught:
            find_block(model, find_sites(model), 1)
        assert want in str(caught.value)


class _Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_block_without_attention_between_others() -> None:
    model = nn.Sequential(nn.Sequential(_Attention()), nn.Identity(), nn.Sequential(_Attention()))
    sites = find_sites(nn.ModuleDict({"layers": model}))
    assert [site.name for site in sites] == ["layers.0.0", "layers.2.0"]
    holder = nn.ModuleDict({"layers": model})
    named = Sites(Site(f"layers.{i}.0", i, "self") for i in (0, 2))
    assert find_block(holder, named, 2) == "layers.2"
    assert find_block(holder, named, 1) == "layers.1"
    for layer in (3, -1):
        with pytest.raises(InterventionError, match=f"no layer {layer}: the model has 0, 2"):
            find_block(holder, named, layer)


def test_a_model_without_blocks() -> None:
    several = nn.ModuleList([_Attention(), _Attention()])
    for model in (nn.ModuleDict({"attn": _Attention()}), nn.ModuleDict({"attentions": several})):
        with pytest.raises(InterventionError, match="in no block"):
            find_block(model, find_sites(model), 0)
    with pytest.raises(InterventionError, match="'0' is no layer"):
        find_block(model, find_sites(model), "0")


def test_modules() -> None:
    model = make(FAMILIES[0])
    sites = find_sites(model)
    assert find_module(model, sites, "blocks.1.attn") == find_module(model, sites, sites[1]) == "transformer.h.1.attn"
    assert find_module(model, sites, "transformer.h.1.mlp") == "transformer.h.1.mlp"
    with pytest.raises(InterventionError) as caught:
        find_module(model, sites, "transformer.h.1.mpl")
    assert 'did you mean "transformer.h.1.mlp"' in str(caught.value)
    shared = nn.Linear(2, 2)
    assert find_module(nn.ModuleDict({"a": shared, "b": shared}), Sites([]), "b") == "a"
