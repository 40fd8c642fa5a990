"""Other people's implementations of the rooms' mechanisms: what is found in them, and what is not, is all there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import workbench
from support.judges import judges, missing, part
from support.survey.packages import PACKAGES
from workbench import mechanisms
from workbench.mechanisms import Place

N = 26


def _local(**options: Any) -> Any:
    try:
        with judges():
            from local_attention import LocalAttention
    except ImportError as error:
        missing(error)
    torch.manual_seed(0)
    return LocalAttention(window_size=4, autopad=True, **{"dim": 8, **options}).eval()


class _Attending(nn.Module):
    """A module that hands q, k and v on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        made: Tensor = self.inner(q, k, v, mask=mask)
        return made


def _inputs(heads: bool = True) -> dict[str, Tensor]:
    shape = (2, 3, N, 8) if heads else (2, N, 8)
    made = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    return dict(zip("qkv", made, strict=True))


def _near(back: int, ahead: int, exact: bool) -> Tensor:
    """[query, key] bool of windows of 4."""
    i, j = torch.arange(N)[:, None], torch.arange(N)
    seen = (i // 4 - j // 4 <= back) & (j // 4 - i // 4 <= ahead)
    return seen & (i - j <= 4 * back) & (j - i <= 4 * ahead) if exact else seen


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True}, {"causal": True, "exact_windowsize": True}, {"causal": True, "look_backward": 2, "dim": None},
        {"causal": True, "shared_qk": True}, {"causal": True, "use_xpos": True, "exact_windowsize": True}, {},
        {"exact_windowsize": True}, {"look_forward": 0, "scale": 0.3},
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_local_attention_is_read_over_the_whole_sequence(options: dict[str, Any], heads: bool) -> None:
    inputs, model = _inputs(heads), _Attending(_local(**options))
    if options.get("shared_qk"):
        inputs["k"] = inputs["q"]
    with workbench.attach(model) as wb:
        report = wb.verify(**inputs)
        assert report.ok, report.table
        assert not wb.sites.unread
        with wb.capture(["entropy"], values=True) as cap:
            bare = model(**inputs)
        with wb.ablate((0, 0)):
            ablated = model(**inputs)
    assert (cap[0].site.kind, cap[0].shape) == ("self", (2, 3 if heads else 1, N, N))
    weights = cap[0].pattern.dense()
    z = weights @ cap[0].pattern.values.to(weights.dtype)
    torch.testing.assert_close(z.view_as(bare).float(), bare, atol=1e-5, rtol=1e-5)
    assert not (ablated[:, 0] if heads else ablated).any()
    causal = options.get("causal", False)
    ahead = options.get("look_forward", 0 if causal else 1)
    seen = _near(options.get("look_backward", 1), ahead, options.get("exact_windowsize", False))
    seen = seen.tril() if causal else seen
    if options.get("shared_qk"):
        seen = seen & (~torch.eye(N).bool() | (torch.arange(N) == 0))
    assert torch.equal(weights[0, 0] > 0, seen)
    sums = weights.sum(-1)
    if causal:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:  # keys of zeros fill up the last window
        assert bool((sums[..., -6:] < 0.999).any()) == (not cap[0].pattern.normalised)


@torch.no_grad()
def test_masked_tokens_of_local_attention() -> None:
    model, inputs = _Attending(_local(causal=True)), _inputs()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 22:] = False
    with workbench.attach(model) as wb:
        assert wb.verify(**inputs, mask=mask).ok
        with wb.capture([]) as cap:
            model(**inputs, mask=mask)
    assert not cap[0].pattern.dense()[1, :, :, 22:].any()
    mask[1, 10:] = False  # windows in which nothing is left
    with (
        workbench.attach(model) as wb,
        pytest.raises(workbench.CaptureError, match="a token sees no other"),
        wb.capture([]),
    ):
        model(**inputs, mask=mask)


@pytest.mark.parametrize(("groups", "query_groups"), [(2, 4), (4, 4), (2, 2), (1, 4), (4, 2)])
@torch.no_grad()
def test_sparse_queries_of_rxlm_are_ours_and_are_found(groups: int, query_groups: int) -> None:
    try:
        attention = part("rxlm.transformers.attention").SparseQueryAttention
    except ImportError as error:
        missing(error)
    torch.manual_seed(0)
    judge = attention(32, 8, groups, query_groups, is_causal=True, use_bias=True).eval()
    x = torch.randn(2, 11, 32)
    with workbench.attach(judge) as wb:
        assert wb.verify(query=x, key=x, value=x).ok
        assert not wb.sites.unread
        with wb.capture(["entropy"]) as cap:
            given = judge(x, x, x)
    (site,) = cap.sites
    assert (site.kind, cap[0].shape) == ("self", (2, max(groups, query_groups), 11, 11))
    if query_groups < groups:
        return  # rSQA, whose queries are repeated: ours has none
    ours = mechanisms.get("sqa").build(Place(32, 8, 11), heads=query_groups / 8, kv_heads=groups / 8)
    for mine, theirs in ((ours.q, judge.q_proj), (ours.k, judge.k_proj), (ours.v, judge.v_proj)):
        mine.load_state_dict(theirs.state_dict())
    ours.out.weight.copy_(judge.out_proj.weight)
    torch.testing.assert_close(ours(x) + judge.out_proj.bias, given, atol=1e-5, rtol=1e-5)
    with workbench.attach(ours) as wb, wb.capture([]) as mine:
        ours(x)
    torch.testing.assert_close(mine[0].pattern.dense(), cap[0].pattern.dense(), atol=1e-5, rtol=1e-5)


# Of each, the sites by the end of their names with kind, heads, and what else mixes tokens and is no site.
FOUND: dict[str, tuple[list[tuple[str, str, int]], list[str]]] = {
    "Routing Transformer": ([("local_attn", "self", 2), ("global_attn", "self", 2)], []),
    "Agent Transformer": ([("0.0", "self", 4)], []),
    "HaloNet": ([("0", "self", 4)], []),
}


@pytest.mark.parametrize("label", FOUND)
@torch.no_grad()
def test_all_of_a_judge_is_a_site_or_named(label: str) -> None:
    one = next(each for each in PACKAGES if each.label == label)
    try:
        model = one.make()
    except ModuleNotFoundError as error:
        missing(error)
    inputs = one.inputs()
    if label == "Routing Transformer":
        model(**inputs)  # the first forward draws the centroids
    sites, unread = FOUND[label]
    with workbench.attach(model) as wb:
        report = wb.verify(**inputs)
        assert report.ok, report.table
        found = [(site.name, site.kind, site.n_heads) for site in wb.sites]
        assert len(found) == len(sites), wb.sites
        for (name, *rest), (ending, *wanted) in zip(found, sites, strict=True):
            assert name.endswith(ending), name
            assert rest == wanted
        assert [each.name for each in wb.sites.unread] == unread, wb.sites
        with wb.capture(["entropy"], values=True) as cap:
            model(**inputs)
    for site in cap:
        n = site.shape[2]
        assert site.shape[:2] == (2, site.site.n_heads)
        assert site.shape[3] >= n
        assert site.pattern.dense().isfinite().all()
