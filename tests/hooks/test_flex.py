"""Models that call `flex_attention` themselves."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import workbench
from workbench import CaptureError

B, H, D = 2, 4, 6
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.tanh(score / 2) * 2 + (j - i) * 0.1 * (h + 1)


class Attention(nn.Module):
    def __init__(self, kv: int = H, length: int = 130, score_mod: Any = None, masked: bool = True) -> None:
        super().__init__()
        self.num_heads, self.kv, self.score_mod = H, kv, score_mod
        self.q, self.k, self.v = (nn.Linear(24, n * D) for n in (H, kv, kv))
        self.o = nn.Linear(H * D, 24)
        self.mask = create_block_mask(_causal, None, None, length, length, device="cpu") if masked else None

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = ((self.q, H), (self.k, self.kv), (self.v, self.kv))
        return [part(x).unflatten(-1, (n, D)).transpose(1, 2) for part, n in parts]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, self.score_mod, self.mask, enable_gqa=self.kv != H)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))


class ByModule(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        aux = flex.AuxRequest(lse=True)
        out, _ = flex.flex_attention(q, k, v, self.score_mod, self.mask, enable_gqa=self.kv != H, return_aux=aux)
        return out


class Hidden(Attention):
    """Calls it by a reference that nothing in its code shows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"attend": flex_attention}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.kept["attend"](q, k, v, None, self.mask)


def _by_hand(attention: Attention, x: Tensor) -> Tensor:
    q, k, _ = (t.double() for t in attention.heads(x))
    n = x.shape[1]
    scores = q @ k.repeat_interleave(H // attention.kv, 1).mT / D**0.5
    if attention.score_mod is not None:
        heads, i, j = torch.arange(H)[:, None, None], torch.arange(n)[:, None], torch.arange(n)
        scores = attention.score_mod(scores, torch.tensor(0), heads, i, j)
    if attention.mask is not None:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "attention",
    [Attention(), Attention(kv=2), ByModule(kv=2), Attention(score_mod=_alibi), Attention(masked=False)],
    ids=["masked", "grouped", "by module", "scores changed", "unmasked"],
)
@torch.no_grad()
def test_patterns_are_those_by_hand(attention: Attention) -> None:
    model, x = nn.Sequential(attention).eval(), torch.randn(B, 130, 24)
    bare = model(x)
    with workbench.attach(model) as wb:
        verification = wb.verify(x).raise_if_failed()
        with wb.capture(pattern=True, z=True) as cap:
            seen = model(x)
        with wb.ablate((0, 1)):
            edited = model(x)
    assert verification.compared
    assert torch.equal(bare, seen)
    assert torch.equal(model(x), bare)
    assert flex.flex_attention is flex_attention
    assert Attention.attend.__globals__["flex_attention"] is flex_attention
    want = _by_hand(attention, x)
    torch.testing.assert_close(cap["0"].pattern.dense().double(), want, atol=1e-5, rtol=0)
    z = attention.attend(*attention.heads(x))
    z[:, 1] = 0
    torch.testing.assert_close(edited, attention.o(z.transpose(1, 2).flatten(2)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_call_by_another_way_runs_and_is_said_to_be_unseen() -> None:
    model, x = nn.Sequential(Hidden()).eval(), torch.randn(B, 130, 24)
    bare = model(x)
    with workbench.attach(model, check=False) as wb:
        seen = []
        with pytest.raises(CaptureError, match="no attention call was seen"), wb.capture():
            seen.append(model(x))
    assert torch.equal(bare, seen[0])
    assert torch.equal(bare, model(x))


def test_nothing_warns_where_nothing_is_captured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workbench.attach(nn.Sequential(Attention())).detach()
