"""The kernels on a GPU, in bfloat16 too, which the interpreter gets wrong."""

import pytest
import torch
from triton_cases import CASES, ROWS, Case, compare

from workbench.kernels.masks import Mask
from workbench.kernels.softmax import SoftmaxPattern
from workbench.kernels.triton import engine

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_definition(case: Case, dtype: torch.dtype) -> None:
    assert list(compare(case, "cuda", dtype, TOLERANCE[dtype])) == []


@pytest.mark.parametrize("d", [64, 128, 256])
def test_output_is_that_of_the_fused_kernel(d: int) -> None:
    gen = torch.Generator("cuda").manual_seed(d)
    q, k, v = (torch.randn(2, h, 1000, d, device="cuda", dtype=torch.bfloat16, generator=gen) for h in (8, 2, 2))
    output, rows = engine.attention(q, k, v, Mask(1000, 1000, causal=True))
    k8, v8 = (x.repeat_interleave(4, dim=1) for x in (k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k8, v8, is_causal=True)
    torch.testing.assert_close(output, wanted, atol=2e-2, rtol=2e-2)
    pattern = SoftmaxPattern(q, k, Mask(1000, 1000, causal=True), lse=rows["lse"])
    torch.testing.assert_close(pattern.apply(v).to(output.dtype), output, atol=2e-2, rtol=2e-2)
    again = engine.statistics(pattern.problem, [*ROWS, "received"])
    torch.testing.assert_close(again["received"].sum(-1), torch.full((2, 8), 1000.0, device="cuda"), rtol=1e-3, atol=0)
    torch.testing.assert_close(again["entropy"], rows["entropy"])


def test_received_is_the_same_every_time() -> None:
    q, k = torch.randn(2, 1, 4, 777, 64, device="cuda")
    first, second = (engine.statistics(SoftmaxPattern(q, k).problem, ["received"])["received"] for _ in range(2))
    assert torch.equal(first, second)
