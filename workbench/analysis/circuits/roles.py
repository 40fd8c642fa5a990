"""What the heads of a circuit do: roles suggested from their patterns and from what they write, with the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.circuits.circuit import Circuit
from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import Setup, open_setup
from workbench.analysis.circuits.model.names import label
from workbench.errors import TaskError, expect
from workbench.kernels.patterns import Pattern
from workbench.session.workbench import Workbench
from workbench.storage.result import Result
from workbench.tasks.base import Task

if TYPE_CHECKING:
    import pandas as pd

ROLES = (
    "previous-token", "duplicate-token", "induction", "inhibition", "mover", "negative mover", "content gatherer",
)  # fmt: skip
EVIDENCE = ("previous", "duplicate", "induction", "to_answer", "to_wrong", "to_repeated", "to_question")
# Where the shipped tasks keep what the roles look at.
PLACES: dict[str, dict[str, tuple[str, ...]]] = {
    "ioi": {"answer": ("IO",), "wrong": ("S1", "S2"), "repeated": ("S2",)},
    "colored_objects": {"answer": ("colour",), "wrong": ("wrong_colour",), "question": ("queried",)},
    "induction": {"answer": ("next",), "repeated": ("copy",)},
    "docstring": {"answer": ("C_def",), "repeated": ("B_def",)},
    "greater_than": {"repeated": ("year",)},
}


@dataclass(frozen=True, repr=False)
class HeadRoles(Result):
    """Suggested roles of heads.

    Attributes:
        heads: labels. roles: of each head, none or several.
        evidence: mean attention by head: "previous" on the token before; "duplicate" of repeated tokens on their
            earlier copies; "induction" on the tokens after such copies; and of the token from which the answer is
            predicted "to_answer", "to_wrong", "to_repeated", "to_question". Of what the head writes there, through the
            last norm: "answer_logit",
            "wrong_logit", "logit_diff", each with and without the head; NaN where a task has no such place.
        errors: standard errors of the last three.
        threshold: attention from which on a role is suggested.
    """

    form = "workbench.head_roles"

    heads: Annotated[tuple[str, ...], "head"]
    roles: Annotated[tuple[tuple[str, ...], ...], "head _"]
    evidence: dict[str, Float[Tensor, " head"]]
    errors: dict[str, Float[Tensor, " head"]]
    threshold: float
    task: str
    provenance: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row per head: its roles, then the evidence."""
        import pandas as pd

        frame = pd.DataFrame({"head": self.heads, "roles": [", ".join(roles) for roles in self.roles]})
        for name, values in self.evidence.items():
            frame[name] = values.tolist()
        return frame

    def of(self, role: str) -> tuple[str, ...]:
        """Heads of a role."""
        return tuple(head for head, roles in zip(self.heads, self.roles, strict=True) if role in roles)

    def __repr__(self) -> str:
        named = [f"{role}: {', '.join(self.of(role))}" for role in ROLES if self.of(role)]
        return f"HeadRoles({'; '.join(named) or 'none'})"


def head_roles(
    wb: Workbench,
    task: Task,
    heads: Circuit | Iterable[Any] | None = None,
    *,
    places: Mapping[str, Iterable[str]] | None = None,
    threshold: float = 0.3,
    batch_size: int = 25,
    progress: bool = True,
) -> HeadRoles:
    """Suggest what heads do on a task.

    A role is suggested where the mean attention that it stands for reaches the threshold. A mover besides raises the
    logit difference by what it writes at the token from which the answer is predicted, the last one mostly; a negative
    mover attends to the answer or the wrong answer there and lowers the logit of what it attends to. Both by more than
    two standard errors. Of answers of several tokens that token counts behind which right and wrong ones part.

    Args:
        heads: a circuit or heads; all by default.
        places: names of positions for "answer", "wrong", "repeated" and "question"; known for the shipped tasks.

    Raises:
        TaskError: a place that the task has not.
    """
    expect(Workbench, wb=wb)
    expect(Task, task=task)
    known = {key: tuple(names) for key, names in (PLACES.get(task.name, {}) if places is None else places).items()}
    unknown = set(known) - {"answer", "wrong", "repeated", "question"}
    if unknown:
        raise TaskError(
            f"there is no place {sorted(unknown)[0]!r}", hint="places are answer, wrong, repeated, question"
        )
    with open_setup(wb, task, batch_size=batch_size) as setup:
        graph = setup.graph
        if isinstance(heads, Circuit):
            heads.check_model(graph)
            heads = heads.heads
        names = list(graph.head_names if heads is None else map(graph.head_name, heads))
        found: dict[str, list[Tensor]] = {}
        for pair in tqdm(setup.pairs, disable=not progress, desc="roles"):
            for key, value in {**_attention(setup, pair, known), **_written(setup, pair)}.items():
                found.setdefault(key, []).append(value)
        each = {key: torch.cat(values) for key, values in found.items()}  # [example, head]
        places_of = torch.tensor([graph.head_names.index(name) for name in names], dtype=torch.long)
        mean = {key: value.nanmean(0)[places_of] for key, value in each.items()}
        errors = {
            key: (each[key].std(0) / len(task) ** 0.5)[places_of]
            for key in ("answer_logit", "wrong_logit", "logit_diff")
        }
        nan = torch.full((len(names),), torch.nan, dtype=torch.float64)
        evidence = {key: mean.get(key, nan) for key in (*EVIDENCE, "answer_logit", "wrong_logit", "logit_diff")}
        roles = tuple(_roles(evidence, errors, i, threshold) for i in range(len(names)))
        return HeadRoles(
            heads=tuple(label(name) for name in names), roles=roles, evidence=evidence, errors=errors,
            threshold=threshold, task=task.name, provenance=setup.provenance(),
        )  # fmt: skip


def _attention(setup: Setup, pair: Pair, places: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """[example, head] of mean attention, NaN where an example has no such query, or a head cannot see the place."""
    wb, graph = setup.wb, setup.graph
    with torch.no_grad(), wb.capture(statistics=(), queries_keys=True) as cap:
        wb.model(**pair.clean, **setup.stream.extra)
    rows = torch.arange(pair.size, device=pair.last.device)
    at = {key: setup.positions(pair, names, 0) for key, names in places.items()}
    found: dict[str, list[Tensor]] = {}
    for i, layer in enumerate(setup.stream.anatomy.layers):
        stream, cross = graph.stream_of(i), graph.layers[i].kind == "cross"
        weights = _shares(cap[layer.site.name].pattern)
        absent = weights.new_full(weights.shape[:2], torch.nan).double().cpu()
        for name, keys in _looked_for(setup, pair, stream, cross).items():
            seen = absent if keys is None else _mean((weights * keys[:, None]).sum(-1), keys.any(-1))
            found.setdefault(name, []).append(seen)
        reads = stream == setup.stream.end[1]
        end = pair.decisive[:, None] if reads else setup.positions(pair, "end", stream)
        assert end is not None
        last = weights[rows, :, end[:, 0]]  # [example, head, key]
        for name, index in at.items():
            onto = absent
            if index is not None and (cross or stream == 0):
                onto = last.gather(2, index[:, None].expand(-1, last.shape[1], -1)).sum(-1).double().cpu()
            found.setdefault(f"to_{name}", []).append(onto)
    return {name: torch.cat(values, dim=1) for name, values in found.items()}


def _shares(pattern: Pattern) -> Tensor:
    """[example, head, query, key] whose rows sum to one: of signed or unnormalised maps the magnitudes."""
    weights = pattern.dense()
    if not pattern.by_magnitude:
        return weights
    weights = weights.abs()
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _looked_for(setup: Setup, pair: Pair, stream: int, cross: bool) -> dict[str, Tensor | None]:
    """[example, query, key] bool by role: which keys make it; None where a layer has no such keys."""
    ids = pair.clean.get("decoder_input_ids" if stream else "input_ids")
    length = setup.length(pair, stream)
    causal = len(setup.graph.streams) == 1 or stream > 0
    real = pair.mask(stream, length).bool()
    if cross:
        return dict.fromkeys(("previous", "duplicate", "induction"))
    before = torch.ones(length, length, dtype=torch.bool, device=real.device)
    before = before.tril(-1) if causal else before.fill_diagonal_(False)
    both = real[:, :, None] & real[:, None, :]
    previous = torch.eye(length, dtype=torch.bool, device=real.device).roll(1, 0).tril(-1) & both
    if ids is None:  # frames are no tokens
        return {"previous": previous, "duplicate": None, "induction": None}
    earlier = (ids[:, :, None] == ids[:, None, :]) & before & both
    after = torch.zeros_like(earlier)
    after[:, :, 1:] = earlier[:, :, :-1]
    after &= both & (before | torch.eye(length, dtype=torch.bool, device=real.device))
    return {"previous": previous, "duplicate": earlier, "induction": after}


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """[example, head] mean over queries [example, query]; NaN where there is none."""
    kept = values.double() * where[:, None]
    return (kept.sum(-1) / where.sum(-1).double()[:, None]).cpu()


def _written(setup: Setup, pair: Pair) -> dict[str, Tensor]:
    """[example, head]: logits with what the head writes where they are read, minus without it."""
    at = pair.decisive
    rows = torch.arange(pair.size, device=at.device)
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        _, clean = setup.stream.record(pair.clean, at)
        final = clean[setup.stream.end][rows, at]
        base = _answers(setup.stream.unembed(final), pair, 1)
        for i, layer in enumerate(setup.stream.anatomy.layers):
            if setup.graph.stream_of(i) != setup.stream.end[1]:
                nothing = base["logit_diff"].new_full((pair.size, layer.n_heads), torch.nan).double().cpu()
                for name in base:
                    found.setdefault(name, []).append(nothing)
                continue
            z = clean["z", i][rows, at]
            written = torch.einsum("bhw,hwd->hbd", z, layer.w_o.to(z.dtype))
            without = _answers(setup.stream.unembed((final - written).flatten(0, 1)), pair, layer.n_heads)
            for name, value in without.items():
                found.setdefault(name, []).append((base[name] - value).T.double().cpu())
    return {name: torch.cat(values, dim=1) for name, values in found.items()}


def _answers(logits: Tensor, pair: Pair, times: int) -> dict[str, Tensor]:
    """[time, example] of the answers' logits, relative to the mean over all tokens."""
    apart = (logits - logits.mean(-1, keepdim=True)).view(times, pair.size, -1)
    made = {}
    for name, sets in (("answer_logit", pair.clean.answers), ("wrong_logit", pair.clean.wrong)):
        made[name] = torch.stack([apart[:, i, list(one)].logsumexp(-1) for i, one in enumerate(sets)], dim=1)
    return {**made, "logit_diff": made["answer_logit"] - made["wrong_logit"]}


def _roles(evidence: Mapping[str, Tensor], errors: Mapping[str, Tensor], i: int, threshold: float) -> tuple[str, ...]:
    def has(name: str) -> bool:
        return bool(evidence[name][i] >= threshold)

    def sure(name: str) -> float:
        """The effect, where it is more than two standard errors; else 0."""
        value, error = float(evidence[name][i]), float(errors[name][i])
        return value if abs(value) > 2 * error else 0.0

    found = []
    if has("previous"):
        found.append("previous-token")
    if has("duplicate"):
        found.append("duplicate-token")
    if has("induction"):
        found.append("induction")
    to_answer, to_wrong = float(evidence["to_answer"][i]), float(evidence["to_wrong"][i])
    lowers = (has("to_answer") and sure("answer_logit") < 0) or (has("to_wrong") and sure("wrong_logit") < 0)
    if has("to_answer") and not to_wrong > to_answer and sure("logit_diff") > 0 and sure("answer_logit") > 0:
        found.append("mover")
    if lowers:
        found.append("negative mover")
    if has("to_repeated") and not lowers and "mover" not in found:
        found.append("inhibition")
    if has("to_question"):
        found.append("content gatherer")
    return tuple(found)
