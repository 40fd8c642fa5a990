"""Multi-query associative recall at a small scale: which layers recall how many pairs with how large a state?

The task and the layers are those of DSF (arXiv 2405.15731), at a scale that trains here in minutes: two layers of one
kind, one head, d_model 64, sequences of 64 tokens, a vocabulary of 64; each model is trained on 4, 8 and 16 pairs at
once and tested on each. Every token's embedding holds a learned share of the token before, for every kind alike,
without which none recalls anything in so few steps. The rate is one for all, chosen for none. Accuracy is over the
positions that are asked for; intervals are Student's t over seeds. Writes its section of docs/benchmarks.md.

    python benchmarks/mqar.py [--steps 150] [--seeds 3] [--states 8 32] [--kinds softmax ...] [--quick] [--dry]
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import product

import torch
import torch.nn.functional as F
from shared.measuring import machine, say, table, write_section
from torch import Tensor, nn

from workbench.analysis.statistics.intervals import mean_t
from workbench.kernels.recurrent import gated_delta_rule, gated_linear_attention, naive_recurrence
from workbench.tasks.mqar import IGNORE, mqar_tokens

LENGTH, VOCABULARY, WIDTH, PAIRS = 64, 64, 64, (4, 8, 16)
BATCH, RATE, MATRIX_RATE, TESTED = 48, 3e-3, 2e-2, 100
HEADING = "Recall of pairs"
CHANCE = 2 / VOCABULARY  # values are half of the vocabulary


class Attention(nn.Module):
    """One head: queries and keys of the state's width, values of the model's."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.state = state
        self.qk, self.v = nn.Linear(WIDTH, 2 * state), nn.Linear(WIDTH, WIDTH)
        self.gates, self.out = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (t[:, None] for t in self.qk(x).chunk(2, dim=-1))
        gates = self.gates(x).permute(2, 0, 1)[:, :, None]  # [2, batch, head, position]
        return self.out(self.mix(q, k, self.v(x)[:, None], *gates).squeeze(1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Linear(Attention):
    """φ(q)·Σ φ(k) v over φ(q)·Σ φ(k), φ = elu + 1."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        size = (q * k.cumsum(2)).sum(-1, keepdim=True)
        return gated_linear_attention(q, k, v) / size


class Normalised(Attention):
    """Scores over exp(w·u + b), in which neither queries nor keys are."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor) -> Tensor:
        return gated_linear_attention(q / math.sqrt(self.state), k, v) / g.exp()[..., None]


class GatedDelta(Attention):
    """Keys of unit length, a decay and a step for each position."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return gated_delta_rule(q, k, v, F.logsigmoid(g + 4), step.sigmoid())


class SSD(Attention):
    """Mamba-2: one decay for the head, tied to the step with which keys are written."""

    def __init__(self, state: int) -> None:
        super().__init__(state)
        self.A_log = nn.Parameter(torch.zeros(1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, step: Tensor) -> Tensor:
        delta = F.softplus(step - 3)
        return gated_linear_attention(q, k * delta[..., None], v, -self.A_log.exp() * delta)


class S6(nn.Module):
    """Mamba: each channel has a state of its own, whose numbers fade at rates of their own."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.bc, self.delta, self.v = nn.Linear(WIDTH, 2 * state), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.A_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(WIDTH, 1))
        self.out = nn.Linear(WIDTH, WIDTH)
        nn.init.constant_(self.delta.bias, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        b, c = (t[:, None].expand(-1, WIDTH, -1, -1) for t in self.bc(x).chunk(2, dim=-1))
        delta = F.softplus(self.delta(x)).mT[..., None]  # [batch, channel, position, 1]
        v = self.v(x).mT[..., None]
        y, _ = naive_recurrence(c, b * delta, v, -self.A_log.exp()[:, None] * delta)  # short, and thousands of heads
        return self.out(y.squeeze(-1).mT)


class QLSTM(nn.Module):
    """Gates that see the input alone, with the reversed sigmoid of DSF; the state is one number for each channel."""

    def __init__(self, state: int) -> None:
        super().__init__()
        self.gates, self.v, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.alpha = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        f, g, o = (t.mT[..., None] for t in self.gates(x).chunk(3, dim=-1))  # [batch, channel, position, 1]
        log_decay = self.alpha.relu() * F.logsigmoid(-f)
        y, _ = naive_recurrence(o.sigmoid(), g.sigmoid(), self.v(x).mT[..., None], log_decay.squeeze(-1))
        return self.out(y.squeeze(-1).mT)


KINDS: dict[str, type[nn.Module]] = {
    "softmax": Attention, "linear": Linear, "normalised": Normalised, "S6": S6, "SSD": SSD, "gated delta": GatedDelta,
    "qLSTM": QLSTM,
}  # fmt: skip
STATELESS = {"qLSTM"}  # its state cannot be widened


class Model(nn.Module):
    """Embedding with a share of the token before, two layers with an MLP each, and logits."""

    def __init__(self, kind: str, state: int) -> None:
        super().__init__()
        self.embed, self.share = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.full((WIDTH,), 0.5))
        self.mixers = nn.ModuleList(KINDS[kind](state) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)) for _ in range(2)
        )
        nn.init.normal_(self.embed.weight, std=0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.share.tanh() * F.pad(x[:, :-1], (0, 0, 1, 0))
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(F.layer_norm(x, (WIDTH,)))
            x = x + mlp(F.layer_norm(x, (WIDTH,)))
        return F.layer_norm(x, (WIDTH,)) @ self.embed.weight.T


def batch(n: int, pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of the task, and what is to be said where a key is asked for."""
    return mqar_tokens(n, seed, length=LENGTH, pairs=pairs, vocab=VOCABULARY)


def trained(kind: str, state: int, seed: int, steps: int) -> dict[int, float]:
    """Accuracy by number of pairs, after training on all of them."""
    torch.manual_seed(seed)
    model = Model(kind, state)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    inside = {id(p) for p in matrices}
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in inside], lr=RATE, weight_decay=0.01),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda s: min(1.0, (s + 1) / 20) * min(1.0, 2.5 * (1 - s / steps)))
        for each in optimizers
    ]
    for step in range(steps):
        parts = [
            batch(BATCH // len(PAIRS), pairs, 1 + seed * 1_000_000 + step * 10 + i) for i, pairs in enumerate(PAIRS)
        ]
        ids, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
    found = {}
    with torch.no_grad():
        for pairs in PAIRS:
            ids, labels = batch(TESTED, pairs, 999_000_000 + pairs)
            asked = labels != IGNORE
            found[pairs] = float((model(ids).argmax(-1) == labels)[asked].float().mean())
    return found


def measure(
    kinds: list[str], states: list[int], seeds: int, steps: int
) -> dict[tuple[str, int], list[dict[int, float]]]:
    """Accuracies by kind and state, one for each seed."""
    torch.set_num_threads(1)
    found: dict[tuple[str, int], list[dict[int, float]]] = {}
    for kind, state in product(kinds, states):
        if kind in STATELESS and state != states[0]:
            continue
        start = time.perf_counter()
        found[kind, state] = [trained(kind, state, seed, steps) for seed in range(seeds)]
        means = {pairs: sum(one[pairs] for one in found[kind, state]) / seeds for pairs in PAIRS}
        say(f"{kind}, {state}: {means}, {time.perf_counter() - start:.0f} s")
    return found


def text(found: dict[tuple[str, int], list[dict[int, float]]], seeds: int, steps: int) -> str:
    """The section."""
    rows = []
    for (kind, state), runs in found.items():
        held = WIDTH if kind in STATELESS else WIDTH * state
        size = "all keys" if kind == "softmax" else f"{held:,}"
        rows.append([kind, "" if kind in STATELESS else str(state), size, *(_cell(runs, pairs) for pairs in PAIRS)])
    heads = ["layer", "n", "numbers in the state", *(f"{pairs} pairs" for pairs in PAIRS)]
    return f"""`python benchmarks/mqar.py`: multi-query associative recall (arXiv 2312.04927) with the layers that DSF
compares (arXiv 2405.15731), at our scale: two layers, one head, d_model {WIDTH}, {LENGTH} tokens, a vocabulary of
{VOCABULARY}, {steps} steps of {BATCH} rows, Muon and AdamW at one rate for all; n is the width of queries and keys,
or of the state of each channel. Not the paper's figures, whose models are larger, trained far longer, and swept over
rates.

{table(heads, rows)}

Share of the keys asked for that were answered right (guessing one of the values: {CHANCE:.3f}), a mean over {seeds}
seeds with its 95 % t interval. {machine("torch")}"""


def _cell(runs: list[dict[int, float]], pairs: int) -> str:
    values = torch.tensor([one[pairs] for one in runs], dtype=torch.float64)
    low, high = mean_t(values)
    return f"{float(values.mean()):.2f}" + ("" if math.isnan(low) else f" ({max(low, 0):.2f} to {min(high, 1):.2f})")


def main() -> None:
    """Train all, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--states", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="few steps and seeds, and nothing is written")
    parser.add_argument("--dry", action="store_true", help="print the section, and write none")
    options = parser.parse_args()
    steps, seeds = (20, 2) if options.quick else (options.steps, options.seeds)
    section = text(measure(options.kinds, options.states, seeds, steps), seeds, steps)
    if options.quick or options.dry:
        print(section)
    else:
        write_section(HEADING, section)


if __name__ == "__main__":
    main()
