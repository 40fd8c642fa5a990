"""Papers that put nothing into the place of attention: how a model is taught, or who plans. Their cards and figures."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from workbench.gallery import looking, processes
from workbench.investigator import ANALYSES, Investigation, investigate
from workbench.investigator.screen import EXPERTS, ROUTES, route
from workbench.mechanisms import Card, Claim
from workbench.mechanisms.dualformer import Vocabulary, draw, drop, search
from workbench.mechanisms.dualformer.card import card as dualformer_card
from workbench.mechanisms.dualformer.card import results as dualformer_results
from workbench.mechanisms.dualformer.dropping import LEVELS
from workbench.mechanisms.frame.card import unmarked
from workbench.mechanisms.remembering.card import sam2act_card, sam2long_card
from workbench.mechanisms.screens.card import agent_s2_grounding_card, v2p_card
from workbench.models.planted import planted
from workbench.session.attaching import attach
from workbench.storage.parts import parse
from workbench.views import View
from workbench.views.figure import figure
from workbench.views.table import Column, table

_PLANNED = Path(__file__).parent.parent / "investigator" / "results.json"


@dataclass(frozen=True)
class Exhibit:
    """A paper with its card, and what is shown of it.

    Attributes:
        name: by which the gallery knows it. card: what it is, and where its claims stand. views: makes the figures.
    """

    name: str
    card: Callable[[], Card]
    views: Callable[[], list[View]]

    def all(self) -> list[View]:
        """The card, then the figures."""
        card = self.card()
        rows = [row for row in card.lines() if row[0] != "Claim"] + card.standing()
        texts = [unmarked(text) for _, text in rows]
        shown = table(
            [head for head, _ in rows], [Column(self.name, texts)], of="Card", title=card.title,
            caption="What it is, and where its paper’s claims stand at our scale.",
        )  # fmt: skip
        return [shown, *self.views()]


def _dualformer() -> list[View]:
    found = dualformer_results()
    views = [_maze(), _levels()]
    if found is not None:
        views.append(_modes(list(found["modes"]), found["modes"]))
    if found is not None and "circuits" in found:
        views.append(_heads(found["circuits"]["heads"]))
    return views


def _maze() -> View:
    """A maze, when the search put each cell into its frontier, and the plan."""
    maze = draw(random.Random(0), 8, 8)
    trace, plan = search(maze, random.Random(0))
    created = {(clause.x, clause.y): i for i, clause in enumerate(c for c in trace if c.do == "create")}
    cells = [[created.get((x, y)) for x in range(maze.width)] for y in range(maze.height)]
    columns, rows = ([str(i) for i in range(n)] for n in (maze.width, maze.height))
    fig = go.Figure(go.Heatmap(z=cells, x=columns, y=rows, hoverongaps=False, colorbar={"title": "order"}))
    walls = sorted(maze.walls)
    fig.add_scatter(
        x=[columns[x] for x, _ in walls], y=[rows[y] for _, y in walls], mode="markers", name="walls",
        marker={"symbol": "square", "size": 18},
    )  # fmt: skip
    fig.add_scatter(
        x=[columns[x] for x, _ in plan], y=[rows[y] for _, y in plan], mode="lines+markers", name="plan",
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed", scaleanchor="x")
    return figure(
        fig, title="A maze, its search and its plan",
        caption=f"A* from {maze.start} to {maze.goal}: the order in which cells come into the frontier, which a slow "
        "answer writes out, and the shortest plan, which a fast one gives at once.",
    )  # fmt: skip


def _levels() -> View:
    """How many tokens each level leaves of that search."""
    maze = draw(random.Random(0), 8, 8)
    trace, plan = search(maze, random.Random(0))
    words = Vocabulary(8, 8)
    kept = [drop(words, trace, plan, level, random.Random(0)) for level in LEVELS]
    return table(
        [f"level {level}" for level in LEVELS],
        [
            Column("tokens of the trace", [float(len(tokens) - 3 * len(plan)) for tokens in kept]),
            Column("begins", [" ".join(tokens[:12]) + " …" for tokens in kept]),
        ],
        of="level", title="What each level leaves of the trace",
        caption="0: everything; 1: no close clauses; 2: no costs either; 3: three of ten create clauses are dropped "
        "besides; 4: the plan alone. A level is drawn anew each time a maze is shown.",
    )  # fmt: skip


def _modes(names: Sequence[str], modes: dict[str, Any]) -> View:
    fig = go.Figure()
    for name in names:
        rate, length = modes[name]["optimal"], modes[name]["n_trace"]
        fig.add_scatter(
            x=[length[0]], y=[rate[0]], name=name, mode="markers", marker={"size": 11},
            error_x={"array": [length[2] - length[0]], "arrayminus": [length[0] - length[1]]},
            error_y={"array": [rate[2] - rate[0]], "arrayminus": [rate[0] - rate[1]]},
        )  # fmt: skip
    fig.update_xaxes(title="tokens of the trace", rangemode="tozero")
    fig.update_yaxes(title="shortest plans", tickformat=".0%", range=[0, 1.05])
    return figure(
        fig, title="What thinking costs, and what it gives",
        caption=f"Plans that are shortest, by tokens of the trace before them, on {modes[names[0]]['n']} mazes that no "
        "training has seen; 95 % intervals. “whole traces” and “plans alone” are models that were taught so.",
    )  # fmt: skip


def _heads(heads: dict[str, dict[str, float]]) -> View:
    labels = list(heads["fast"])
    fig = go.Figure(go.Scatter(
        x=[heads["fast"][name] for name in labels], y=[heads["slow"][name] for name in labels], mode="markers",
        name="heads", text=labels, hovertemplate="%{text}: fast %{x:.2f}, slow %{y:.2f}<extra></extra>",
    ))  # fmt: skip
    fig.update_xaxes(title="fast: fall of the logit difference")
    fig.update_yaxes(title="slow: fall of the logit difference")
    return figure(
        fig, title="Heads that both modes need",
        caption="A plan’s first step, asked fast and slow on the same mazes: by how much the logit difference falls "
        "when a head’s output is that of the twin.",
        table={"head": labels, "fast": list(heads["fast"].values()), "slow": [heads["slow"][name] for name in labels]},
    )  # fmt: skip


@cache
def planned() -> dict[str, Any] | None:
    """What `benchmarks/investigator.py` measured; None: nothing yet."""
    if not _PLANNED.is_file():
        return None
    found: dict[str, Any] = parse(_PLANNED.read_bytes(), _PLANNED.name).plain()
    return found


@cache
def agent_s2_card() -> Card:
    """What of Agent S2 is here, and where its claims stand."""
    says = "Planning anew after every step does more with a budget than planning anew after failures only."
    measured = planned()
    one = None if measured is None else measured["claim"]
    return Card(
        title="Agent S2: planning anew after every step",
        arxiv="2504.00906",
        equation="plan_t = M(task, findings before t, memory); the plan’s first step runs; then plan_{t+1}",
        map="Which analysis each finding came from: one-hot rows, [finding, analysis]. No weights are learnt.",
        kind="memory",
        grade="exact",
        cost="One plan a finding; with rules less than a hundredth of the analyses.",
        causal="always",
        beside="Which expert grounds an action on a screen (`investigator.screen`); the experts are left out.",
        code="simular-ai/Agent-S, Apache-2.0; nothing of it is used. `workbench.investigate` plans analyses of a model "
        "in the place of clicks.",
        claims=(
            Claim(says) if one is None else Claim(says, one["how"], one["found"], one["outcome"]),
            replace(
                agent_s2_grounding_card().claims[0],
                says="A mixture of experts for grounding clicks better than one model does.",
            ),
            Claim("A memory of past tasks helps with new ones.",
                  needs="tasks in a row, run with and without what those before have left"),
        ),
    )  # fmt: skip


def _agent_s2() -> list[View]:
    made = planted("chain", n=16)
    with attach(made.model, made.tokenizer) as wb:
        found = investigate(wb, made.task, progress=False)
    return [_routing(found), _experts()]


def _routing(found: Investigation) -> View:
    names = ["baseline", *ANALYSES]
    weights = [[float(finding.analysis == name) for name in names] for finding in found.findings]
    rows = [f"{finding.number}: {finding.forwards:,} forwards" for finding in found.findings]
    fig = go.Figure(go.Heatmap(z=weights, x=names, y=rows, showscale=False))
    fig.update_yaxes(autorange="reversed", title="finding")
    return figure(
        fig, title="Which analysis each finding came from",
        caption=f"An investigation of a model into which a chain of three heads was planted: {found.answer[0].text}",
    )  # fmt: skip


def _experts() -> View:
    """Which expert finds the place that an action names."""
    actions = list(ROUTES)
    fig = go.Figure(go.Heatmap(z=route(actions).tolist(), x=list(EXPERTS), y=actions, showscale=False))
    fig.update_yaxes(autorange="reversed", title="action")
    return figure(
        fig, title="Which expert grounds each action",
        caption="Agent S2’s mixture of grounding: the name of an action alone decides who finds its place on the "
        "screen. “none” needs no place.",
    )  # fmt: skip


EXHIBITS = {
    one.name: one
    for one in (
        Exhibit("agent-s2", agent_s2_card, _agent_s2),
        Exhibit("cad", processes.cad_card, processes.cad_views),
        Exhibit("distributed", processes.distributed_card, processes.lasp_views),
        Exhibit("dualformer", dualformer_card, _dualformer),
        Exhibit("lasp-2", processes.lasp_card, processes.lasp_views),
        Exhibit("v2p", v2p_card, looking.v2p),
        Exhibit("agent-s2-grounding", agent_s2_grounding_card, looking.mixture),
        Exhibit("sam2act", sam2act_card, looking.sam2act),
        Exhibit("sam2long", sam2long_card, looking.sam2long),
    )
}
"""By name, shown behind the mechanisms."""
