"""The whole-model capacity probe against a Python loop over heads and numbers of pairs.

Random keys, values and queries of GPT-2 small's shape (12 layers, 12 heads of 64), n to 256, 32 repeats. The loop takes
each head and each n by itself, writes the pairs into its memories one at a time as the rules are defined (all repeats
at once), and measures the same. Its numbers must be ours to 1e-5. Memory: the peak of our probe above what the process
held before, on Linux. Writes its section of docs/benchmarks.md.

    python benchmarks/capacity.py [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from shared.measuring import machine, peak_above, say, table, write_section
from torch import Tensor

from workbench.analysis.conditioning.features import unit
from workbench.analysis.conditioning.pairs import SitePairs
from workbench.analysis.conditioning.probe import SUMS, Plan, asked, default_sizes, draw, probe
from workbench.hooks.sites import Site

HEADING = "Capacity of a whole model"
RULES = ("hebb", "delta", "softmax")
WIDTH, TOKENS = 64, 1024


def model(layers: int, heads: int) -> list[SitePairs]:
    """Keys, values and queries as a capture of a model of this shape would give them."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for layer in range(layers):
        q, k, v = (torch.randn(heads, TOKENS, WIDTH, generator=generator) for _ in range(3))
        site, sink = Site(f"h.{layer}.attn", layer, "self", heads), torch.zeros(TOKENS, dtype=torch.bool)
        found.append(SitePairs(site, k, v, q, sink, WIDTH**-0.5, None, torch.ones(heads), TOKENS))
    return found


def loop(pairs: SitePairs, plan: Plan) -> Tensor:
    """What `probe` gives, one head and one n at a time."""
    drawn = draw(plan, pairs.n_tokens, pairs.q.shape[1], WIDTH)
    shape = (len(SUMS), len(pairs.q), len(plan.rules), len(plan.queries), len(plan.sizes), plan.repeats)
    out = torch.zeros(shape, dtype=torch.float64)
    for head in range(len(pairs.q)):
        for i, n in enumerate(plan.sizes):
            which = drawn.pairs[:, :n]
            k, v, which_asked = pairs.k[head][which], pairs.v[head][which], asked(n, plan.n_queries)
            own = pairs.q[head][drawn.own]
            noisy = k + plan.noise * k.norm(dim=-1, keepdim=True) * drawn.noise[:, :n]
            questions = {"stored": k[:, which_asked], "noisy": noisy[:, which_asked], "own": own}
            best = (pairs.scale * own @ k.transpose(1, 2)).argmax(-1)
            for r, rule in enumerate(plan.rules):
                state = torch.zeros(plan.repeats, WIDTH, WIDTH)
                for x, y in zip(unit(k).unbind(1), v.unbind(1), strict=True) if rule != "softmax" else ():
                    told = y - (x[:, None] @ state)[:, 0] if rule == "delta" else y
                    state = torch.baddbmm(state, x[:, :, None], told[:, None])
                for j, kind in enumerate(plan.queries):
                    q = questions[kind]
                    read = (
                        (pairs.scale * q @ k.transpose(1, 2)).softmax(-1) @ v if rule == "softmax" else unit(q) @ state
                    )
                    target = best if kind == "own" else which_asked.expand(plan.repeats, -1)
                    out[:, head, r, j, i] = compare(read, target, v)
    return out


def compare(read: Tensor, target: Tensor, v: Tensor) -> Tensor:
    """[sum, repeat], as the probe defines them."""
    wanted = v.gather(1, target[..., None].expand(-1, -1, v.shape[-1]))
    product, power, length = ((a * b).sum(-1).double() for a, b in ((read, wanted), (read, read), (wanted, wanted)))
    likeness = read @ unit(v).transpose(1, 2)
    own = likeness.gather(-1, target[..., None])[..., 0]
    best = likeness.amax(-1)
    hits = (own >= best - 1e-5 * power.sqrt()) & (best > 0)
    each = (product, power, length, product / (power * length).sqrt(), hits.double(), torch.ones_like(product))
    return torch.stack([one.sum(-1) for one in each])


def difference(ours: Tensor, theirs: Tensor) -> tuple[float, int]:
    """Largest relative difference of the sums over repeats, and how many identifications differ."""
    hits = SUMS.index("hits")
    a, b = ours.sum(-1), theirs.sum(-1)
    rest = [i for i in range(len(SUMS)) if i != hits]
    scale = torch.stack([b[SUMS.index("target")], b[SUMS.index("count")]]).amax(0)
    off = ((a[rest] - b[rest]).abs() / torch.maximum(scale, b[rest].abs())).max().item()
    return off, int((a[hits] - b[hits]).abs().sum())


def main() -> None:
    """Measure, check and write; `--quick` is small and writes nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 layers of 2 heads, n to 64: shows that it works")
    options = parser.parse_args()
    layers, heads, most = (2, 2, 64) if options.quick else (12, 12, 256)
    sites, plan = model(layers, heads), Plan(default_sizes(most), RULES)
    with torch.no_grad():
        peak, _ = peak_above(lambda: [probe(site, plan) for site in sites])
        seconds: dict[str, list[float]] = {"probe": [], "loop": []}
        ours: list[Tensor] = []
        theirs: list[Tensor] = []
        for number, site in enumerate(sites):
            work = {"probe": (probe, ours), "loop": (loop, theirs)}
            for name in list(work) if number % 2 else list(work)[::-1]:
                run, found = work[name]
                start = time.perf_counter()
                found.append(run(site, plan))
                seconds[name].append(time.perf_counter() - start)
        off, changed = difference(torch.cat(ours, 1), torch.cat(theirs, 1))
    say(f"largest difference {off:.1e}, {changed} identifications differ, peak {peak / 2**20:.0f} MiB")
    if off > 1e-5:
        raise SystemExit(f"the loop's numbers are {off:.1e} off")
    each = [slow / fast for slow, fast in zip(seconds["loop"], seconds["probe"], strict=True)]
    ratio = statistics.median(each)
    say(f"the loop takes {ratio:.1f} times as long ({min(each):.1f} to {max(each):.1f} over the layers)")
    if options.quick:
        return
    row = [f"{layers * heads}", f"{most} in {len(plan.sizes)} steps", f"{plan.repeats}", f"{ratio:.1f}",
           f"{peak / 2**20:.0f} MiB", f"{off:.1e}"]  # fmt: skip
    write_section(
        HEADING,
        f"""`python benchmarks/capacity.py`: how many of its own pairs each head can hold, for the rules
{", ".join(RULES)}, asked with stored keys, noisy keys and the model's own queries. Time of a Python loop over
heads and n (pairs written one at a time, all repeats at once) over that of the probe; largest relative difference of
their numbers. Of all identifications (top-1), {changed} differ, where two values are equally near but for rounding.

{table(["heads", "pairs n to", "repeats", "loop / probe", "peak memory", "difference"], [row])}

Median over the {layers} layers, each timed in turn ({min(each):.1f} to {max(each):.1f}). {machine("torch")}""",
    )


if __name__ == "__main__":
    main()
