"""Control-aided attention: a gate that learns the gradient of what a policy decides, so that it weighs what matters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.mechanisms.frame import Card, Claim, Gate, Mechanism, Place, register

Decode = Callable[[Tensor], Tensor]


class ControlAidedAttention(Gate):
    """a · F, a = W₂ relu(norm(W₁ F)) at each token alone: signed, not bounded, and not mixed.

    `control_loss` trains a towards the gradient of the decisions in F; at inference no gradient is needed.

    Args:
        place: the features of a scene.
        hidden: width between; d_model if None.

    Raises:
        WorkbenchError: a width below 1.
    """

    def __init__(self, place: Place, hidden: int | None = None) -> None:
        super().__init__(place)
        hidden = place.d_model if hidden is None else hidden
        if hidden < 1:
            raise WorkbenchError(f"hidden={hidden} is no width", hint="at least 1")
        self.first, self.second = nn.Linear(place.d_model, hidden), nn.Linear(hidden, place.d_model)
        self.norm = nn.BatchNorm1d(hidden)

    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and the factor of each."""
        hidden = self.norm(self.first(source).transpose(1, 2)).transpose(1, 2)
        return x, self.second(F.relu(hidden))

    def factor(self, x: Tensor) -> Tensor:
        """a, [batch, token, channel], of features x."""
        return self.parts(x, x)[1]


def decision_gradient(features: Tensor, decode: Decode, steps: slice = slice(None)) -> Tensor:
    """∂s/∂F, [batch, token, channel], of s, the mean of an example's logits over these steps and all classes.

    It depends on what is decided, not on whether that is right. The paper's code takes steps 1 to 13 of 14, which
    leaves out the first decision and takes in the end mark; 0 to 12 are the decisions.

    Args:
        features: F, [batch, token, channel].
        decode: makes logits [batch, step, class] of features; examples do not see each other.

    Raises:
        WorkbenchError: other logits, no steps, or logits that do not depend on the features.
    """
    given = features.detach().requires_grad_()
    with torch.enable_grad():
        logits = decode(given)
        if logits.dim() != 3 or len(logits) != len(given):
            raise WorkbenchError("decode must give [batch, step, class]", shape=logits.shape)
        chosen = logits[:, steps]
        if not chosen.numel():
            raise WorkbenchError(f"there are {logits.shape[1]} steps, none of {steps}", shape=logits.shape)
        if not chosen.requires_grad:
            raise WorkbenchError("the logits do not depend on the features", hint="decode(features) must use them")
        (found,) = torch.autograd.grad(chosen.mean((1, 2)).sum(), given, allow_unused=True)
    if found is None:
        raise WorkbenchError("the logits do not depend on the features", hint="decode(features) must use them")
    return found


def control_loss(gate: ControlAidedAttention, features: Tensor, decode: Decode, steps: slice = slice(None)) -> Tensor:
    """Mean squared distance of the gate's factors from `decision_gradient`, which is held fixed.

    To be added to the loss of the policy on gate(features): it moves the gate, and, through it, the features.
    """
    return F.mse_loss(gate.factor(features), decision_gradient(features, decode, steps))


CONTROL_AIDED = register(
    Mechanism(
        "control_aided",
        Card(
            title="Control-Aided Attention (CAA-Policy)",
            arxiv="2509.11090",
            equation="y = a · F, a = W₂ relu(BN(W₁ F)), trained with ‖a − ∂ mean(logits)/∂F‖²",
            map="The gate a, a factor for each channel of each token, which is made at that token alone.",
            kind="gate",
            grade="exact",
            cost="O(n·d_model²); in training one more backward pass of the decoder",
            causal="either",
            code="Joechencc/CAAPolicy has no licence in the branches that hold it: unused.",
            claims=(
                Claim("Attention that learns the gradient of decisions is steadier over time than one of the task."),
                Claim("A policy with it parks better than the same without."),
            ),
        ),
        ControlAidedAttention,
        variants={"narrow": {"hidden": 5}},
    )
)
