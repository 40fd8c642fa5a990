"""Under autocast kernels compute in another dtype than that of their inputs: patterns and tolerances follow it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import workbench
from support.tiny import family, make
from workbench import CaptureError

FAMILIES = ["llama-gqa", "gpt2", "bert", "t5", "mamba"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_families_are_captured(name: str, implementation: str) -> None:
    one = family(name)
    model = make(one)
    if implementation == "eager":
        if name == "mamba":
            pytest.skip("it has one implementation")
        model.set_attn_implementation("eager")
    for cache in (True, False):
        inputs = one.inputs() | ({} if name == "bert" else {"use_cache": cache})
        with torch.autocast("cpu", torch.bfloat16), workbench.attach(model) as wb:
            wb.verify(**inputs).raise_if_failed()
            with wb.capture() as cap:
                model(**inputs)
        assert all(capture.entropy.dtype == torch.float32 for capture in cap)


class Normed(nn.Module):
    """Queries and keys leave their norms in float32, as in many image models; `large` makes scores large."""

    def __init__(self, written_out: bool, large: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.written_out, self.large = 4, written_out, large
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q) * self.large, self.k_norm(k)
        z = (q @ k.mT / 8**0.5).softmax(-1) @ v if self.written_out else F.scaled_dot_product_attention(q, k, v)
        return self.o(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written_out", [False, True])
@torch.no_grad()
def test_the_pattern_is_that_of_what_was_multiplied(written_out: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Normed(written_out, large=12.0)).eval(), torch.randn(2, 9, 32)
    kept: list[Tensor] = []
    model[0].o.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.autocast("cpu", dtype), workbench.attach(model) as wb:
        wb.verify(x).raise_if_failed()
        with wb.capture(values=True) as cap:
            model(x)
    assert kept[-1].dtype == dtype
    pattern = cap["0"].pattern
    z = (pattern.dense().double() @ pattern.values.double()).transpose(1, 2).flatten(2)
    # Scores of size 30 differ by 0.1 between queries in float32 and the rounded ones that the kernel took.
    torch.testing.assert_close(z, kept[-1].double(), atol=0.02 if dtype == torch.bfloat16 else 0.003, rtol=0)


@torch.no_grad()
def test_double_stays_double() -> None:
    model, x = nn.Sequential(Normed(False)).eval().double(), torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), workbench.attach(model) as wb:
        table: Any = wb.verify(x).raise_if_failed().table
    assert table.tolerance.max() < 1e-8


@torch.no_grad()
def test_what_is_wrong_is_refused_under_autocast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.hooks import calls

    told = calls.AttentionCall
    monkeypatch.setattr(calls, "AttentionCall", lambda *args, **facts: told(*args, **facts | {"scale": 3.0}))
    model, x = nn.Sequential(Normed(False)).eval(), torch.randn(2, 9, 32)
    refused = pytest.raises(CaptureError, match="is not what it computes")
    with torch.autocast("cpu", torch.bfloat16), workbench.attach(model) as wb, refused, wb.capture():
        model(x)
