"""Attention that a model writes out is followed from its softmax to its product, however it is spelt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import workbench

HEADS, LENGTH, WIDTH = 3, 7, 4
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / 2


def _merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    weights = F.softmax(torch.bmm(q, k.transpose(1, 2)) / 2, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def _reshaped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = nn.Softmax(dim=-1)(_scores(q, k)).view(-1, LENGTH, LENGTH)
    return torch.bmm(weights, v.flatten(0, 1)).view(v.shape)


def _einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bihd, bjhd -> bhij", q.transpose(1, 2), k.transpose(1, 2)).div(2).softmax(-1)
    return torch.einsum("bhij, bjhd -> bihd", weights, v.transpose(1, 2)).transpose(1, 2)


def _einsum_of_a_list(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhlt,bhtv->bhlv", [_scores(q, k).softmax(-1), v])


def _with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat((_scores(q, k), torch.zeros(*q.shape[:3], 1)), dim=-1)
    return torch.matmul(scores.softmax(dim=-1)[..., :-1], v)


def _gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(_scores(q, k), -1) * torch.tensor([1.0, 0.5, 2.0])[:, None, None], v)


def _refilled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    weights = _scores(q, k).masked_fill(hidden, -1e9).softmax(-1).masked_fill(hidden, 0.0)
    return F.dropout(weights, 0.5, training=False).contiguous() @ v


def _normalised_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = _scores(q, k).softmax(-1).tril()
    return F.normalize(weights / weights.sum(-1, keepdim=True), p=1, dim=-1) @ v


def _differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_scores(q, k).softmax(-1) - 0.3 * _scores(k, q).softmax(-1) + torch.eye(LENGTH)) @ v


SPELLINGS: list[Spelling] = [
    _normalised_again,
    _differential,
    _merged,
    _reshaped,
    _einsum,
    _einsum_of_a_list,
    _with_sinks,
    _gated,
    _refilled,
]


class Model(nn.Module):
    """Self-attention whose q, k and v are fixed linear maps of the input."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.num_heads, self.spelling = HEADS, spelling
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.spelling(q, k, v).transpose(1, 2).flatten(2)


def _model(spelling: Spelling) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(spelling).eval(), torch.randn(2, LENGTH, HEADS * WIDTH)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_weights_times_values_is_the_output(spelling: Spelling) -> None:
    model, x = _model(spelling)
    bare = model(x)
    with workbench.attach(model, check=False) as wb:
        assert wb.verify(x).ok
        with wb.capture(z=True, values=True) as capture:
            assert torch.equal(model(x), bare)
    site = capture[0]
    assert site.shape == (2, HEADS, LENGTH, LENGTH)
    _, _, v = model.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
    applied = site.pattern.dense() @ v
    torch.testing.assert_close(applied.transpose(1, 2).flatten(2), bare)
    torch.testing.assert_close(applied.transpose(1, 2), site.z)


def test_rows_that_do_not_sum_to_one_are_marked() -> None:
    model, x = _model(_with_sinks)
    with workbench.attach(model, check=False) as wb, wb.capture() as capture:
        model(x)
    assert capture[0].marks == "unnormalised"
    assert (capture[0].pattern.dense().sum(-1) < 1).all()


def test_what_is_written_into_a_tensor_is_edited_there() -> None:
    def written_into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.matmul(_scores(q, k).softmax(-1), v, out=(z := torch.empty_like(v)))
        return z

    model, x = _model(written_into)
    with torch.no_grad(), workbench.attach(model, check=False) as wb:
        want = model(x).unflatten(-1, (HEADS, WIDTH))
        want[..., 1, :] = 0
        assert wb.verify(x).ok
        with wb.ablate((0, 1)):
            assert torch.equal(model(x), want.flatten(2))


def test_weights_below_zero_are_counted_by_their_size(tmp_path: Path) -> None:
    def signed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _scores(q, k).softmax(-1) * torch.linspace(-1, 2, LENGTH) @ v

    model, x = _model(signed)
    with workbench.attach(model, check=False) as wb, wb.capture(("entropy", "signed_mass"), values=True) as capture:
        model(x)
    weights = capture[0].pattern.dense().double()
    shares = weights.abs() / weights.abs().sum(-1, keepdim=True)
    assert capture[0].marks == "signed"
    capture.save(tmp_path / "signed.safetensors", pattern=True)
    for site in (capture[0], workbench.load_capture(tmp_path / "signed.safetensors")[0]):
        found = site.pattern.statistics(["entropy"])["entropy"]
        for entropy in (site.entropy, found):
            torch.testing.assert_close(entropy.double(), torch.special.entr(shares).sum(-1), atol=1e-6, rtol=1e-5)
        mass = weights.sum(-1) / weights.abs().sum(-1)
        torch.testing.assert_close(site.signed_mass.double(), mass, atol=1e-6, rtol=1e-5)


def test_keys_of_weight_zero_in_every_head_are_hidden() -> None:
    model, x = _model(_refilled)
    with workbench.attach(model, check=False) as wb, wb.capture(("received_mean",)) as capture:
        model(x)
    assert capture[0].pattern.seen.keys_per_query[0, 0].tolist() == list(range(1, LENGTH + 1))


def test_weights_are_those_before_dropout() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(_scores(q, k).softmax(-1), 0.5, training=True) @ v

    model, x = _model(dropped)
    with workbench.attach(model, check=False) as wb, wb.capture() as capture:
        model(x)
    torch.testing.assert_close(capture[0].pattern.dense().sum(-1), torch.ones(2, HEADS, LENGTH))


def test_a_softmax_that_is_no_attention_is_left_alone() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gates = x.softmax(-2)  # over another axis
            return gates.transpose(-1, -2) @ x + x.softmax(-1).sum()

    with (
        workbench.attach(Router(), check=False) as wb,
        pytest.raises(workbench.WorkbenchError, match="no attention call was seen"),
        wb.capture(),
    ):
        wb.model(torch.randn(2, 3, 5, 5))


def test_nothing_is_kept_alive() -> None:
    import gc
    import weakref

    kept: list[weakref.ref[Tensor]] = []

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = _scores(q, k).softmax(-1)
        kept.append(weakref.ref(weights))
        return weights @ v

    model, x = _model(watched)
    with (
        torch.no_grad(),
        workbench.attach(model, check=False) as wb,
        wb.capture(queries_keys=False),
    ):
        model(x)
        gc.collect()
        assert kept[0]() is None
