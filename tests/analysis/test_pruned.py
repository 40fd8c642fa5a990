"""Pruned copies are smaller, give what the ablated model gives, and can be attached to.

In float64 the two agree to 1e-13 of the largest number, so that what they differ by in float32 is rounding: sums over
fewer heads are added up in another order. It grows with the model: at GPT-2 small's size it is about 1e-6, as large as
either's own distance from a float64 reference.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

import workbench
from support.tiny import Family, family, make
from support.unavailable import unavailable
from workbench.errors import InterventionError
from workbench.hooks.nested import tensors

PRUNED = [family(name) for name in ("gpt2", "llama-gqa", "bert", "vit", "t5", "whisper")]
TIMM = [family(name) for name in ("timm-vit-fused", "timm-vit-unfused")]


def made(one: Family) -> Any:
    """The family's model; where timm is not there, the test is skipped."""
    try:
        return make(one)
    except ModuleNotFoundError as error:
        unavailable(str(error))


def doubled(value: Any) -> Any:
    """Inputs with their floating-point tensors in float64."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("all_of_first", [False, True])
@pytest.mark.parametrize("one", [*PRUNED, *TIMM], ids=lambda one: one.name)
@torch.no_grad()
def test_a_pruned_copy_gives_what_the_ablated_model_gives(one: Family, all_of_first: bool) -> None:
    """To 1e-13 in double precision; in single precision as near to that as the ablated model itself is."""
    inputs = one.inputs()
    truth, found = both(made(one).double(), {name: doubled(value) for name, value in inputs.items()}, all_of_first)
    alike = [i for i, (x, y) in enumerate(zip(truth, found, strict=True)) if comparable(x, y)]
    assert alike
    for i in alike:
        assert (truth[i] - found[i]).abs().max() <= 1e-13 * truth[i].abs().max()
    ablated, found = both(made(one), inputs, all_of_first)
    assert alike == [i for i, (x, y) in enumerate(zip(ablated, found, strict=True)) if comparable(x, y)]
    for x, y, z in ((ablated[i], found[i], truth[i]) for i in alike):
        rounding = max(float((x - z).abs().max()), torch.finfo(x.dtype).eps * float(z.abs().max()))
        assert rounding <= 1e-5 * z.abs().max()
        assert (y - z).abs().max() <= 3 * rounding


def both(model: Any, inputs: dict[str, Any], all_of_first: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the ablated model gives, and what the pruned copy gives; one is smaller, and attaching finds it sound."""
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
    with workbench.attach(smaller) as wb:
        checked = wb.verify(**inputs)
    if not all_of_first:  # else a head is left on purpose that changes nothing
        checked.raise_if_failed()
    assert checked.identical
    return ablated, found


def comparable(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two outputs are the same numbers: pruned caches have fewer heads."""
    return x.shape == y.shape and x.is_floating_point()


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


class PerHead(torch.nn.Module):
    """timm's attention by its names, but each head's query, key and value lie beside each other in `qkv`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 8, 32
        self.qkv, self.proj = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.head_dim)).permute(3, 0, 2, 1, 4)
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).flatten(2))


def test_heads_in_another_order_within_one_layer_are_refused() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(PerHead()).eval()
    whole = copy.deepcopy(model.state_dict())
    with pytest.raises(InterventionError, match="in an order that is not known"):
        workbench.prune_heads(model, (0, 1))
    assert all(torch.equal(weight, whole[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def test_the_difference_at_full_width_is_rounding() -> None:
    """Two layers as wide as GPT-2 small: ablated and pruned are equally far from what float64 gives."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, vocab_size=200, n_positions=16)).eval()
    gone = [(layer, head) for layer in range(2) for head in range(1, 12, 2)]
    ids = torch.randint(0, 200, (1, 16))
    with workbench.attach(model) as wb, wb.ablate(gone):
        ablated = model(ids).logits.double()
    pruned = workbench.prune_heads(model, gone)(ids).logits.double()
    exact = workbench.prune_heads(model.double(), gone)(ids).logits
    off = [float((x - exact).abs().max() / exact.abs().max()) for x in (ablated, pruned)]
    assert 0 < max(off) < 2e-6
    assert max(off) < 4 * min(off)
    assert (ablated - pruned).abs().max() / exact.abs().max() < sum(off)
