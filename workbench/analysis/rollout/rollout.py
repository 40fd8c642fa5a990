"""`attention_rollout`: attention of all layers chained, from chosen positions down to the tokens of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from workbench.analysis.logits.asked import batches_of, check_model
from workbench.analysis.rollout.maps import Map
from workbench.analysis.rollout.recorded import Run, run_of
from workbench.analysis.rollout.result import AttentionRollout
from workbench.errors import CaptureError, expect
from workbench.inputs import check_inputs, decoder_start
from workbench.kernels.patterns import DENSE_LIMIT
from workbench.session.workbench import Workbench
from workbench.tokens import piece

Method = Literal["attention", "norm", "alti", "value_zeroing"]
_STRIP = 64  # queries at a time
_ASSUMED = {
    "attention": "the heads' weights are averaged, the stream keeps a fixed share, and values and MLPs do not count",
    "norm": "the scales of norms are frozen, vectors count by their length, and MLPs mix no positions and do not count",
    "alti": "the scales of norms are frozen, vectors count by how near they are to their sum, and MLPs do not count",
    "value_zeroing": "weights stay as they are when a value is taken away; the stream's own part counts only through "
    "the position's own value",
}


def attention_rollout(
    wb: Workbench,
    prompt: Any,
    *,
    method: Method = "attention",
    position: int | Sequence[int] | None = -1,
    stream: Literal["input", "decoder"] | None = None,
    residual: float = 0.5,
) -> AttentionRollout:
    """Which tokens a position is made of by the last layer: attention maps, the residual stream in them, chained.

    Each layer is a map whose rows are shares of positions in a position; the shares of a target go back through them as
    a vector, so that memory grows with the length alone. The methods differ in the map of a layer:

    * "attention": (1 − residual) · mean of the heads' weights + residual · I. Attention rollout of Abnar & Zuidema
      2020 (arXiv 2005.00928); values count for nothing.
    * "norm": lengths ‖T_ij‖ of the vectors that a position is a sum of, T_ij = Σ_h α_ij v_j W_O + δ_ij x_i, behind the
      norm where it is on that sum. Kobayashi et al. 2021 (arXiv 2109.07152); 2020 without the stream (2004.10102).
    * "alti": max(0, ‖y_i‖₁ − ‖y_i − T_ij‖₁), where y_i is the sum. Ferrando et al. 2022 (arXiv 2203.04212).
    * "value_zeroing": cosine distance of the block's output, its MLP and norms included, from that without v_j, weights
      as they are. Mohebbi et al. 2023 (arXiv 2301.12971). It runs every block once for every query: N/2 (causal) to N
      forwards' time, all others about one forward's and a pass over the maps.

    Norms are held as they were (frozen). In an encoder-decoder the decoder's shares go through cross-attention into the
    encoder (as in ALTI+, Ferrando et al. 2022, arXiv 2205.11631), what stays in the stream is the decoder's own; value
    zeroing does not say what stays, and is there of the encoder alone. Of signed or unnormalised maps (state-space
    models) "attention" takes |A|, normalised per row. None of this is a cause: ablate to see whether it matters.

    Args:
        wb: the model, attached; it stays on its kernel, and is run once (and once on eight tokens).
        prompt: a text, or model inputs of one prompt.
        position: of one token, or of several, counted over the prompt's own; None: of all, which takes N² numbers.
        stream: whose positions: "input" (the encoder's) or "decoder"; None: those that the model's output is of.
        residual: the stream's share, for "attention".

    Raises:
        CaptureError: several prompts, a position beyond the prompt, or N² numbers beyond a limit. AttachError: several
            stacks without cross-attention, or blocks that add up in other ways; the module is named.
    """
    expect(Workbench, wb=wb)
    check_model(wb)
    if method not in get_args(Method):
        raise CaptureError(f"method is one of {', '.join(get_args(Method))}, and not {method!r}")
    if not 0 <= residual < 1:
        raise CaptureError(f"residual is a share, from 0 to below 1, and not {residual}")
    with torch.inference_mode(mode=False), torch.no_grad():
        run = run_of(wb, _one_prompt(wb, prompt), method, residual, stream)
        targets = _targets(run, position)
        size = (2 * len(run.steps) + 1) * len(targets) * sum(run.lengths.values()) * 8
        if size > DENSE_LIMIT:
            raise CaptureError(
                f"shares of {len(targets)} positions would take {size:,} bytes, the limit is {DENSE_LIMIT:,}",
                hint="ask for fewer positions",
            )
        shares, own = _chained(run, targets)
    kept = {name: run.real[name].nonzero()[:, 0] for name in run.lengths}
    start = {name: sum(run.lengths[other] for other in list(kept)[: list(kept).index(name)]) for name in kept}
    columns = torch.cat([kept[name] + start[name] for name in kept])
    place = {int(column): i for i, column in enumerate(columns)}
    tokens = [text for name in kept for text in _texts(wb, run, name, kept[name])]
    return AttentionRollout(
        method=method, residual=residual if method == "attention" else None,
        sites=tuple(step.site for step in run.steps), tokens=tuple(tokens),
        streams=tuple(name for name in kept for _ in kept[name]),
        targets=tuple(place[start[run.of] + at] for at in targets),
        shares=shares[..., columns].cpu(), own=own[..., columns].cpu(),
        assumed=_ASSUMED[method] + run.unread, provenance=wb.provenance(),
    )  # fmt: skip


def _one_prompt(wb: Workbench, prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, Mapping) and decoder_start(wb.model) is None:
        check_inputs(wb.model, (), prompt)
        return dict(prompt)
    (batch, *more) = list(batches_of(wb, prompt, 1))
    if more:
        raise CaptureError(f"a rollout is of one prompt, not of {1 + len(more)}")
    return batch


def _targets(run: Run, position: int | Sequence[int] | None) -> list[int]:
    """Columns of the positions that are asked for."""
    own = run.real[run.of].nonzero()[:, 0].tolist()
    if position is None:
        return own
    asked = [position] if isinstance(position, int) else list(position)
    bad = [one for one in asked if not -len(own) <= one < len(own)]
    if bad or not asked:
        raise CaptureError(
            f"position {bad[0]} lies beyond the prompt, which has {len(own)} tokens" if bad else "no position is given",
            hint="positions count from 0, or from -1 at the end",
        )
    return [own[one] for one in asked]


@dataclass
class _Shares:
    """[target, position] of each stream."""

    of: dict[str, Tensor]

    def joined(self) -> Tensor:
        return torch.cat(list(self.of.values()), -1)


def _chained(run: Run, targets: list[int]) -> tuple[Tensor, Tensor]:
    """Shares [place, target, position] before each step and behind the last; [step, target, position] of each alone."""
    device = run.device
    now = _Shares({name: torch.zeros(len(targets), n, dtype=torch.float64, device=device)
                   for name, n in run.lengths.items()})  # fmt: skip
    now.of[run.of][torch.arange(len(targets)), torch.tensor(targets)] = 1
    places, alone = [now.joined()], []
    for step in reversed(run.steps):
        single = _Shares({name: torch.zeros_like(each) for name, each in now.of.items()})
        given = now.of[step.queries]
        if step.queries == run.of:
            _back(step.map(), given, single, step.queries, step.keys, now, targets)
            alone.append(single.joined())
        else:
            _back(step.map(), given, None, step.queries, step.keys, now, [])
            alone.append(torch.full_like(single.joined(), torch.nan))
        places.append(now.joined())
    return torch.stack(places[::-1]), torch.stack(alone[::-1])


def _back(
    mixing: Map, given: Tensor, single: _Shares | None, queries: str, keys: str, now: _Shares, targets: list[int]
) -> None:
    """Take the shares of the queries' stream, `given`, through one map into `now`; the targets' rows into `single`."""
    to_keys = torch.zeros_like(now.of[keys])
    stays = torch.zeros_like(given)
    wanted = torch.tensor(targets, dtype=torch.long, device=given.device)
    for start in range(0, given.shape[1], _STRIP):
        strip = slice(start, min(start + _STRIP, given.shape[1]))
        inside = ((wanted >= strip.start) & (wanted < strip.stop)).nonzero()[:, 0]
        if not bool(given[:, strip].any()) and not len(inside):
            continue
        rows, stay = (each.to(given.device) for each in mixing.rows(strip))  # layers may be on several devices
        to_keys += given[:, strip] @ rows
        stays[:, strip] = given[:, strip] * stay
        if single is not None and len(inside):
            at = wanted[inside] - strip.start
            single.of[queries][inside, wanted[inside]] += stay[at]
            single.of[keys][inside] += rows[at]
    now.of[queries] = stays
    now.of[keys] = now.of[keys] + to_keys


def _texts(wb: Workbench, run: Run, name: str, kept: Tensor) -> list[str]:
    ids = run.ids.get(name)
    if ids is None or len(ids) != run.lengths[name]:
        return [str(i) for i in kept.tolist()]
    found = ids[kept.to(ids.device)].tolist()
    return [str(one) if wb.tokenizer is None else piece(wb.tokenizer, one) for one in found]
