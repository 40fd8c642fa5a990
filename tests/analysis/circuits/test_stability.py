"""What stability says beside what new prompts really give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import workbench
from support.circuits import Words, random_task, task_for, tiny
from workbench.analysis.statistics.overlap import jaccard


@pytest.mark.parametrize("name", ["llama-gqa", "mbart"])
def test_new_prompts_lie_between_disjoint_halves_and_redrawn_ones(name: str) -> None:
    """Circuits of 24 prompts, whose edges have a signal of the size of the noise of their means."""
    with workbench.attach(tiny(name), Words()) as wb:
        like = workbench.find_circuit(wb, task_for(name, 3), "eap", progress=False)
    exists, generator = like.graph.exists, torch.Generator().manual_seed(0)
    signal = torch.randn(like.graph.n_edges, generator=generator, dtype=torch.float64) / 24**0.5

    def found() -> Any:
        examples = signal + torch.randn(24, len(signal), generator=generator, dtype=torch.float64)
        table = torch.full_like(like.edge_scores, torch.nan)
        table[exists] = examples.mean(0)
        return replace(like, edge_scores=table, examples=examples).top(0.2, prune=False)

    several = [found() for _ in range(16)]
    stable = [workbench.circuit_stability(one, n_bootstrap=12, seed=i) for i, one in enumerate(several)]
    new = [jaccard(a.edges_in[exists], b.edges_in[exists]) for i, a in enumerate(several) for b in several[:i]]
    redrawn = torch.stack([one.jaccard for one in stable]).mean()
    halves = torch.stack([one.halves for one in stable]).mean()
    assert halves + 0.02 < sum(new) / len(new) < redrawn - 0.02
    assert "of disjoint halves" in repr(stable[0])


def test_halves_share_no_group_of_prompts() -> None:
    with workbench.attach(tiny("llama-gqa"), Words()) as wb:
        circuit = workbench.find_circuit(wb, random_task(6, 6, 60), "eap", progress=False)
    with pytest.raises(workbench.WorkbenchError, match="the circuit is empty"):
        workbench.circuit_stability(
            replace(circuit, edges_in=circuit.edges_in & False, senders_in=circuit.senders_in & False)
        )
    apart = workbench.circuit_stability(circuit, n_bootstrap=3, groups=[0, 0, 0, 0, 1, 1])
    same = {round(float(value), 9) for value in apart.halves}
    assert len(same) == 1  # there is one way to cut two groups
    assert len(workbench.circuit_stability(circuit, n_bootstrap=3, groups=[0] * 6).halves) == 0
