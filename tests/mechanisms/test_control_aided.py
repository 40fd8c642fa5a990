"""Control-aided attention: the gradient that it learns, what the loss moves, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import workbench
from workbench import WorkbenchError, mechanisms
from workbench.mechanisms import Place
from workbench.mechanisms.control_aided import control_loss, decision_gradient

ROOM, PLACE = mechanisms.get("control_aided"), Place(6, 1, 9, causal=False)


class Policy(nn.Module):
    """Decisions [batch, step, class] of features [batch, token, channel]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(54, 16), nn.Linear(16, 4 * 7)

    def forward(self, features: Tensor) -> Tensor:
        return self.leave(self.enter(features.flatten(1)).tanh()).unflatten(1, (4, 7))


def _gate() -> torch.nn.Module:
    torch.manual_seed(0)
    return ROOM.build(PLACE).double()


def _policy() -> Policy:
    torch.manual_seed(1)
    return Policy().double()


X = torch.randn(3, 9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_the_gradient_is_that_of_finite_differences_and_of_each_example_alone() -> None:
    policy, steps = _policy(), slice(0, 3)
    found = decision_gradient(X, policy, steps)
    assert not found.requires_grad
    with torch.no_grad():
        for token, channel in ((0, 0), (4, 5), (8, 2)):
            at = torch.zeros_like(X)
            at[:, token, channel] = 1e-5
            there, here = (policy(X + sign * at)[:, steps].mean((1, 2)) for sign in (1, -1))
            torch.testing.assert_close(found[:, token, channel], (there - here) / 2e-5, atol=1e-8, rtol=1e-5)
    alone = torch.cat([decision_gradient(X[i : i + 1], policy, steps) for i in range(3)])
    torch.testing.assert_close(found, alone)
    torch.testing.assert_close(decision_gradient(X, lambda f: policy(f) + 5.0, steps), found)
    assert not torch.allclose(decision_gradient(X, policy, slice(1, 4)), found)


def test_the_loss_moves_the_gate_and_the_features_and_not_the_policy() -> None:
    gate, policy, x = _gate(), _policy(), X.clone().requires_grad_()
    control_loss(gate, x, policy).backward()
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.grad is not None for parameter in gate.parameters())
    assert x.grad is not None
    want = (gate.factor(X) - decision_gradient(X, policy)).square().mean()
    torch.testing.assert_close(control_loss(gate, X, policy), want)


def test_a_linear_policy_is_learnt_by_the_last_bias_alone() -> None:
    gate, weight = _gate(), torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def linear(features: Tensor) -> Tensor:
        return (features @ weight).sum(1)[:, None, None]

    torch.testing.assert_close(decision_gradient(X, linear), weight.expand(3, 9, 6))
    with torch.no_grad():
        gate.second.weight.zero_()
        gate.second.bias.copy_(weight)
    assert float(control_loss(gate, X, linear).detach()) < 1e-28


def test_tokens_that_decide_nothing_are_learnt_to_count_nothing() -> None:
    """Features of two kinds of token, of which the policy reads one: the gate learns which by what they are."""
    gate, random = _gate(), torch.Generator().manual_seed(4)
    weight = torch.randn(6, generator=random, dtype=torch.float64)
    read = (torch.arange(9) % 2 == 0).double()[:, None]

    def policy(features: Tensor) -> Tensor:
        return (features * read @ weight).sum(1)[:, None, None]

    def drawn(n: int) -> Tensor:
        x = torch.randn(n, 9, 6, generator=random, dtype=torch.float64)
        x[..., 0] = 3 * (2 * read[:, 0] - 1)
        return x

    optimiser = torch.optim.Adam(gate.parameters(), 0.02)
    for _ in range(200):
        optimiser.zero_grad()
        control_loss(gate, drawn(16), policy).backward()
        optimiser.step()
    with torch.no_grad():
        size = gate.eval().factor(drawn(16)).norm(dim=-1).mean(0)
    assert float(size[1::2].max()) < 0.2 * float(size[::2].min())


@torch.no_grad()
def test_a_gate_of_one_leaves_the_decisions_as_they_are() -> None:
    gate, policy = _gate().eval(), _policy()
    with workbench.attach(gate) as wb:
        with wb.capture() as cap:
            gate(X)
        torch.testing.assert_close(cap[0].pattern.gates, gate.factor(X).transpose(1, 2))
        with wb.set_gate(wb.sites[0], to=1.0):
            assert torch.equal(policy(gate(X)), policy(X))


def test_decisions_that_cannot_be_learnt_from_are_named() -> None:
    policy = _policy()
    with pytest.raises(WorkbenchError, match=r"decode must give \[batch, step, class\]"):
        decision_gradient(X, lambda f: f.sum((1, 2)))
    with pytest.raises(WorkbenchError, match="there are 4 steps, none of"):
        decision_gradient(X, policy, slice(4, 9))
    with pytest.raises(WorkbenchError, match="do not depend on the features"):
        decision_gradient(X, lambda f: policy(torch.zeros_like(f)).detach())
    with pytest.raises(WorkbenchError, match="do not depend on the features"):
        decision_gradient(X, lambda f: policy(torch.zeros_like(f)))
    with pytest.raises(WorkbenchError, match="hidden=0"):
        ROOM.build(PLACE, hidden=0)
