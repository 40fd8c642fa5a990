"""Repairing a task by hand: heads look at given positions from the token that the answer comes after.

Merullo et al. 2310.08744.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.model.graph import Graph
from workbench.analysis.circuits.model.names import label
from workbench.analysis.statistics.intervals import mean_t, proportions
from workbench.errors import InterventionError, expect
from workbench.metrics import accuracy
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Repair(Result):
    """What steering the attention of heads does to a task, at the token from which its answer is predicted.

    Attributes:
        heads: labels. towards, but: names of the positions.
        before: [example] 1 where the model is right. together: the same with all heads edited.
        single: [head, example], with each head alone. random: [draw, example], with as many random other heads.
        random_heads: labels of each draw.
        movers: labels. attention_before, attention_after: [mover, 2, example] of that token to the answer's position,
            and summed over the edited positions.
    """

    form = "workbench.repair"
    filled: ClassVar = ("example",)

    task: str
    heads: Annotated[tuple[str, ...], "head"]
    towards: tuple[str, ...]
    but: str
    before: Float[Tensor, " example"]
    together: Float[Tensor, " example"]
    single: Float[Tensor, "head example"]
    random: Float[Tensor, "draw example"]
    random_heads: Annotated[tuple[tuple[str, ...], ...], "draw _"]
    movers: Annotated[tuple[str, ...], "mover"]
    attention_before: Float[Tensor, "mover 2 example"]
    attention_after: Float[Tensor, "mover 2 example"]
    provenance: dict[str, Any]

    @property
    def broken(self) -> float:
        """Share of the prompts that were right and are wrong after the edit of all heads."""
        return float(((self.before == 1) & (self.together == 0)).double().mean())

    @property
    def change(self) -> tuple[float, float, float]:
        """Of the accuracy with all heads edited, prompt by prompt, with its 95 % interval (Student's t), in -1 to 1."""
        change = self.together.double() - self.before.double()
        low, high = mean_t(change)
        return float(change.mean()), max(low, -1.0), min(high, 1.0)

    @property
    def table(self) -> pd.DataFrame:
        """Accuracies before, together, of each head, and random heads; then the change of the movers' attention.

        The 95 % intervals are over prompts: exact ones (Clopper and Pearson) of accuracies, Student's t of the changes;
        of random heads low and high are the lowest and the highest draw.
        """
        import pandas as pd

        rows = [("before", "", *_accuracy(self.before)), ("together", " ".join(self.heads), *_accuracy(self.together))]
        rows += [("single", head, *_accuracy(values)) for head, values in zip(self.heads, self.single, strict=True)]
        if len(self.random):
            means = self.random.mean(1)
            low, high = float(means.min()), float(means.max())
            rows.append(
                ("random heads", f"{len(self.random)} draws, lowest and highest", float(means.mean()), low, high)
            )
        for head, shift in zip(self.movers, self.attention_after - self.attention_before, strict=True):
            for what, values in zip(("answer", "edited positions"), shift, strict=True):
                rows.append((f"attention to the {what}, change", head, float(values.mean()), *mean_t(values)))
        return pd.DataFrame(rows, columns=["quantity", "of", "value", "low", "high"])

    def __repr__(self) -> str:
        chance = f", random heads {float(self.random.mean()):.3f}" if len(self.random) else ""
        return (
            f"Repair({self.task}: accuracy {float(self.before.mean()):.3f} to {float(self.together.mean()):.3f} with "
            f"{', '.join(self.heads)}{chance})"
        )


def repair(
    wb: Workbench,
    task: Task,
    heads: Iterable[Any],
    *,
    towards: Sequence[str] | None = None,
    but: str | None = None,
    movers: Iterable[Any] = (),
    n_random: int = 10,
    seed: int = 0,
    batch_size: int = 50,
    progress: bool = True,
) -> Repair:
    """Put one query row of heads evenly on given positions, and measure the task.

    Only this row of these heads changes; all else runs as it is. It is that of the token from which the answer is
    predicted: the last one mostly, and of answers of several tokens that behind which right and wrong ones part. The
    edit needs the right answer to know where to look, so it is a causal probe and no fix that could be deployed.

    Args:
        heads: whose attention is edited.
        towards: names of positions; `but`: the name of one that is left out, where it falls on one of them. By default
            for Colored Objects the two colours of the query scene that are not the answer.
        movers: heads whose attention at that token is measured before and after.
        n_random: draws of as many other heads, edited in the same way. seed: of the draws.

    Raises:
        InterventionError: no heads, no positions, or ones that come later than the token that is to look at them.
        TaskError: no such position, or right answers that part before their last token.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    if towards is None and task.name == "colored_objects":
        towards, but = ("colour1", "colour2", "colour3"), "colour"
    if not towards:
        raise InterventionError(
            f"task {task.name} has no known positions to look at", hint="towards=[names of positions]"
        )
    with open_setup(wb, task, batch_size=batch_size) as setup:
        graph = setup.graph
        chosen = [graph.head_name(head) for head in heads]
        if not chosen:
            raise InterventionError("no head was chosen")
        moving = [graph.head_name(head) for head in movers]
        _check_keys(graph, (*chosen, *moving))
        draws = _draws(graph, [*chosen, *moving], len(chosen), n_random, seed)
        plans = [(), tuple(chosen), *((name,) for name in chosen), *draws]
        right = torch.zeros(len(plans), len(task), dtype=torch.float64)
        attention = torch.zeros(2, len(moving), 2, len(task), dtype=torch.float64)
        bar = tqdm(total=len(plans) * len(setup.pairs), disable=not progress, desc="repair")
        for pair in setup.pairs:
            weights, answer = _target(setup, pair, towards, but)
            for number, plan in enumerate(plans):
                right[number, setup.rows(pair)] = _run(setup, pair, plan, weights)
                bar.update()
            for after, plan in enumerate(plans[:2] if moving else ()):
                attention[after, :, :, setup.rows(pair)] = _attention(setup, pair, plan, weights, answer, moving)
        bar.close()
        n = len(chosen)
        return Repair(
            task=task.name, heads=tuple(map(label, chosen)), towards=tuple(towards), but=but or "", before=right[0],
            together=right[1], single=right[2 : 2 + n], random=right[2 + n :],
            random_heads=tuple(tuple(map(label, draw)) for draw in draws), movers=tuple(map(label, moving)),
            attention_before=attention[0], attention_after=attention[1], provenance=setup.provenance() | {"seed": seed},
        )  # fmt: skip


def _sees_the_prompt(graph: Graph, name: str) -> bool:
    """Whether the head's queries are where the logits are read, and its keys in the prompt."""
    spot = graph.sender(name)
    return len(graph.streams) == 1 or (spot.what == "head" and graph.layers[spot.layer].kind == "cross")


def _check_keys(graph: Graph, names: Sequence[str]) -> None:
    for name in names:
        if not _sees_the_prompt(graph, name):
            raise InterventionError(
                f"{label(name)} does not look from where the answer is written into the prompt",
                hint="of an encoder-decoder choose heads of cross-attention",
            )


def _draws(graph: Graph, taken: Sequence[str], size: int, n: int, seed: int) -> list[tuple[str, ...]]:
    """Random heads that are not among those taken."""
    free = [name for name in graph.head_names if name not in taken and _sees_the_prompt(graph, name)]
    if n and len(free) < size:
        raise InterventionError(f"there are only {len(free)} other heads to draw {size} from", hint="n_random=0")
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(free[i] for i in sorted(torch.randperm(len(free), generator=generator)[:size].tolist())) for _ in range(n)
    ]


def _target(setup: Setup, pair: Pair, towards: Sequence[str], but: str | None) -> tuple[Tensor, Tensor]:
    """[example, key] weights of the new row, and [example] the position of the answer (the last one if unknown)."""
    index = setup.positions(pair, towards, 0)
    answer = setup.positions(pair, "end" if but is None else but, 0)
    assert index is not None
    assert answer is not None
    answer = answer.view(pair.size)
    weights = torch.zeros(pair.size, setup.length(pair, 0), device=index.device).scatter(1, index, 1.0)
    if but is not None:
        weights.scatter_(1, answer[:, None], 0.0)
    if bool((weights.sum(1) == 0).any()):
        raise InterventionError(
            f"no position is left to look at in example {pair.start + int((weights.sum(1) == 0).nonzero()[0])}"
        )
    later = (index > pair.decisive[:, None]).any(1) & (len(pair.ends) == 1)
    if bool(later.any()):
        raise InterventionError(
            f"in example {pair.start + int(later.nonzero()[0])} heads would look at tokens that come after that from "
            "which the answer is predicted",
            hint='measure at the "end", or name earlier positions',
        )
    return weights / weights.sum(1, keepdim=True), answer


def last_row_on(weights: Tensor) -> Callable[[Tensor, Any, int], Tensor]:
    """An edit for `Workbench.edit_pattern` that puts weights [example, key] in the place of each row."""

    def edit(rows: Tensor, site: Any, head: int) -> Tensor:
        return weights[:, None, : rows.shape[-1]].to(rows).expand_as(rows)

    return edit


def _edited(setup: Setup, stack: ExitStack, pair: Pair, plan: Sequence[str], weights: Tensor) -> None:
    if plan:
        queries = pair.decisive[:, None]
        spots = [setup.graph.sender(name) for name in plan]
        heads = [(setup.stream.anatomy.layers[spot.layer].site, spot.number) for spot in spots]
        stack.enter_context(setup.wb.edit_pattern(heads, last_row_on(weights), queries=queries))


def _run(setup: Setup, pair: Pair, plan: Sequence[str], weights: Tensor) -> Tensor:
    """[example] 1 where the model is right with the heads of the plan edited."""
    with torch.no_grad(), ExitStack() as stack:
        _edited(setup, stack, pair, plan, weights)
        return accuracy(setup.wb.model(**pair.clean, **setup.stream.extra), pair.clean).double()


def _attention(
    setup: Setup, pair: Pair, plan: Sequence[str], weights: Tensor, answer: Tensor, movers: Sequence[str]
) -> Tensor:
    """[mover, 2, example] of the edited row's attention to the answer and to the edited positions."""
    rows = torch.arange(pair.size, device=answer.device)
    with torch.no_grad(), ExitStack() as stack:
        _edited(setup, stack, pair, plan, weights)
        cap = stack.enter_context(setup.wb.capture(statistics=()))
        setup.wb.model(**pair.clean, **setup.stream.extra)
    found = []
    for name in movers:
        spot = setup.graph.sender(name)
        pattern = cap[setup.stream.anatomy.layers[spot.layer].site.name].pattern
        row = pattern.dense(heads=[spot.number])[:, 0][rows, pair.decisive]
        found.append(torch.stack([row[rows, answer], (row * (weights > 0)).sum(1)]))
    return torch.stack(found).double().cpu()


def _accuracy(right: Tensor) -> tuple[float, float, float]:
    low, high = proportions(right).tolist()
    return float(right.mean()), low, high
