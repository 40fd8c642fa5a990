"""Paged, continuously batched attention: each request's rows are those that it has alone; a stand-in for vLLM."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import CaptureError
from workbench.hooks.serving import PagedBatch, Served, recording_backend
from workbench.hooks.serving.vllm import cache_axes

HEADS, KV_HEADS, WIDTH, SLOTS, BLOCKS = 6, 2, 8, 4, 32


@dataclass
class Request:
    """Queries and keys of a whole sequence [position, head, d_head], and the pages that hold its keys."""

    q: Tensor
    k: Tensor
    blocks: list[int]


def _requests(lengths: list[int]) -> tuple[list[Request], Tensor]:
    """Requests whose pages lie anywhere, and the pages [block, slot, kv head, d_head], noise in between."""
    draw = torch.Generator().manual_seed(0)
    pages = torch.randn(BLOCKS, SLOTS, KV_HEADS, WIDTH, generator=draw)
    free = torch.randperm(BLOCKS, generator=draw).tolist()
    found = []
    for n in lengths:
        one = Request(
            torch.randn(n, HEADS, WIDTH, generator=draw), torch.randn(n, KV_HEADS, WIDTH, generator=draw),
            [free.pop() for _ in range(-(-n // SLOTS))],
        )  # fmt: skip
        for at, key in enumerate(one.k):
            pages[one.blocks[at // SLOTS], at % SLOTS] = key
        found.append(one)
    return found, pages


def _weights(one: Request, n_keys: int, **how: Any) -> Tensor:
    """[head, query, key] in float64, by the definition."""
    q, k = one.q[:n_keys].double(), one.k[:n_keys].double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    if how.get("softcap"):
        scores = how["softcap"] * (scores / how["softcap"]).tanh()
    at = torch.arange(n_keys)
    if how.get("slopes") is not None:
        scores = scores + how["slopes"].double()[:, None, None] * (at - at[:, None])
    hidden = at > at[:, None]
    if how.get("window"):
        hidden |= at <= at[:, None] - how["window"]
    scores = scores.masked_fill(hidden, -torch.inf)
    if how.get("sinks") is not None:
        sinks = how["sinks"].double()[:, None, None].expand(-1, n_keys, 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


WAYS: list[dict[str, Any]] = [
    {}, {"window": 3}, {"softcap": 2.0}, {"sinks": torch.linspace(-1, 1, HEADS)},
    {"slopes": 2.0 ** -torch.arange(1, HEADS + 1)},
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS, ids=lambda how: next(iter(how), "plain"))
def test_rows_of_each_request_are_those_that_it_has_alone(how: dict[str, Any]) -> None:
    """A prefill, a chunk of one, two steps, and rows of the batch that nobody uses."""
    requests, pages = _requests([9, 7, 1, 13])
    new = [9, 3, 1, 1]  # queries of this step
    query = torch.cat([one.q[len(one.q) - n :] for one, n in zip(requests, new, strict=True)])
    table = torch.zeros(6, 5, dtype=torch.int32)
    for row, one in zip(table, requests, strict=False):
        row[: len(one.blocks)] = torch.tensor(one.blocks)
    starts = torch.tensor([0, 9, 12, 13, 14, 14])
    batch = PagedBatch(query, pages, starts, torch.tensor([9, 7, 1, 13, 0]), table, scale=0.3, **how)
    heads = [5, 0, 3]
    found = list(batch.served(heads, ("entropy", "lse")))
    assert [(s.request, s.start, s.n_keys) for s in found] == [(0, 0, 9), (1, 4, 7), (2, 0, 1), (3, 12, 13)]
    for served, one, n in zip(found, requests, new, strict=True):
        whole = _weights(one, served.n_keys, **how)[heads]
        assert served.blocks == tuple(one.blocks)
        torch.testing.assert_close(served.row.double(), whole[:, -1], atol=1e-6, rtol=1e-5)
        rows = whole[:, -n:]
        share = rows / rows.sum(-1, keepdim=True) if "sinks" not in how else rows
        entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
        torch.testing.assert_close(served.statistics["entropy"].double(), entropy, atol=1e-5, rtol=1e-4)
        assert served.statistics["lse"].shape == (3, n)


def test_what_does_not_fit() -> None:
    requests, pages = _requests([5])
    table = torch.tensor([requests[0].blocks])
    batch = PagedBatch(requests[0].q, pages, torch.tensor([0, 5]), torch.tensor([5]), table, scale=0.3)
    for heads in ([6], [-1], []):
        with pytest.raises(CaptureError, match="head"):
            list(batch.served(heads))
    with pytest.raises(CaptureError, match="different numbers"):
        list(PagedBatch(requests[0].q, pages, torch.tensor([0, 5]), torch.tensor([5, 1]), table, 0.3).served([0]))


# A stand-in for vLLM: the parts of its interface that a back end has, with attention written out.


@dataclass
class Metadata:
    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    causal: bool = True


class Layer:
    def __init__(self, name: str) -> None:
        self.layer_name = name


class Impl:
    """As vLLM makes it: sizes first, then the rest by name."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, **more: Any) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.sliding_window = more.get("sliding_window", (-1, -1))
        self.logits_soft_cap, self.alibi_slopes, self.sinks = 0, None, None
        self.attn_type, self.kv_cache_dtype = "decoder", "auto"

    def forward(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor | None = None, output_scale: Any = None, output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        assert output is not None
        return output.fill_(0.5)


class PagesFirst:
    """[block, 2, slot, kv head, width]."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        if block_size % 16:
            raise ValueError("Block size must be a multiple of 16.")
        return num_blocks, 2, block_size, num_kv_heads, head_size

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl


class HeadsBeforeSlots(PagesFirst):
    """[2, block, kv head, slot, width]."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        return 2, num_blocks, num_kv_heads, block_size, head_size


class Latent(PagesFirst):
    """One vector for keys and values."""

    @staticmethod
    def get_kv_cache_shape(*sizes: int, cache_dtype_str: str = "auto") -> tuple[int, ...]:
        return sizes[0], sizes[1], sizes[3]


def _call(backend: type[Any], name: str, change: dict[str, Any] | None = None) -> tuple[Tensor, list[Request]]:
    requests, pages = _requests([6, 11])
    both = torch.stack([pages, torch.randn_like(pages)])  # [2, block, slot, kv head, width]
    kv, block, slot, head, width = cache_axes(backend)
    cache = both.permute([{kv: 0, block: 1, slot: 2, head: 3, width: 4}[axis] for axis in range(5)]).contiguous()
    impl = backend.get_impl_cls()(HEADS, WIDTH, 0.3, KV_HEADS)
    for attribute, value in (change or {}).items():
        setattr(impl, attribute, value)
    query = torch.zeros(16, HEADS, WIDTH)  # padded, as for graphs
    query[:6], query[6] = requests[0].q, requests[1].q[-1]
    table = torch.zeros(2, 4, dtype=torch.int32)
    for row, one in zip(table, requests, strict=True):
        row[: len(one.blocks)] = torch.tensor(one.blocks)
    metadata = Metadata(7, torch.tensor([0, 6, 7]), torch.tensor([6, 11]), table)
    key = torch.zeros(16, KV_HEADS, WIDTH)
    given = impl.forward(Layer(name), query, key, key, cache, metadata, torch.zeros(16, HEADS * WIDTH))
    impl.forward(Layer(name), query, key, key, cache, None, output=torch.zeros(16, HEADS * WIDTH))  # warming up
    return given, requests


@pytest.mark.parametrize("base", [PagesFirst, HeadsBeforeSlots])
def test_a_back_end_of_vllm_tells_and_changes_nothing(base: type[Any]) -> None:
    told: list[tuple[str, Served]] = []
    backend = recording_backend(base, {"a": [4, 1]}, lambda name, one: told.append((name, one)), ("entropy",))
    assert issubclass(backend, base)
    assert issubclass(backend.get_impl_cls(), Impl)
    given, requests = _call(backend, "a")
    assert (given == 0.5).all()
    assert [name for name, _ in told] == ["a", "a"]
    for (_, served), one, n in zip(told, requests, (6, 1), strict=True):
        whole = _weights(one, len(one.q))[[4, 1]]
        torch.testing.assert_close(served.row.double(), whole[:, -1], atol=1e-6, rtol=1e-5)
        assert served.statistics["entropy"].shape == (2, n)
    told.clear()
    _call(backend, "another layer")
    assert not told


@pytest.mark.parametrize(
    ("change", "said"),
    [({"kv_cache_dtype": "fp8_e4m3"}, "quantized"), ({"attn_type": "encoder_only"}, "only causal"),
     ({"num_heads": 5}, "invalid for input|shape")],
)  # fmt: skip
def test_what_cannot_be_told_breaks_no_request(
    change: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Served] = []
    backend = recording_backend(PagesFirst, {"a": [0]}, lambda name, one: told.append(one))
    given, _ = _call(backend, "a", change)
    assert (given == 0.5).all()
    assert not told
    import re

    assert re.search(said, caplog.text)


def test_a_cache_of_another_kind_is_refused() -> None:
    with pytest.raises(CaptureError, match="no pages of keys beside values"):
        recording_backend(Latent, {"a": [0]}, lambda name, one: None)
