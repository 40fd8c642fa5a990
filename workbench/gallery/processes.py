"""Papers on attention over several processes: LASP-2, core attention disaggregation, distributed attention.

Nothing here runs on many devices. Bytes are counted as the functions send them, which tests compare with what is sent;
balance is the planner's own, and times are simulated.
"""

from __future__ import annotations

import random
from functools import cache

import plotly.graph_objects as go

from workbench.kernels.disaggregation import Devices, Simulated, simulate
from workbench.mechanisms import Card, Claim
from workbench.views import View
from workbench.views.figure import figure

LENGTHS = (2**12, 2**14, 2**16, 2**18, 2**20)
_DEVICES, _TOKENS = 16, 8192
_MANY, _LONGEST, _CLAIMED = Devices(n=512, n_bytes=5e10), (65536, 131072, 524288), 1.35
_D, _HEADS, _PROCESSES = 128, 32, 8


def sent_lasp(n: int) -> int:
    """Bytes that a process gives into LASP-2's one gather, whatever n: a state [d, width] of each head, in float32."""
    return _HEADS * _D * _D * 4


def sent_keys(n: int) -> int:
    """Bytes of keys and values of its own positions in bfloat16, once, whether they are gathered or go round."""
    return n // _PROCESSES * _HEADS * 2 * _D * 2


def lasp_card() -> Card:
    """What LASP-2 is, and where its claims stand."""
    return Card(
        title="LASP-2: linear attention over a split sequence",
        arxiv="2502.07563",
        equation="M_t = Σ_i λ^(C−i) k_i v_iᵀ of own positions; all M_t are gathered; o = own part + q Σ_{s<t} M_s",
        map="That of lightning attention, whatever the number of processes: a process holds rows of its positions.",
        kind="self",
        grade="exact",
        cost="d · width numbers a head in one gather forward and one backward; time linear in own positions.",
        causal="either",
        code="OpenSparseLLMs/Linear-MoE, Apache-2.0; nothing of it is used.",
        claims=(
            Claim(
                "One all-gather forward and one backward, whose size does not depend on the length.",
                "operations and bytes counted by a test on 2 and 4 processes, and on sequences six times as long",
                f"one and one; {sent_lasp(LENGTHS[0]):,} bytes for {_HEADS} heads of width {_D} at any length",
                "holds",
            ),
            Claim(
                "Values and gradients are those of one process.",
                "compared on 1, 2 and 4 processes with parts of any length, with decay and without",
                "values to 1e-12, gradients to 1e-11 in float64",
                "holds",
            ),
            Claim("15 % more throughput than LASP-1 and 37 % more than ring attention, with 2,048k tokens on 64 GPUs.",
                  needs="GPUs, several; none are at hand"),
        ),
    )  # fmt: skip


def distributed_card() -> Card:
    """What distributed multi-head attention is, and where its claims stand."""
    return Card(
        title="Distributed multi-head attention, of a unified view of long-sequence models",
        arxiv="2302.06218",
        equation="blocks of keys go from process to process; o and log Σ exp are joined block by block",
        map="Softmax over all positions; a process holds rows of its own, and of no other process more than one block.",
        kind="self",
        grade="exact",
        cost="n²/p pairs and n/p positions a process; keys and values once, passed on p − 1 times.",
        causal="either",
        code="no repository was found. The paper leaves its details open; this is the ring that meets its contract.",
        claims=(
            Claim(
                "Exact attention over a sequence that lies on several processes.",
                "values, gradients and statistics compared with one process on 1, 2 and 4 of them",
                "values to 1e-12, gradients to 1e-11 in float64",
                "holds",
            ),
            Claim(
                "No process needs more than its own block of keys and one other.",
                "blocks that a process passes on, counted by a test on 2 and 4 processes",
                "one after the other, p − 1 of them",
                "holds",
            ),
            Claim("Nearly 40 times longer attention on four RTX 4090 than that of one process.",
                  needs="GPUs, several; none are at hand"),
        ),
    )  # fmt: skip


@cache
def simulated() -> dict[str, Simulated]:
    """A batch of documents on devices with a fast and with a slow network."""
    found, rates = _documents(_DEVICES * _TOKENS, _LONGEST[0]), {"400 Gbit/s": 5e10, "40 Gbit/s": 5e9}
    return {name: simulate(found, devices=Devices(n=_DEVICES, n_bytes=rate)) for name, rate in rates.items()}


@cache
def at_scale() -> dict[int, Simulated]:
    """By the longest document, a step on as many devices as the paper's; a model of Llama 3 8B."""
    return {longest: simulate(_documents(_MANY.n * 32768, longest), devices=_MANY) for longest in _LONGEST}


def _documents(n: int, longest: int) -> list[int]:
    """Lengths of documents that are so many tokens together."""
    draw, found, left = random.Random(0), list[int](), n
    while left > 0:
        found.append(min(left, longest, int(draw.lognormvariate(7.5, 1.8)) + 1))
        left -= found[-1]
    return found


def cad_card() -> Card:
    """What core attention disaggregation is, and where its claims stand."""
    fast, slow = simulated().values()
    gains = [one.speedup for one in at_scale().values()]
    before, after = fast.plan.imbalance
    how = f"simulated: {_DEVICES} devices, {_TOKENS:,} tokens on each, documents drawn log-normally"
    return Card(
        title="Core attention disaggregation (DistCA)",
        arxiv="2510.18121",
        equation="rows r and L − 1 − r of a document together read L + 1 keys; such pieces go where pairs are lacking",
        map="That of softmax attention: which device computes a row changes nothing of it.",
        kind="self",
        grade="exact",
        cost="as softmax attention, evenly on all devices; queries, keys and outputs of what is moved are sent.",
        causal="always",
        code="hao-ai-lab/distca, whose README says Apache-2.0; nothing of it is used.",
        claims=(
            Claim(
                "Loads that documents of mixed length make uneven become even.",
                how,
                f"the largest load falls from {before:.2f} to {after:.2f} of the mean",
                "holds" if after <= 1.1 < before else "does not hold",
            ),
            Claim(
                "A step is faster, transfers hidden behind other work.",
                how,
                f"{fast.speedup:.2f} times as fast with 400 Gbit/s, {slow.speedup:.2f} with 40",
                "holds" if fast.speedup > 1 < slow.speedup else "undecided",
            ),
            Claim(
                f"Up to {_CLAIMED} times the throughput on 512 H200 GPUs with contexts of up to 512k tokens.",
                f"simulated, on no GPU: {_MANY.n} devices of {_MANY.operations:.0e} operations a second, 400 Gbit/s, "
                "32,768 tokens on each, a forward of Llama 3 8B",
                "with documents of up to "
                + ", ".join(f"{n:,} {gain:.2f} times" for n, gain in zip(_LONGEST, gains, strict=True)),
                "does not hold" if max(gains) < _CLAIMED else "holds" if min(gains) >= 1 else "undecided",
            ),
        ),
    )  # fmt: skip


def lasp_views() -> list[View]:
    """Bytes by length."""
    fig = go.Figure()
    for name, sent in (("LASP-2: a state", sent_lasp), ("keys and values", sent_keys)):
        fig.add_scatter(
            x=[f"{n:,}" for n in LENGTHS], y=[sent(n) / 2**20 for n in LENGTHS], name=name, mode="lines+markers"
        )
    fig.update_xaxes(title="tokens")
    fig.update_yaxes(title="MiB that a process sends, forward", type="log")
    return [figure(
        fig, title="What a process sends for a layer",
        caption=f"{_HEADS} heads of width {_D} on {_PROCESSES} processes: counted, not measured. A state does not grow "
        "with the sequence.",
    )]  # fmt: skip


def cad_views() -> list[View]:
    """Loads before and after."""
    plan = next(iter(simulated().values())).plan
    mean = sum(plan.before) / len(plan.before)
    fig = go.Figure()
    for name, loads in (("as packed", plan.before), ("as planned", plan.loads)):
        fig.add_bar(x=[str(i) for i in range(_DEVICES)], y=[load / mean for load in loads], name=name)
    fig.update_xaxes(title="device")
    fig.update_yaxes(title="pairs of tokens, of the mean")
    return [figure(
        fig, title="Pairs of tokens of each device",
        caption=f"One batch of documents on {_DEVICES} devices, simulated: as they are packed one after another, and "
        f"after {len(plan.moves)} moves.",
    )]  # fmt: skip
