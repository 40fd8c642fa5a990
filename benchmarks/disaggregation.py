"""What moving attention between devices saves, simulated: imbalance, traffic and time of a step.

Documents are drawn log-normally, cut off at a longest length, and packed one after another, 32,768 tokens on each
device; sizes are Llama 3 8B's. Nothing is measured: `workbench.kernels.disaggregation.simulator` says what is modelled.
Three batches for each line. Writes its section of docs/benchmarks.md.

    python benchmarks/disaggregation.py [--devices 8 64 512] [--batches 3] [--dry]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

from shared.measuring import say, table, write_section

from workbench.kernels.disaggregation import Devices, Simulated, simulate

HEADING = "Attention moved between devices, simulated"
TOKENS = 32768
LONGEST = (8192, 65536, 262144)
NETWORKS = {"400 Gbit/s": 5e10, "40 Gbit/s": 5e9}


def documents(total: int, longest: int, seed: int) -> list[int]:
    """Lengths of documents that are so many tokens together."""
    draw, found = random.Random(seed), []
    while (left := total - sum(found)) > 0:
        found.append(min(left, longest, int(draw.lognormvariate(7.5, 1.8)) + 1))
    return found


def row(n: int, longest: int, batches: int) -> list[str]:
    """One line of the table."""
    several = [documents(n * TOKENS, min(longest, n * TOKENS), seed) for seed in range(batches)]
    found = {name: [simulate(each, devices=Devices(n=n, n_bytes=rate)) for each in several]
             for name, rate in NETWORKS.items()}  # fmt: skip
    fast = found["400 Gbit/s"]

    def spread(values: Sequence[float], form: Callable[[float], str] = "{:.2f}".format) -> str:
        return f"{form(min(values))} to {form(max(values))}"

    def shares(several: Sequence[Simulated]) -> str:
        return spread([each.speedup for each in several])

    return [
        f"{longest:,}", f"{n}", spread([each.plan.imbalance[0] for each in fast]),
        spread([each.plan.imbalance[1] for each in fast]),
        spread([max(each.plan.traffic) / 2**20 for each in fast], "{:,.0f}".format),
        *map(shares, found.values()),
    ]  # fmt: skip


def main() -> None:
    """Simulate, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    rows = []
    for longest in LONGEST:
        for n in options.devices:
            rows.append(row(n, longest, options.batches))
            say(" | ".join(rows[-1]))
    heads = ["longest", "devices", "largest load before", "after", "MiB of a device", *NETWORKS]
    text = f"""`python benchmarks/disaggregation.py`: core attention disaggregation (arXiv 2510.18121), **simulated**,
and not measured on any device. {TOKENS:,} tokens on each device, layers of Llama 3 8B, forward.

{table(heads, rows)}

The largest load is over the mean, in pairs of tokens; a plan leaves at most 10 % above it. MiB are what the busiest
device sends and is sent in a layer. The last two columns are the speed-up of a step over attention where its tokens
are, with transfers behind computing, on two networks: below 1 it does not pay. Smallest and largest of
{options.batches} batches.
"""
    if options.dry:
        say(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
