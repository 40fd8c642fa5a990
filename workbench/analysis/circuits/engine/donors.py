"""Which prompts a prompt is resampled from, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from workbench.analysis.circuits.engine.prompts import Pair
from workbench.analysis.circuits.engine.setup import Setup
from workbench.metrics import Scored, TaskBatch
from workbench.session.resampling import Content, choose_donors

_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def donors_of(setup: Setup) -> list[list[int]]:
    """For each prompt of the task the numbers of those that it is resampled from.

    Raises:
        InterventionError: there are not two prompts that differ.
    """
    contents = [content for pair in setup.pairs for content in _contents(setup, pair)]
    return choose_donors(contents, contents, setup.seed)


def _contents(setup: Setup, pair: Pair) -> Iterator[Content]:
    """What each prompt of a batch is: real tokens, or a whole spectrogram or image."""
    streams = range(len(setup.graph.streams))
    masks = [setup.real(pair, s) for s in streams]
    ids = [pair.clean.get("decoder_input_ids" if s else "input_ids") for s in streams]
    others = [value for name, value in pair.clean.items() if name not in _MASKS and name not in _MASKS.values()]
    for i in range(pair.size):
        real = [mask[i] if one is None else one[i][mask[i]] for one, mask in zip(ids, masks, strict=True)]
        yield Content.of(real, [value[i] for value in others])


def batch_of(pairs: Sequence[Pair], numbers: Sequence[int]) -> Pair:
    """Examples of several batches as one batch, padded on the right; it is its own twin.

    Args:
        numbers: of the examples in the task.
    """
    at = {pair.start + k: (pair, k) for pair in pairs for k in range(pair.size)}
    chosen = [at[number] for number in numbers]

    def rows(name: str) -> list[Tensor]:
        return [pair.clean[name][k] for pair, k in chosen]

    names = [name for name in chosen[0][0].clean if name not in _MASKS.values()]
    inputs = {name: pad_sequence(rows(name), batch_first=True) for name in names}
    for ids, mask in _MASKS.items():
        ragged = ids in names and len({len(row) for row in rows(ids)}) > 1
        if ragged or any(mask in pair.clean for pair, _ in chosen):
            given = [pair.clean[mask][k] if mask in pair.clean else None for pair, k in chosen]
            every = [torch.ones_like(row) if one is None else one for one, row in zip(given, rows(ids), strict=True)]
            inputs[mask] = pad_sequence(every, batch_first=True)
    batch = TaskBatch(
        inputs, answers=[pair.clean.answers[k] for pair, k in chosen], wrong=[pair.clean.wrong[k] for pair, k in chosen]
    )
    if any(pair.clean.scored is not None for pair, _ in chosen):
        batch.scored = _scored(chosen)
    ends = [[None if end is None else end[k] for end in pair.ends] for pair, k in chosen]
    stacked = [[end for end in several if end is not None] for several in zip(*ends, strict=True)]
    return Pair(batch, batch, tuple(torch.stack(several) if several else None for several in stacked))


def _scored(chosen: Sequence[tuple[Pair, int]]) -> Scored:
    """Where examples of several batches are measured, as one batch: those of few places repeat their last one."""
    most = max(pair.scored.shape[1] for pair, _ in chosen)
    places = [torch.cat([row, row[-1:].expand(most - len(row))]) for row in (pair.scored[k] for pair, k in chosen)]
    sets = [
        (scored.right[k], scored.wrong[k]) if (scored := pair.clean.scored) is not None
        else ([pair.clean.answers[k]], [pair.clean.wrong[k]])
        for pair, k in chosen
    ]  # fmt: skip
    ends = torch.stack([pair.last[k] for pair, k in chosen])
    return Scored(torch.stack(places), ends, [right for right, _ in sets], [wrong for _, wrong in sets])
