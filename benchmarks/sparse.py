"""What the sparse kernels gain: S2-Attention and neighborhood attention against dense SDPA, forward only.

One call on random q, k, v of 12 heads of 64 in float32, batch 1, N tokens. Each arm is called once to warm up and then
in rounds, in turning order; the medians are compared. Only ratios mean anything. The dense arm is causal SDPA, which
itself skips the half of the map above the diagonal: a neighborhood is not causal, and is compared with it all the same.
FlexAttention runs compiled, with block mask and kernel made beforehand; it is left out beyond `--flex-limit` tokens,
and where no compiler is at hand. Writes its section of docs/benchmarks.md.

    python benchmarks/sparse.py [--lengths 1024 2048 4096 8192] [--rounds 5] [--flex-limit 4096]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from shared.measuring import interleaved, machine, say, table, write_section
from torch import Tensor

from workbench.kernels.flex import FlexPlan
from workbench.kernels.neighborhood import NeighborhoodLayout, neighborhood_attention
from workbench.kernels.neighborhood.flex import flex_plan as neighborhood_plan
from workbench.kernels.s2 import S2Layout, s2_attention
from workbench.kernels.s2.flex import flex_plan as s2_plan

HEADS, WIDTH = 12, 64
BLOCK = 64
HEADING = "Sparse kernels"


def s2_options(length: int) -> dict[str, int]:
    """One local block and as many strides as heads: about 90% sparsity, and every block is seen by some head.

    Short sequences are less sparse, since the query's own block is always visited.
    """
    return {"block": min(BLOCK, length), "local_blocks": 1, "vert_stride": HEADS}


def square(length: int) -> tuple[int, int]:
    """The most nearly square height and width of so many tokens."""
    height = next(h for h in range(math.isqrt(length), 0, -1) if length % h == 0)
    return height, length // height


def neighborhood_options(length: int) -> dict[str, tuple[int, int]]:
    """A sliding window of about 5% of the tokens, hence a tenth of those of causal attention."""
    height, width = square(length)
    edge = math.sqrt(0.05)
    return {"shape": (height, width), "window": (max(2, round(edge * height)), max(2, round(edge * width)))}


def s2_sparsity(length: int) -> float:
    """Share of the causal blocks that S2 leaves out."""
    blocks = S2Layout(length, length, HEADS, HEADS, **s2_options(length)).blocks()
    return 1 - float(blocks.sum()) / (HEADS * int(torch.ones_like(blocks[0]).tril().sum()))


def neighborhood_sparsity(length: int) -> float:
    """Share of the whole map that the neighborhood leaves out."""
    return 1 - math.prod(neighborhood_options(length)["window"]) / length


def arms(length: int, flex: bool) -> dict[str, Callable[[], Tensor]]:
    """The calls that are timed; the sparse ones are checked against each other where both exist."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, WIDTH, generator=gen) for _ in range(3))
    s2, near = s2_options(length), neighborhood_options(length)
    strided = {**near, "stride": near["window"]}
    found: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "s2": lambda: s2_attention(q, k, v, **s2),
        "neighborhood": lambda: neighborhood_attention(q, k, v, **near),
        "blocked neighborhood": lambda: neighborhood_attention(q, k, v, **strided),
    }
    if flex:
        found |= _flex_arms(q, k, v, found)
    return found


def _flex_arms(
    q: Tensor, k: Tensor, v: Tensor, ours: dict[str, Callable[[], Tensor]]
) -> dict[str, Callable[[], Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    length = q.shape[2]
    compiled = torch.compile(flex_attention, dynamic=False)  # a second length would compile for any, and fail
    layout = S2Layout(length, length, HEADS, HEADS, **s2_options(length))
    near = NeighborhoodLayout(**neighborhood_options(length))
    plans = {
        "flex s2": s2_plan(layout, q.device),
        "flex neighborhood": neighborhood_plan(near, HEADS, q.device),
    }

    def call(plan: FlexPlan) -> Tensor:
        k_at, v_at = plan.keys_at_places(k), plan.keys_at_places(v)
        return plan.at_queries(compiled(plan.queries_at_places(q), k_at, v_at, block_mask=plan.mask))

    found: dict[str, Callable[[], Tensor]] = {name: partial(call, plan) for name, plan in plans.items()}
    try:
        for name, run in found.items():
            torch.testing.assert_close(run(), ours[name.removeprefix("flex ")](), rtol=1e-3, atol=1e-4)
    except RuntimeError as error:  # no C++ compiler, or one that Inductor cannot use
        say(f"FlexAttention is left out: {str(error).splitlines()[0]}")
        return {}
    return found


def section(lengths: list[int], rounds: int, flex_limit: int) -> str:
    """Measure, and say it in markdown."""
    names = {
        "s2": "S2",
        "flex s2": "S2, FlexAttention",
        "neighborhood": "neighborhood",
        "flex neighborhood": "neighborhood, FlexAttention",
        "blocked neighborhood": "neighborhood, stride = window",
    }
    rows = []
    with torch.no_grad():
        for length in lengths:
            times = interleaved(arms(length, length <= flex_limit), rounds)
            say(f"N = {length}: " + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items()))
            ratios = [f"{times['dense'] / times[name]:.2f}" if name in times else "" for name in names]
            rows.append([str(length), f"{s2_sparsity(length):.0%}", f"{neighborhood_sparsity(length):.0%}", *ratios])
    return f"""`python benchmarks/sparse.py`: forward time of dense causal SDPA over that of each kernel, so that more
is better; one call with batch 1, {HEADS} heads of {WIDTH}, float32, N tokens.

{table(["N", "S2 sparsity", "neighborhood sparsity", *names.values()], rows)}

S2 sparsity is the share of the causal map that is left out, neighborhood sparsity that of the whole map: neighborhoods
are 2-D and not causal, while the dense kernel that they are compared with computes half of its map. FlexAttention is
compiled, with the same block lists, and does not count the time to compile; an empty cell was not run.

Median of {rounds} interleaved rounds in one process. {machine("torch")}
"""


def main() -> None:
    """Measure every length and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flex-limit", type=int, default=4096, help="the longest sequence for FlexAttention")
    options = parser.parse_args()
    write_section(HEADING, section(options.lengths, options.rounds, options.flex_limit))


if __name__ == "__main__":
    main()
