"""Rows with autograd are the pattern's rows, positions mean what they say, and edits touch nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.errors import InterventionError
from workbench.hooks.edits import Ablation, Edit, Patch, PatternEdit, Steer, SteerOutput, zero
from workbench.hooks.positions import Positions
from workbench.hooks.rows import rows
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall
from workbench.kernels.lightning import lightning_attention
from workbench.kernels.patterns import DensePattern

B, H, KV, Q, K, D = 2, 4, 2, 5, 7, 3
SITE = Site("attn", 0, "self", H, KV, D)
HIDDEN = torch.rand(B, 1, Q, K, generator=torch.Generator().manual_seed(1)) < 0.3


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_with(dtype: torch.dtype = torch.float64, **facts: Any) -> AttentionCall:
    """A call of random queries, keys and values; its output is left at zero."""
    q, k, v = (
        _normal(*shape, seed=i).to(dtype) for i, shape in enumerate(((B, H, Q, D), (B, KV, K, D), (B, KV, K, D)))
    )
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "output": torch.zeros_like(q)}
    return AttentionCall(site="attn", module=nn.Identity(), kernel="test", tap="test", **given | facts)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "causal with a cache": {"is_causal": True, "offset": K - Q},
    "window": {"is_causal": True, "offset": K - Q, "window": 2},
    "boolean mask": {"mask": ~HIDDEN},
    "boolean mask with a dead row": {"mask": ~HIDDEN & (torch.arange(Q) != 1)[:, None]},
    "mask of keys": {"mask": (torch.arange(K) < 5)[None, None, None]},
    "two-dimensional mask": {"mask": ~HIDDEN[0, 0]},
    "additive mask": {"mask": HIDDEN.double() * torch.finfo(torch.float64).min},
    "additive mask of minus infinity": {"mask": torch.zeros(B, H, Q, K).double().masked_fill(HIDDEN, -torch.inf)},
    "bias": {"bias": _normal(1, H, Q, K, seed=5)},
    "bias and mask": {"bias": _normal(1, H, Q, K, seed=5), "mask": ~HIDDEN},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": _normal(H, seed=6), "mask": ~HIDDEN},
    "written out": {"weights": _normal(B, H, Q, K, seed=7).softmax(-1), "q": None, "k": None, "v": _normal(B, H, K, D)},
}


@pytest.mark.parametrize("facts", CALLS.values(), ids=CALLS)
def test_rows_are_those_of_the_pattern(facts: dict[str, Any]) -> None:
    call = call_with(**facts)
    truth = call.pattern().dense()
    for head in range(H):
        for index in (torch.arange(Q)[None], torch.tensor([[4, 1]]), torch.tensor([[0, 3], [2, 2]])):
            want = truth[:, head].gather(1, index[..., None].expand(B, -1, K))
            torch.testing.assert_close(rows(call, head, index), want, atol=1e-12, rtol=1e-12)


def test_rows_of_a_row_that_an_additive_mask_hides_are_what_softmax_makes_of_it() -> None:
    """Kernels add the mask and spread the row; the pattern says that it sees no key."""
    call = call_with(mask=torch.full((1, 1, 1, K), torch.finfo(torch.float64).min, dtype=torch.float64))
    torch.testing.assert_close(rows(call, 0, torch.tensor([[0]])), torch.full((B, 1, K), 1 / K).double())


@pytest.mark.parametrize("name", [name for name in CALLS if name != "written out"])
def test_rows_have_the_right_gradients(name: str) -> None:
    facts = dict(CALLS[name])
    call = call_with(**facts)
    assert call.q is not None
    assert call.k is not None
    learned = {"q": call.q, "k": call.k} | {n: facts[n] for n in ("bias", "sinks") if n in facts}
    if isinstance(facts.get("mask"), Tensor) and facts["mask"].is_floating_point() and "minus" not in name:
        learned["mask"] = torch.where(HIDDEN, -8.0, 0.5).double()  # a learned bias may come as the mask
    tensors = [t.clone().requires_grad_() for t in learned.values()]

    def function(*given: Tensor) -> Tensor:
        return rows(call_with(**facts | dict(zip(learned, given, strict=True))), 3, torch.tensor([[4, 1]]))

    assert torch.autograd.gradcheck(function, tensors)


def test_rows_that_the_model_wrote_out_keep_their_history() -> None:
    weights = _normal(B, H, Q, K).softmax(-1).requires_grad_()
    rows(call_with(weights=weights), 2, torch.tensor([[0, 3]])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.sum(-1).nonzero().tolist() == [[b, 2, q] for b in range(B) for q in (0, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_low_precision_are_float32(dtype: torch.dtype) -> None:
    call = call_with(dtype)
    found = rows(call, 1, torch.arange(Q)[None])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, call.pattern().dense()[:, 1])


def test_rows_of_another_kernel_are_constants_and_a_surrogate_has_none() -> None:
    q, k, v = (_normal(B, H, Q, D, seed=i).float().requires_grad_() for i in range(3))
    call = call_with(q=q, k=k, v=v, output=lightning_attention(q, k, v),
                     build=lambda: lightning_attention.pattern_of(q, k, v))  # fmt: skip
    for index in (torch.arange(Q)[None], torch.tensor([[4, 1]]), torch.tensor([[0, 3], [2, 2]])):
        found = rows(call, 1, index)
        assert not found.requires_grad
        want = call.pattern().dense()[:, 1].gather(1, index[..., None].expand(B, -1, Q))
        torch.testing.assert_close(found, want)

    class Surrogate(DensePattern):
        grade = "surrogate"

    call = call_with(build=lambda: Surrogate(torch.ones(B, H, Q, K)))
    with pytest.raises(InterventionError, match="does not apply them"):
        rows(call, 1, torch.tensor([[0]]))


MASK = torch.tensor([[True, False, False, True], [False, True, False, False]])


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (None, [[1, 1, 1, 1]]),
        (1, [[0, 1, 0, 0]]),
        (-1, [[0, 0, 0, 1]]),
        (slice(1, 3), [[0, 1, 1, 0]]),
        (slice(None, None, 2), [[1, 0, 1, 0]]),
        ([0, -2], [[1, 0, 1, 0]]),
        (range(2), [[1, 1, 0, 0]]),
        (torch.tensor(3), [[0, 0, 0, 1]]),
        (torch.tensor([3, 0]), [[1, 0, 0, 1]]),
        (torch.tensor([[3], [0]]), [[0, 0, 0, 1], [1, 0, 0, 0]]),
        (torch.tensor([[3, -4], [1, 1]], dtype=torch.int32), [[1, 0, 0, 1], [0, 1, 0, 0]]),
        (MASK[0], [[1, 0, 0, 1]]),
        (MASK, [[1, 0, 0, 1], [0, 1, 0, 0]]),
    ],
    ids=str,
)
def test_positions(given: Any, want: list[list[int]]) -> None:
    assert Positions(given).mask(2, 4).int().tolist() == want


def test_positions_in_their_order() -> None:
    assert Positions([2, 0]).index(3, 4).tolist() == [[2, 0]]
    assert Positions(MASK & MASK[1]).everywhere is False
    assert Positions(torch.tensor([[1, -1]])).index(1, 4).tolist() == [[1, 3]]
    assert Positions(torch.tensor([[True, False], [False, True]])).index(2, 2).tolist() == [[0], [1]]


NONE = [True, 1.5, [1, True], ["a"], "1", [], [[1], [2]], {}, torch.tensor([0.5]), torch.zeros(0).long(),
        torch.ones(1, 1, 1).bool(), torch.tensor(True)]  # fmt: skip


@pytest.mark.parametrize("given", NONE, ids=str)
def test_what_are_no_positions(given: Any) -> None:
    with pytest.raises(InterventionError, match="positions"):
        Positions(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (4, "no position 4: the call has 4 queries, −4 to 3"),
        (-5, "no position -5"),
        ([0, 9], "no position 9"),
        (torch.tensor([[0], [1], [2]]), "given for 3 examples, the call has 2"),
        (MASK[:, :3], r"a mask [2, 3], the call has 2 examples of 4 positions"),
        (torch.cat((MASK, MASK)), r"a mask [4, 4]"),
        (slice(4, None), "choose none of 4"),
        (MASK & False, "False everywhere"),
    ],
    ids=str,
)
def test_positions_that_do_not_fit(given: Any, message: str) -> None:
    for resolve in (Positions(given).mask, Positions(given).index):
        with pytest.raises(InterventionError) as caught:
            resolve(2, 4, "attn")
        assert message in str(caught.value)
        assert caught.value.site == "attn"


def test_rows_are_as_many_in_each_example() -> None:
    with pytest.raises(InterventionError, match=r"\[2, 1\] positions"):
        Positions(MASK).index(2, 4)


@pytest.mark.parametrize(
    "edit",
    [
        Ablation({SITE: [1, 3]}, zero, Positions([0, -1])),
        Patch({SITE: {1: torch.ones(D), 3: lambda z, site, head: z + 1}}, Positions([0, -1])),
        Steer({SITE: [1, 3]}, torch.ones(D), Positions([0, -1])),
        PatternEdit({SITE: [1, 3]}, lambda rows, site, head: rows + 1, Positions([0, -1])),
    ],
    ids=["ablation", "patch", "steer", "pattern"],
)
@pytest.mark.parametrize("layout", ["bhqd", "bqhd"])
def test_edits_are_out_of_place_and_keep_the_rest(edit: Edit, layout: str) -> None:
    call = call_with(torch.float32)
    output = call.pattern().apply(call.v)
    output = output if layout == "bhqd" else output.transpose(1, 2).contiguous()
    call = replace(call, output=output, layout=layout)
    before, version = output.clone(), output._version
    z = call.z()
    new = edit(call, z)
    assert torch.equal(output, before)
    assert output._version == version
    assert new.stride() == z.stride()  # the model goes on in the same order of sums
    same = torch.ones(H, Q, dtype=torch.bool)
    same[[[1], [3]], [0, Q - 1]] = False
    assert torch.equal(new[:, same], z[:, same])
    assert not (new[:, ~same] == z[:, ~same]).any()


def test_rows_that_are_not_the_kernels_are_refused() -> None:
    call = call_with(sinks=_normal(H))
    truth = call.pattern().apply(call.v)
    edit = PatternEdit({SITE: [1]}, lambda rows, site, head: rows, Positions([0, 2]))
    torch.testing.assert_close(edit(replace(call, output=truth), truth), truth)
    unknown = replace(call, output=truth, sinks=None)
    with pytest.raises(InterventionError, match="not those of test") as caught:
        PatternEdit({SITE: [1]}, edit.edit, Positions([0, 2]))(unknown, truth)
    assert caught.value.site == "attn"


def test_the_first_tensor_of_an_output_is_steered() -> None:
    from collections import namedtuple

    from transformers.modeling_outputs import BaseModelOutput

    hidden, other = torch.zeros(2, 3, 4), torch.ones(1)
    edit = SteerOutput("m", torch.ones(4), Positions(-1))
    want = torch.zeros(2, 3, 4)
    want[:, -1] = 1
    pair = namedtuple("pair", "a b")
    outputs: list[Any] = [hidden, (hidden, other), [hidden, other], pair(hidden, other), {"a": hidden, "b": other}]
    outputs.append(BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,)))
    for output in outputs:
        new = edit("m", nn.Identity(), output)
        assert type(new) is type(output)
        first = new if isinstance(new, Tensor) else new["a"] if type(new) is dict else new[0]
        assert torch.equal(first, want)
        assert not hidden.any()
        if not isinstance(output, Tensor):
            assert len(new) == len(output)
    assert torch.equal(new.last_hidden_state, want)
    for output in (None, (), (None, hidden), {"a": None}, 3):
        with pytest.raises(InterventionError, match="gives no tensor"):
            edit("m", nn.Identity(), output)


def test_positions_of_modules_whose_positions_come_first() -> None:
    edit = SteerOutput("m", torch.ones(4), Positions(torch.tensor([[0], [2]])))
    new = edit("m", nn.TransformerEncoderLayer(4, 2), torch.zeros(3, 2, 4))
    assert new.sum(-1).nonzero().tolist() == [[0, 0], [2, 1]]
    new = edit("m", nn.TransformerEncoderLayer(4, 2, batch_first=True), torch.zeros(2, 3, 4))
    assert new.sum(-1).nonzero().tolist() == [[0, 0], [1, 2]]
    with pytest.raises(InterventionError, match="batch, position, d_model"):
        edit("m", nn.Identity(), torch.zeros(3, 4))
    assert SteerOutput("m", torch.ones(4), Positions())("m", nn.Identity(), torch.zeros(3, 4)).sum() == 12
