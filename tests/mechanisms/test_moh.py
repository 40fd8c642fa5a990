"""Mixture of heads: its limits, its gates, and the loss that balances them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from support.released import filled, read_alone
from workbench import WorkbenchError, mechanisms
from workbench.kernels.composed import gated_attention
from workbench.mechanisms import Place

PLACE = Place(32, 8, 11)
MOH = mechanisms.get("moh")


def _layer(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return MOH.build(PLACE, **options).eval()


def _plain(layer: torch.nn.Module, x: Tensor, gates: Tensor) -> Tensor:
    q, k, v = layer.heads(x)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return layer.out((z * gates[..., None]).transpose(1, 2).flatten(2))


X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_equal_scores_of_all_heads_are_multi_head_attention() -> None:
    for shared, active in ((1.0, 1.0), (0.0, 1.0), (0.25, 1.0)):
        layer = _layer(shared=shared, active=active)
        for router in (layer.to_shared, layer.to_routed, layer.to_sides):
            if router is not None:
                router.weight.zero_()
        torch.testing.assert_close(layer(X), _plain(layer, X, torch.ones(2, 8, 11)))


@torch.no_grad()
def test_gates_are_the_paper_s_and_the_code_s() -> None:
    paper = _layer(scaling="paper")
    assert (paper.shared, paper.chosen) == (2, 4)
    scores, sides = paper.to_routed(X), paper.to_sides(X).softmax(-1)
    likes = scores.softmax(-1)
    best = likes >= likes.topk(4, dim=-1).values[..., -1:]
    want = torch.cat([sides[..., :1] * paper.to_shared(X).softmax(-1), sides[..., 1:] * likes * best], dim=-1)
    q, _, _ = paper.heads(X)
    routing = paper.route(X, q)
    torch.testing.assert_close(routing.gates, want.transpose(1, 2))
    torch.testing.assert_close(routing.balance, (likes.mean((0, 1)) * best.float().mean((0, 1))).sum())
    torch.testing.assert_close(paper(X), _plain(paper, X, routing.gates))
    code = _layer(scaling="code")
    gates = code.route(X, code.heads(X)[0]).gates
    sides = 2 * code.to_sides(X).softmax(-1)
    torch.testing.assert_close(gates[:, :2].sum(1), 2 * sides[..., 0])
    torch.testing.assert_close(gates[:, 2:].sum(1), 4 * sides[..., 1])
    assert torch.equal((gates[:, 2:] > 0).sum(1), torch.full((2, 11), 4))


@torch.no_grad()
def test_a_head_that_is_skipped_has_a_row_of_zeros() -> None:
    layer = _layer()
    with workbench.attach(layer) as wb, wb.capture(["entropy"]) as cap:
        layer(X)
    pattern, gates = cap[0].pattern, layer.route(X, layer.heads(X)[0]).gates
    torch.testing.assert_close(pattern.gates, gates)
    whole, plain = pattern.dense(), cap[0].patterns["attention"].dense()
    torch.testing.assert_close(whole.sum(-1), gates)
    torch.testing.assert_close(plain.sum(-1), torch.ones_like(gates))
    assert torch.equal(whole.abs().sum(-1) == 0, gates == 0)
    assert torch.equal(cap[0].entropy.isnan(), gates == 0)


def test_norms_choose_the_longest_queries_whatever_their_scale() -> None:
    layer = _layer(scaling="norms")
    q, _, _ = layer.heads(X)
    routing = layer.route(X, q)
    size = q[:, 2:].norm(dim=-1)
    chosen = torch.zeros_like(size).scatter_(1, size.topk(4, dim=1).indices, 1.0)
    torch.testing.assert_close(routing.gates, torch.cat([torch.ones(2, 2, 11), chosen], dim=1))
    torch.testing.assert_close(layer.route(X, 7 * q).gates, routing.gates)
    (gradient,) = torch.autograd.grad(routing.gates.square().sum(), q)
    assert bool(gradient.any())


def test_only_chosen_gates_carry_gradients_and_balance_is_least_where_all_are_chosen_alike() -> None:
    layer = _layer(scaling="paper", shared=0.0, active=0.5)
    gates = layer.route(X, layer.heads(X)[0]).gates
    gates[gates == 0].sum().backward(retain_graph=True)
    assert not layer.to_routed.weight.grad.any()
    balance = layer.route(X, layer.heads(X)[0]).balance
    assert balance > 4 / 8
    with torch.no_grad():
        layer.to_routed.weight.zero_()
    assert layer.route(X, layer.heads(X)[0]).balance.item() == pytest.approx(4 / 8)


def test_the_loss_is_kept_in_training_alone() -> None:
    layer = _layer()
    layer(X)
    assert layer.extra_loss is None
    layer.train()
    layer(X)
    balance = layer.route(X, layer.heads(X)[0]).balance.item()
    assert layer.extra_loss.item() == pytest.approx(0.01 * balance)


def test_choices_that_are_none_are_named() -> None:
    for shared, active in ((0.5, 0.25), (0.0, 0.0), (0.25, 1.25), (-0.25, 0.5)):
        with pytest.raises(WorkbenchError, match=f"shared={shared} and active={active} are .* of 8 heads"):
            _layer(shared=shared, active=active)
    with pytest.raises(WorkbenchError, match='scaling="loud"'):
        _layer(scaling="loud")
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(workbench.CaptureError, match=r"gates must be \[1, 2, 3\]"):
        gated_attention(q, q, q, torch.ones(1, 2, 4))


@torch.no_grad()
def test_queries_at_the_end_of_longer_keys_see_the_past() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    gates = torch.rand(1, 4, 3)
    pattern = gated_attention.pattern_of(q, k, v, gates, causal=True)
    assert not pattern.dense()[..., 5:][..., 0, :].any()
    torch.testing.assert_close(pattern.apply(v), gated_attention(q, k, v, gates, causal=True))


@torch.no_grad()
def test_routed_heads_may_change_places_and_ties_are_broken_the_same_way_each_time() -> None:
    layer, other = _layer(), _layer()
    order = [0, 1, *(2 + torch.randperm(6, generator=torch.Generator().manual_seed(0))).tolist()]
    rows = torch.arange(32).view(8, 4)[order].flatten()
    for name in "qkv":
        for part in ("weight", "bias"):
            getattr(getattr(other, name), part).copy_(getattr(getattr(layer, name), part)[rows])
    other.out.weight.copy_(layer.out.weight[:, rows])
    other.to_routed.weight.copy_(layer.to_routed.weight[[at - 2 for at in order[2:]]])
    torch.testing.assert_close(other(X), layer(X))
    layer.to_routed.weight.zero_()
    first = layer.route(X, layer.heads(X)[0]).gates
    assert torch.equal(layer.route(X, layer.heads(X)[0]).gates, first)
    assert torch.equal((first[:, 2:] > 0).sum(1), torch.full((2, 11), 4))


@torch.no_grad()
def test_turning_queries_changes_no_choice_by_norms() -> None:
    torch.manual_seed(0)
    plain = MOH.build(PLACE, "norms")
    turned = MOH.build(Place(32, 8, 11, rotary=True), "norms")
    turned.load_state_dict(plain.state_dict())
    gates = [layer.route(X, layer.heads(X)[0]).gates for layer in (plain, turned)]
    assert not torch.equal(plain.heads(X)[0], turned.heads(X)[0])
    assert torch.equal(*gates)


# What the released attention of MoH-DiT gives in float64 for the weights and the input of `filled`, by (shared, active
# of the routed) of 4 heads.
RELEASED = {
    (2, 1): [
        0.3089782, 0.9230448, 0.4995883, -0.4800855, -0.7547224, -0.0962889, 0.3905973, -0.0852426,
        0.3275196, 0.9032274, 0.4453503, -0.557966, -0.840769, -0.1734024, 0.3377408, -0.1033384,
        -0.2276679, 0.4050458, 0.1031729, -0.6761418, -0.7114593, 0.1776964, 0.8408585, 0.4518188,
    ],
    (0, 2): [
        0.2231079, 0.854876, 0.4626675, -0.4784214, -0.7148042, -0.026049, 0.4772008, 0.0005147,
        0.2476299, 0.8483939, 0.4264694, -0.5371422, -0.7843787, -0.0926513, 0.4268057, -0.0236586,
        0.0080011, 0.5843952, 0.1905626, -0.6980779, -0.8383621, -0.0289549, 0.5955242, 0.2165543,
    ],
}  # fmt: skip
GIVEN = torch.cos(torch.arange(24, dtype=torch.float64) * 1.7).view(1, 3, 8)


class MoHAttention(nn.Module):
    """With the names of the released one's parts, and its equations."""

    def __init__(self, shared: int, routed: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 4, 2, 2**-0.5
        self.shared_head, self.routed_head = shared, routed
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.wg = nn.Linear(8, 4 - shared, bias=False)
        if shared:
            self.wg_0, self.wg_1 = nn.Linear(8, 2, bias=False), nn.Linear(8, shared, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        likes = self.wg(x).softmax(-1)
        floor = likes.sort(-1, descending=True).values[..., self.routed_head - 1, None]
        routed = likes.where(likes >= floor, 0.0)
        gates = self.routed_head * routed / routed.sum(-1, keepdim=True)
        if self.shared_head:
            sides = 2 * self.wg_0(x).softmax(-1)
            shared = self.shared_head * self.wg_1(x).softmax(-1)
            gates = torch.cat([shared * sides[..., :1], gates * sides[..., 1:]], dim=-1)
        made: Tensor = self.proj((z * gates[..., None]).flatten(2))
        return made


@pytest.mark.parametrize(("shared", "routed"), RELEASED)
@torch.no_grad()
def test_it_is_the_released_attention_and_that_is_read_with_its_gates(shared: int, routed: int) -> None:
    want = torch.tensor(RELEASED[shared, routed], dtype=torch.float64).view(1, 3, 8)
    released = filled(MoHAttention(shared, routed))
    torch.testing.assert_close(released(GIVEN), want, atol=1e-6, rtol=0)
    ours = MOH.build(Place(8, 4, 3, causal=False), shared=shared / 4, active=(shared + routed) / 4).double()
    for mine, weight in zip((ours.q, ours.k, ours.v), released.qkv.weight.chunk(3), strict=True):
        mine.weight.copy_(weight)
        mine.bias.zero_()
    ours.to_routed.weight.copy_(released.wg.weight)
    if shared:
        ours.to_shared.weight.copy_(released.wg_1.weight)
        ours.to_sides.weight.copy_(released.wg_0.weight)
    ours.out.weight.copy_(released.proj.weight)
    torch.testing.assert_close(ours(GIVEN) + released.proj.bias, want, atol=1e-6, rtol=0)
    maps = [read_alone(module, GIVEN, "self", ["entropy"]).pattern for module in (ours, released)]
    torch.testing.assert_close(maps[0].gates, maps[1].gates)
    torch.testing.assert_close(maps[0].dense(), maps[1].dense())
    assert int((maps[1].gates == 0).sum()) == 3 * (4 - shared - routed)
