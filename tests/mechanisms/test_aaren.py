"""Aaren against softmax over every prefix, and token by token."""

import torch

import workbench
from workbench import mechanisms
from workbench.mechanisms import Place

PLACE = Place(24, 4, 19)


@torch.no_grad()
def test_rows_are_softmax_over_their_prefix_and_compare_keys_alike() -> None:
    torch.manual_seed(0)
    layer, x = mechanisms.get("aaren").build(PLACE).double(), torch.randn(2, 19, 24, dtype=torch.float64)
    with workbench.attach(layer) as wb, wb.capture([]) as cap:
        layer(x)
    q, k, _ = layer.heads(x)
    scores = (q @ k.mT / 6**0.5).expand(2, 4, 19, 19)
    hidden = torch.ones(19, 19, dtype=torch.bool).triu(1)
    whole = cap[0].pattern.dense()
    torch.testing.assert_close(whole, scores.masked_fill(hidden, -torch.inf).softmax(-1), atol=1e-12, rtol=1e-10)
    ratio = whole[..., 2:, 1] / whole[..., 2:, 2]
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


@torch.no_grad()
def test_a_stack_runs_token_by_token_in_constant_memory() -> None:
    torch.manual_seed(0)
    layers = [mechanisms.get("aaren").build(PLACE).double() for _ in range(2)]
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    want = x
    for layer in layers:
        want = want + layer(want)
    states = [layer.stream() for layer in layers]
    sizes = set()
    for t in range(19):
        y = x[:, t : t + 1]
        for layer, state in zip(layers, states, strict=True):
            _, k, v = layer.heads(y)
            y = y + layer.finish(state.update(k, v), v, y)
            sizes.add(sum(part.numel() for part in state.sums))
        torch.testing.assert_close(y[:, 0], want[:, t])
    assert sizes == {2 * 4 * (6 + 2)}


def test_it_has_the_parameters_of_attention_and_one_token_more() -> None:
    own, plain = mechanisms.get("aaren").build(PLACE), mechanisms.get("sqa").build(PLACE, "mha")
    assert sum(p.numel() for p in own.parameters()) == sum(p.numel() for p in plain.parameters()) + 24
