"""Agent attention: its limits, its factors, and the package that is its judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import workbench
from support.judges import judges, missing
from workbench import WorkbenchError, mechanisms
from workbench.kernels.composed import ComposedPattern, agent_attention
from workbench.kernels.patterns import DensePattern
from workbench.kernels.statistics import Options
from workbench.kernels.streaming import statistics
from workbench.mechanisms import Place

GRID = Place(24, 4, 35, causal=False, grid=(5, 7))


def _judge(name: str, module: str = "agent_attention_pytorch.agent_attention_pytorch", **sizes: Any) -> Any:
    try:
        with judges():
            made = getattr(__import__(module, fromlist=[name]), name)
            torch.manual_seed(0)
            model = made(dim=24, heads=4, dim_head=6, **sizes).eval()
    except ImportError as error:
        missing(error)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def _qkv(n: int = 11, agents: int = 3) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return *torch.randn(3, 2, 4, n, 6, dtype=torch.float64).unbind(), torch.randn(2, 4, agents, 6, dtype=torch.float64)


@torch.no_grad()
def test_the_map_has_rows_of_one_and_no_more_rank_than_agents() -> None:
    q, k, v, agents = _qkv()
    pattern = agent_attention.pattern_of(q, k, v, agents)
    whole = pattern.dense()
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, 11, dtype=torch.float64))
    assert int(torch.linalg.matrix_rank(whole).max()) == 3
    torch.testing.assert_close(agent_attention(q, k, v, agents), whole @ v)
    shared = agent_attention.pattern_of(q, k[:, :2], v[:, :2], agents).apply(v[:, :2])
    torch.testing.assert_close(agent_attention(q, k[:, :2], v[:, :2], agents), shared)
    one = agent_attention.pattern_of(q, k, v, agents[:, :, :1]).dense()
    torch.testing.assert_close(one, one[:, :, :1].expand_as(one))
    parts = sum(pattern.through([m]) for m in range(3))
    torch.testing.assert_close(parts, whole)
    with pytest.raises(workbench.CaptureError, match="no position 3"):
        pattern.through([3])


@torch.no_grad()
def test_its_limits_are_softmax_and_the_mean() -> None:
    q, k, v, _ = _qkv()
    own = 1e4 * torch.eye(11, dtype=torch.float64)[None, None]
    exact = agent_attention(q, k, v, q, broadcast_bias=own)
    torch.testing.assert_close(exact, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    mean = agent_attention.pattern_of(q, k, v, torch.zeros_like(q[:, :, :2])).dense()
    torch.testing.assert_close(mean, torch.full_like(mean, 1 / 11))


@torch.no_grad()
def test_the_function_is_the_package_s() -> None:
    judge = _judge("AgentSelfAttention", num_agent_tokens=5, talking_heads=False, gate=False)
    x = torch.randn(2, 13, 24)
    q, k, v = judge.to_qkv(x)
    z = agent_attention(q, k, v, judge.agent_tokens.expand(2, -1, -1, -1))
    torch.testing.assert_close(judge.to_out(z), judge(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("talking", [True, False])
@pytest.mark.parametrize("gate", [True, False])
@torch.no_grad()
def test_the_package_s_own_module_is_read(talking: bool, gate: bool) -> None:
    judge = _judge("AgentSelfAttention", num_agent_tokens=5, talking_heads=talking, gate=gate)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:] = False
    for inputs in ({"x": torch.randn(2, 13, 24)}, {"x": torch.randn(2, 13, 24), "mask": mask}):
        with workbench.attach(judge) as wb:
            assert wb.verify(**inputs).ok
            with wb.capture(["entropy"]) as cap:
                judge(**inputs)
        (site,) = cap.sites
        held = cap[site.name]
        assert (site.kind, held.kernel, held.shape) == ("self", "agent", (2, 4, 13, 13))
        assert set(held.patterns) == {"pattern", "broadcast", "aggregate"}
        assert held.patterns["aggregate"].shape == (2, 4, 5, 13)
        assert held.pattern.signed == talking
    if not talking:
        assert not held.pattern.dense()[1, :, :, 9:].any()


@torch.no_grad()
def test_the_package_s_transformer_is_read_layer_by_layer() -> None:
    judge = _judge("AgentTransformer", "agent_attention_pytorch.agent_transformer", num_agent_tokens=5, depth=2)
    x = torch.randn(2, 13, 24)
    with workbench.attach(judge) as wb:
        report = wb.verify(x=x)
        assert report.ok, report.table
        assert [site.kind for site in wb.sites] == ["self", "self"]
        with wb.capture(["entropy"]) as cap:
            bare = judge(x)
        with wb.ablate((0, 1)):
            assert not torch.allclose(judge(x), bare)
    assert cap[1].pattern.dense().shape == (2, 4, 13, 13)


def test_sizes_that_the_grid_cannot_take_are_named() -> None:
    agent = mechanisms.get("agent")
    for n_agents in (5, 36, 0):
        with pytest.raises(WorkbenchError, match=f"n_agents={n_agents} is no square of at most 5 × 5"):
            agent.build(GRID, n_agents=n_agents)
    for kernel in (2, -1):
        with pytest.raises(WorkbenchError, match=f"kernel={kernel} has no middle"):
            agent.build(GRID, kernel=kernel)


@torch.no_grad()
def test_agents_are_means_and_positions_are_stretched_to_the_grid() -> None:
    torch.manual_seed(0)
    layer = mechanisms.get("agent").build(GRID, n_agents=4)
    q = torch.full((1, 4, 35, 6), 3.0)
    torch.testing.assert_close(layer.agents(q), torch.full((1, 4, 4, 6), 3.0))
    assert layer.bias("gather").shape == layer.bias("spread").shape == (1, 4, 4, 35)
    for name, parameter in layer.biases.items():
        parameter.fill_(float(name == "gather_row"))
    assert torch.equal(layer.bias("gather"), torch.ones(1, 4, 4, 35))


@torch.no_grad()
def test_position_tables_are_stretched_linearly() -> None:
    """A table of 7 × 7 on 14 × 14 patches: each cell is two patches wide, and between their middles it is linear."""
    layer = mechanisms.get("agent").build(Place(8, 2, 196, causal=False, grid=(14, 14)), n_agents=4)
    for parameter in layer.biases.values():
        parameter.zero_()
    layer.biases["gather"].copy_(torch.arange(7.0)[:, None] + 10 * torch.arange(7.0))
    found = layer.bias("gather").unflatten(-1, (14, 14))[0, 1, 2]
    at = ((torch.arange(14) + 0.5) / 2 - 0.5).clamp(0, 6)
    torch.testing.assert_close(found, at[:, None] + 10 * at)
    assert not layer.bias("spread").any()


@torch.no_grad()
def test_the_convolution_stands_apart() -> None:
    torch.manual_seed(0)
    layer, x = mechanisms.get("agent").build(GRID), torch.randn(2, 35, 24)
    share = layer.nearby_share(x)
    assert share.shape == (2, 4, 35)
    assert bool(((share > 0) & (share < 1)).all())
    q, k, v = layer.heads(x)
    torch.testing.assert_close(
        layer(x), layer.out((layer.mix(q, k, v, x) + layer.nearby(v)).transpose(1, 2).flatten(2))
    )
    layer.local.weight.zero_(), layer.local.bias.zero_()
    assert not layer.nearby_share(x).any()
    assert not mechanisms.get("agent").build(GRID, "without convolution").nearby_share(x).any()


@torch.no_grad()
def test_agents_that_see_nothing_leave_rows_of_less_than_one() -> None:
    q, k, v, agents = _qkv()
    hidden = torch.zeros(1, 1, 3, 11, dtype=torch.float64)
    hidden[:, :, 1] = -torch.inf
    pattern = agent_attention.pattern_of(q, k, v, agents, aggregate_bias=hidden)
    shares = torch.nn.functional.normalize(pattern.dense(), p=1, dim=-1)
    assert pattern.dense().sum(-1).max() < 1
    assert not pattern.normalised
    found = statistics(pattern, ["entropy"], Options())["entropy"]
    torch.testing.assert_close(found, -(shares * shares.log()).sum(-1))


@torch.no_grad()
def test_a_capture_makes_the_pattern_of_a_call_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pattern_of = [], agent_attention.pattern_of

    def counted(*args: Any, **kwargs: Any) -> ComposedPattern:
        made.append(pattern_of(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(agent_attention, "pattern_of", counted)
    model = torch.nn.Sequential(mechanisms.get("agent").build(GRID, "without convolution")).eval()
    with workbench.attach(model) as wb, wb.capture(["entropy"]) as cap:
        model(torch.randn(2, 35, 24))
    assert set(cap[0].patterns) == {"pattern", "broadcast", "aggregate"}
    assert len(made) == 1


@pytest.mark.parametrize("order", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_factors_of_several_dtypes_are_multiplied_in_the_widest(order: tuple[torch.dtype, torch.dtype]) -> None:
    """The map, its rows and A·V, whichever factor it is; not what happens to be first."""
    q, k, v, agents = _qkv()
    parts = agent_attention.pattern_of(q, k, v, agents).factors
    kept = {
        name: DensePattern(part.dense().to(dtype)) for (name, part), dtype in zip(parts.items(), order, strict=True)
    }
    mixed = ComposedPattern(kept)
    left, right = (each.dense().double() for each in kept.values())
    assert mixed.dtype == mixed.dense().dtype == mixed.apply(v).dtype == torch.float64
    torch.testing.assert_close(mixed.dense(), left @ right, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mixed.rows([2]), (left @ right)[:, :, 2:3], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mixed.through([0]), left[..., :1] @ right[:, :, :1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mixed.apply(v), left @ right @ v.double(), rtol=1e-4, atol=1e-5)
    assert bool(mixed.statistics(["entropy"])["entropy"].isfinite().all())


@torch.no_grad()
def test_a_product_whose_parts_do_not_fit_is_refused() -> None:
    q, k, v, agents = _qkv()
    factors = agent_attention.pattern_of(q, k, v, agents).factors
    with pytest.raises(workbench.CaptureError, match="at least two factors"):
        ComposedPattern({"broadcast": factors["broadcast"]})
    with pytest.raises(workbench.CaptureError, match='the factor "aggregate"'):
        ComposedPattern({"aggregate": factors["aggregate"], "broadcast": factors["aggregate"]})
    with pytest.raises(workbench.CaptureError, match=r"agents must be \[2, 4, agent, 6\]"):
        agent_attention(q, k, v, agents[..., :5])
    with pytest.raises(workbench.CaptureError, match="differ in batch, heads or length"):
        agent_attention(q, k, v[:, :, 1:], agents)
