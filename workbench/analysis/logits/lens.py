"""`logit_lens`: the stream after each layer, read by the final norm and the unembedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.recording import first_float
from workbench.analysis.logits.asked import Targets, batches_of, check_model, tokens_of, written_ids
from workbench.analysis.logits.lens_result import LogitLens
from workbench.analysis.logits.readout import Readout
from workbench.analysis.logits.writers import all_blocks, find_readout_of
from workbench.errors import CaptureError, TaskError, expect
from workbench.hooks.answering import answered
from workbench.hooks.changes import Changes
from workbench.inputs import shortened
from workbench.metrics.logits import logits_of
from workbench.session.workbench import Workbench
from workbench.tasks.base import Task
from workbench.tokens import piece


@answered()
def logit_lens(wb: Workbench, prompt: Any, target: Targets = None, *, top: int = 5) -> LogitLens:
    """What the model would say after each layer: the residual stream through its own final norm and unembedding.

    Row 0 is the input of the first block, row r the stream behind block r − 1; the last row is the model's output. The
    divergence is KL(final ‖ lens) in nats, as in Belrose et al. 2023 (arXiv 2303.08112); the lens itself is
    nostalgebraist's (2020). Softcaps are applied. In an encoder-decoder the stream is the decoder's.

    Args:
        wb: the model, attached; it stays on its kernel, and is run once (and once on eight tokens).
        prompt: a text, or model inputs of one prompt.
        target: the token whose probability and rank are followed, as text or id, at all positions or one for each;
            None: at each position the model's own first choice.
        top: how many of the likeliest tokens are kept.

    Raises:
        TaskError: a target outside the vocabulary. CaptureError: several prompts. AttachError: no final norm or output
            projection can be found.
    """
    expect(Workbench, wb=wb)
    check_model(wb)
    if isinstance(prompt, Task):
        raise TaskError("the lens is of one prompt", hint="give task[0].prompt")
    with torch.inference_mode(mode=False), torch.no_grad():
        (batch, *more) = list(batches_of(wb, prompt, 1))
        ids, real = written_ids(batch)
        if more or len(ids) != 1:
            raise CaptureError(f"the lens is of one prompt, not of {len(ids) + len(more)}", shape=ids.shape)
        seen, _, blocks, readout = find_readout_of(wb, shortened(batch))
        blocks = list(all_blocks(wb.model, seen, blocks))
        del seen
        kept = real[0].nonzero()[:, 0]
        rows, logits = _record(wb, batch, blocks, kept)
        final = logits[0, kept.to(logits.device)]
        vocabulary = final.shape[-1]
        if not 1 <= top <= vocabulary:
            raise CaptureError(f"top is 1 to {vocabulary}, the tokens of the vocabulary, and not {top}")
        chosen = final.argmax(-1)
        if target is not None:
            sets = tokens_of(wb, target, len(kept), vocabulary, "target").sets
            chosen = torch.tensor([one[0] for one in sets], device=final.device)
        numbers = [_row(readout, row, final, chosen, top) for row in rows]
        _check_last(readout, rows[-1], final)
    tokens = ids[0, kept].tolist()
    words = torch.stack([each[0] for each in numbers]).unique().tolist()
    return LogitLens(
        rows=("input", *(f"after {name}" for name in blocks)),
        tokens=tuple(_text(wb, one) for one in tokens), token_ids=tuple(tokens),
        target_ids=tuple(chosen.tolist()), targets=tuple(_text(wb, one) for one in chosen.tolist()),
        given=target is not None,
        top_ids=torch.stack([each[0] for each in numbers]),
        top_probabilities=torch.stack([each[1] for each in numbers]),
        probability=torch.stack([each[2] for each in numbers]), rank=torch.stack([each[3] for each in numbers]),
        divergence=torch.stack([each[4] for each in numbers]), entropy=torch.stack([each[5] for each in numbers]),
        word_ids=tuple(words), word_texts=tuple(_text(wb, one) for one in words),
        provenance=wb.provenance(),
    )  # fmt: skip


def _record(wb: Workbench, batch: dict[str, Any], blocks: list[str], kept: Tensor) -> tuple[list[Tensor], Tensor]:
    """The stream before the first and behind each block [position, d_model], and the logits."""
    rows: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        first = first_float((*args, *kwargs.values()))
        assert first is not None
        rows.append(first[0, kept.to(first.device)].clone())

    def after(_: nn.Module, args: Any, output: Any) -> None:
        first = first_float(output)
        assert first is not None
        rows.append(first[0, kept.to(first.device)].clone())

    wb.check_ready()
    with Changes() as changes:
        changes.before(wb.model.get_submodule(blocks[0]), before, with_kwargs=True)
        for block in blocks:
            changes.after(wb.model.get_submodule(block), after)
        output = wb.model(**batch)
    return rows, logits_of(output)


def _row(readout: Readout, row: Tensor, final: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, ...]:
    """Ids and probabilities of the likeliest, probability and rank of the chosen, divergence, entropy: by position."""
    found: list[tuple[Tensor, ...]] = []
    size = readout.at_a_time(final.shape[-1])
    for start in range(0, len(row), size):
        at = slice(start, start + size)
        logs = readout.logits(row[at]).double().log_softmax(-1).to(final.device)
        truth = final[at].double().log_softmax(-1)
        best = logs.topk(top, -1)
        own = logs.gather(-1, chosen[at, None])
        found.append(
            (
                best.indices, best.values.exp(), own[:, 0].exp(), (logs > own).sum(-1) + 1,
                (truth.exp() * (truth - logs)).sum(-1), -(logs.exp() * logs).sum(-1),
            )
        )  # fmt: skip
    return tuple(torch.cat([each[i] for each in found]).cpu() for i in range(6))


def _check_last(readout: Readout, row: Tensor, final: Tensor) -> None:
    """The last row has to be the model's own output, at the last position."""
    own, truth = readout.logits(row[-1:]).double().to(final.device), final[-1:].double()
    if bool(((own - truth).abs() > max(1e-3, 16 * readout.eps) * (1 + truth.abs().amax())).any()):
        raise CaptureError("what the final norm and the output projection make of the last stream is not the output")


def _text(wb: Workbench, token: int) -> str:
    return str(token) if wb.tokenizer is None else piece(wb.tokenizer, token)
