"""Pruned copies are smaller, give what the ablated model gives, and can be attached to."""

from __future__ import annotations

import pytest
import torch

import workbench
from support.tiny import Family, family, make
from workbench.errors import InterventionError
from workbench.prefix import tensors

PRUNED = [family(name) for name in ("gpt2", "llama-gqa", "bert", "vit", "t5", "whisper")]


@pytest.mark.parametrize("all_of_first", [False, True])
@pytest.mark.parametrize("one", PRUNED, ids=lambda one: one.name)
@torch.no_grad()
def test_a_pruned_copy_gives_what_the_ablated_model_gives(one: Family, all_of_first: bool) -> None:
    model, inputs = make(one), one.inputs()
    with workbench.attach(model) as wb:
        gone = []
        for i, site in enumerate(wb.sites):
            group = (site.n_heads or 0) // (site.n_kv_heads or 1)
            n = site.n_heads if all_of_first and i == 0 else group * (1 + i % 2) if group == 1 else group
            gone += [(site.alias, head) for head in range(n or 0)]
        plain = tensors(model(**inputs))
        with wb.ablate(gone):
            ablated = tensors(model(**inputs))
    smaller = workbench.prune_heads(model, gone)
    found = tensors(smaller(**inputs))
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    assert any(not torch.equal(x, y) for x, y in zip(plain, ablated, strict=True))
    same = [(x, y) for x, y in zip(ablated, found, strict=True) if x.shape == y.shape and x.is_floating_point()]
    assert same
    for x, y in same:
        assert (x - y).abs().max() <= 1e-6 * x.abs().max()
    with workbench.attach(smaller) as wb:
        checked = wb.verify(**inputs)
    if not all_of_first:  # else a head is left on purpose that changes nothing
        checked.raise_if_failed()
    assert checked.identical


def test_a_kv_group_goes_as_a_whole_or_all_groups_alike() -> None:
    model = make(family("llama-gqa"))  # 6 heads in 2 groups of 3
    with pytest.raises(InterventionError, match=r"kv group 1 \(heads 3 to 5\) would keep 2 of its 3"):
        workbench.prune_heads(model, "L0H4")
    even = workbench.prune_heads(model, ["L0H1", "L0H5"])
    assert even.get_submodule("model.layers.0.self_attn.q_proj").weight.shape[0] == 4 * 8


@pytest.mark.parametrize("name", ["gpt-oss", "bloom", "swin", "mamba"])
def test_attention_of_other_kinds_is_refused(name: str) -> None:
    model = make(family(name))
    site = workbench.attach(model).sites[0].alias
    with pytest.raises(InterventionError, match=r"cannot be pruned|has no heads"):
        workbench.prune_heads(model, (site, 0))
