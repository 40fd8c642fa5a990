"""`logit_attribution`: the share of every head, MLP, embedding and bias in a logit, from one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.recording import first_float, same_sum
from workbench.analysis.logits.asked import (
    Targets,
    Tokens,
    answers_of,
    batches_of,
    check_apart,
    check_model,
    places_of,
    tokens_of,
    written_ids,
)
from workbench.analysis.logits.known import known_writers
from workbench.analysis.logits.result import LogitAttribution
from workbench.analysis.logits.writers import Writers
from workbench.errors import AttachError, CaptureError, TaskError, expect
from workbench.hooks.changes import Changes
from workbench.metrics.answers import TaskBatch
from workbench.metrics.logits import logits_of
from workbench.session.workbench import Workbench
from workbench.storage.weights import weights_stay
from workbench.tokens import piece


@dataclass(frozen=True)
class _Part:
    kind: str
    name: str
    layer: int = -1
    head: int = -1
    site: str = ""


def logit_attribution(
    wb: Workbench,
    prompts: Any,
    target: Targets = None,
    *,
    contrast: Targets = None,
    position: int = -1,
    batch_size: int = 16,
) -> LogitAttribution:
    """Direct logit attribution: what each part writes to the residual stream, read by the unembedding.

    The logit of a token is a sum over the parts that write to the stream (heads, MLPs, embeddings, the biases behind
    heads, of the final norm and of the unembedding), once the final norm's scale is held as it was in the forward. This
    frozen norm is exact: LayerNorm with its centring and bias, RMSNorm, or 1 + weight; so are norms behind heads
    (Gemma 2). The shares sum to the model's logit up to `rounding`, the roundings of the model's dtype. Softcapped
    logits are attributed before the cap, and the result says so. A share tells what a part adds directly, not what
    later parts make of it. Heads of recurrences, and behind a gate, count as what they give to their projection, norm,
    gate and skip of the module as they were. In an encoder-decoder the stream is the decoder's, to which
    cross-attention writes too.

    Args:
        wb: the model, attached; it stays on its kernel, and is run once (and once on eight tokens, unless its parts
            are known from an earlier call and nothing of it has changed).
        prompts: a text or several, model inputs, or a Task, whose answers and wrong answers are then compared: of
            answers of several tokens the first in which they differ, behind what they share.
        target: the token whose logit is taken apart, as text or id, for all prompts or one for each; None: the model's
            own first choice. Where a task has several answers, the mean of their logits.
        contrast: the token whose logit is taken off, "why A rather than B"; a logit alone has a constant over the
            vocabulary in it that no probability depends on.
        position: of the token after which the target comes, counted over a prompt's own tokens; -1 is the last.

    Raises:
        TaskError: a token outside the vocabulary, or a contrast that is its target. CaptureError: a position beyond a
            prompt. AttachError: no final norm or output projection can be found, or the stream is no sum of parts; the
            module is named.

    Source: nostalgebraist 2020; Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    expect(Workbench, wb=wb)
    check_model(wb)
    with torch.inference_mode(mode=False), torch.no_grad(), weights_stay(wb.model):
        batches = list(batches_of(wb, prompts, batch_size))
        if not batches:
            raise CaptureError("there are no prompts")
        writers, known = known_writers(wb, batches[0])
        try:
            found = [_of_batch(wb, writers, batch, target, contrast, position, prove=known) for batch in batches]
        except (AttachError, CaptureError):
            if not known:
                raise
            writers, _ = known_writers(wb, batches[0], anew=True)
            found = [_of_batch(wb, writers, batch, target, contrast, position) for batch in batches]
        provenance = wb.provenance()
    parts = _parts(writers)
    values = torch.cat([each["values"] for each in found], 1)
    logits = torch.cat([each["logits"] for each in found])
    cap = writers.readout.cap
    return LogitAttribution(
        kinds=tuple(part.kind for part in parts), names=tuple(part.name for part in parts),
        layers=tuple(part.layer for part in parts), numbers=tuple(part.head for part in parts),
        sites=tuple(part.site for part in parts),
        values=values, logits=logits,
        capped=torch.cat([each["capped"] for each in found]),
        targets=tuple(one for each in found for one in each["targets"]),
        contrasts=tuple(one for each in found for one in each["contrasts"]),
        positions=tuple(one for each in found for one in each["positions"]),
        cap=cap, norm=_said(writers), precision=writers.precision, provenance=provenance,
    )  # fmt: skip


def _said(writers: Writers) -> str:
    norm = writers.readout.norm
    if norm is None:
        return "no final norm"
    return f"{norm.name}, {'LayerNorm' if norm.centred else 'RMSNorm'}, its scale frozen"


def _parts(writers: Writers) -> list[_Part]:
    found = [_Part("embedding", name) for name in writers.tables or ("input",)]
    for number, block in enumerate(writers.blocks):
        own = [heads for heads in writers.heads if heads.block == block and heads.site.kind != "cross"]
        for heads in writers.heads:
            if heads.block == block:
                told = heads.site.kind == "cross" or heads.site.tower or len(own) > 1
                name = heads.site.alias if told else f"L{number}"
                joint = "." if "." in name else ""
                found += [
                    _Part("head", f"{name}{joint}H{head}", number, head, heads.site.name)
                    for head in range(heads.n_heads)
                ]
                found.append(_Part("attention bias", f"{name} bias", number, -1, heads.site.name))
        if writers.mlps[block] is not None:
            found.append(_Part("mlp", f"m{number}", number))
    return [*found, _Part("norm bias", "final norm bias"), _Part("unembedding bias", "unembedding bias")]


class _Seen:
    """What modules were given and gave at one position of each example [example, width]."""

    def __init__(self, places: Tensor, length: int) -> None:
        """`length`: positions of an example."""
        self.places, self.rows, self.length = places, torch.arange(len(places), device=places.device), length
        self.given: dict[str, Tensor] = {}
        self.gave: dict[str, Tensor] = {}

    def at(self, tensor: Tensor) -> Tensor:
        tensor = tensor.expand(len(self.rows), *tensor.shape[1:])
        return tensor[self.rows, self.places.to(tensor.device)].detach().clone().flatten(1)

    def alone(self, _: nn.Module, args: Any) -> Any:
        """Give the output projection the one position: the logits of all are the largest tensor of a forward."""
        if not args or args[0].dim() != 3 or args[0].shape[0] != len(self.rows):
            return None
        return (self.at(args[0])[:, None], *args[1:])

    def watch(self, changes: Changes, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            first = first_float((*args, *kwargs.values()))
            if first is not None:
                self.given[name] = self.at(first)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            first = first_float(output)
            if first is None and isinstance(output, Tensor) and len(output) == len(self.rows) * self.length:
                first = output.unflatten(0, (-1, self.length))  # positions of all examples in one axis
            if first is not None:
                self.gave[name] = self.at(first)

        changes.before(module, before, with_kwargs=True)
        changes.after(module, after)


def _of_batch(
    wb: Workbench,
    writers: Writers,
    batch: dict[str, Tensor],
    target: Targets,
    contrast: Targets,
    position: int,
    *,
    prove: bool = False,
) -> dict[str, Any]:
    """The shares of one batch; `prove`: the parts have to add up to the stream at each block."""
    places = places_of(batch, position)
    seen, readout = _Seen(places, written_ids(batch)[0].shape[1]), writers.readout
    modules = dict(wb.model.named_modules())
    names = {writers.blocks[0], readout.end, readout.source, *writers.tables}
    names |= {name for heads in writers.heads for name in (heads.out, heads.written)}
    names |= {mlp.name for mlp in writers.mlps.values() if mlp is not None}
    names |= set(writers.blocks) if prove else set()
    with Changes() as changes:
        for name in names:
            seen.watch(changes, name, modules[name])
        changes.before(modules[readout.steps[-1][0]], seen.alone)
        logits = logits_of(wb.model(**batch))
    logits = seen.at(logits).double() if logits.shape[1] > 1 else logits[:, 0].double()
    if prove:
        _check_parts(writers, seen)
    sets, weights = _weights(wb, batch, target, contrast, logits)

    stream, normed = seen.gave[readout.end].double(), seen.gave[readout.source]
    towards, unembedding, chosen = readout.towards(normed, weights)
    norm_bias = torch.zeros_like(unembedding)
    if readout.norm is not None:
        towards, norm_bias = readout.norm.back(readout.norm.scale(stream, normed), towards)
    values = _written(writers, seen, towards)
    values += [norm_bias[None], unembedding[None]]
    given = (logits * weights).sum(-1)
    _check_output(chosen, given, readout.cap, readout.eps)
    return {
        "values": torch.cat(values).cpu(), "logits": (given if readout.cap is None else chosen).cpu(),
        "capped": given.cpu(),
        "targets": [_text(wb, one) for one in sets[0].sets],
        "contrasts": ["" if sets[1] is None else _text(wb, sets[1].sets[i]) for i in range(len(places))],
        "positions": places.tolist(),
    }  # fmt: skip


def _check_parts(writers: Writers, seen: _Seen) -> None:
    """Refuse parts that are not what the stream is the sum of here."""
    eps = writers.readout.eps
    stream = seen.given[writers.blocks[0]]
    tables = [seen.gave[name].expand_as(stream) for name in writers.tables]
    if tables and not same_sum(stream, *_added(tables), eps):
        raise CaptureError("the input of the first block is something else than the tables that it was made of")
    for block in writers.blocks:
        written = [seen.gave[one.written] * one.factor for one in writers.heads if one.block == block]
        if (mlp := writers.mlps[block]) is not None:
            written.append(seen.gave[mlp.name] * mlp.factor)
        total, size = _added([seen.given[block], *written])
        if not same_sum(seen.given[block], stream, stream.abs(), eps) or not same_sum(
            seen.gave[block], total, size, eps
        ):
            raise CaptureError(f"what {block} gives is something else than the sum of its parts")
        stream = seen.gave[block]


def _added(several: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Their sum, and that of their sizes, number by number."""
    return sum(several[1:], several[0]), sum((one.abs() for one in several[1:]), several[0].abs())


def _check_output(chosen: Tensor, given: Tensor, cap: float | None, eps: float) -> None:
    """The sum that was taken apart is the model's own, where no cap lies between."""
    if cap is None and bool(((chosen - given).abs() > max(1e-4, 8 * eps) * (1 + given.abs() + chosen.abs())).any()):
        raise CaptureError("the logits of the forward are not what the output projection gives of its stream")


def _written(writers: Writers, seen: _Seen, towards: Tensor) -> list[Tensor]:
    """[part, example] of all that writes to the stream."""
    values: list[Tensor] = []
    for name in writers.tables:
        values.append((seen.gave[name].double() * towards).sum(-1)[None])
    if not writers.tables:
        values.append((seen.given[writers.blocks[0]].double() * towards).sum(-1)[None])
    for block in writers.blocks:
        for heads in writers.heads:
            if heads.block != block:
                continue
            w_o, bias = heads.w_o.to(towards.device), getattr(heads.out_module, "bias", None)
            direction, behind = towards * heads.factor, torch.zeros_like(towards[:, 0])
            if heads.norm is not None:
                scale = heads.norm.scale(seen.gave[heads.out], seen.gave[heads.norm.name])
                direction, behind = heads.norm.back(scale, direction)
            z = seen.given[heads.out].double().unflatten(-1, (heads.n_heads, -1))
            values.append(torch.einsum("ehw,hwd,ed->he", z, w_o, direction))
            if bias is not None:
                behind = behind + direction @ bias.detach().double()
            values.append(behind[None])
        mlp = writers.mlps[block]
        if mlp is not None:
            values.append((seen.gave[mlp.name].double() * mlp.factor * towards).sum(-1)[None])
    return values


def _weights(
    wb: Workbench, batch: Mapping[str, Tensor], target: Targets, contrast: Targets, logits: Tensor
) -> tuple[tuple[Tokens, Tokens | None], Tensor]:
    """The tokens, and [example, vocab] by which their logits count."""
    n, vocabulary = logits.shape
    if isinstance(batch, TaskBatch):
        if target is not None or contrast is not None:
            raise TaskError("a task has its own answers", hint="leave target and contrast out, or give its prompts")
        targets = answers_of(batch, "target")
        contrasts: Tokens | None = answers_of(batch, "contrast")
    else:
        targets = tokens_of(wb, logits.argmax(-1).tolist() if target is None else target, n, vocabulary, "target")
        contrasts = None if contrast is None else tokens_of(wb, contrast, n, vocabulary, "contrast")
    weights = targets.weights(vocabulary, logits.device)
    if contrasts is not None:
        check_apart(targets, contrasts)
        weights = weights - contrasts.weights(vocabulary, logits.device)
    return (targets, contrasts), weights


def _text(wb: Workbench, tokens: tuple[int, ...]) -> str:
    shown = [str(one) if wb.tokenizer is None else piece(wb.tokenizer, one) for one in tokens]
    return " | ".join(shown)
