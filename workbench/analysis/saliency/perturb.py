"""Runs batches of masks: through the whole model, or through its decoder alone with masked encoder outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput, encoded
from workbench.analysis.saliency.explained_input import ExplainedInput
from workbench.analysis.saliency.masks import Draw
from workbench.analysis.saliency.scoring import scored
from workbench.errors import WorkbenchError

_SAME = 1e-3  # largest difference of log-probabilities between cached and plain decoding, float32


@dataclass
class InputMasks:
    """Scores of masks on the model's input.

    Attributes:
        cells: per granularity, the segment of each cell that is masked: [time, frequency], [row, column] or [token].
        baseline: what masked cells become.
    """

    subject: ExplainedInput
    cells: Sequence[Tensor]
    baseline: Tensor
    score: str

    cached = False

    def __call__(self, draw: Draw) -> Tensor:
        """[mask, output token]."""
        hidden = draw.hidden[:, self.cells[draw.granularity]]
        main = self.subject.masked(hidden, self.baseline)
        found = self.subject.log_probs(main, _decoder(self.subject, draw))
        return scored(self.score, self.subject, found)


class EncoderMasks:
    """Scores of masks on the encoder's output; the encoder never runs again.

    A masked frame's keys and values are those of the baseline's frame, because their projections are made frame by
    frame. Both are taken from the decoder's cache once, and each mask chooses between them: the projections, most of
    the decoder's work for long inputs, are not computed again. One mask is compared with plain decoding first; where
    they differ, or the decoder keeps no such cache, every mask is decoded plainly and `cached` says so.

    Args:
        cells: per granularity [encoder position] the segment of each explained position.
        baseline: "zero", "mean" (of the explained positions), or a vector [d_model].
    """

    def __init__(self, subject: EncoderDecoderInput, cells: Sequence[Tensor], baseline: Any, score: str) -> None:
        self.subject, self.cells, self.score = subject, cells, score
        self.frame = _frame(subject, baseline)
        self._own: list[tuple[Tensor, Tensor]] = []
        self._empty: list[tuple[Tensor, Tensor]] = []
        self._buffers: list[Tensor] = []
        self.cached = self._try_cache()

    def __call__(self, draw: Draw) -> Tensor:
        """[mask, output token]."""
        found = self._run(self._hidden(draw), _decoder(self.subject, draw), cached=self.cached)
        return scored(self.score, self.subject, found)

    def _hidden(self, draw: Draw) -> Tensor:
        """[mask, encoder position], nothing of the padding."""
        cells = self.cells[draw.granularity]
        hidden = torch.zeros(len(draw.hidden), self.subject.states.shape[1], dtype=torch.bool)
        hidden[:, : len(cells)] = draw.hidden[:, cells]
        return hidden.to(self.subject.states.device)

    def _run(self, hidden: Tensor, decoder: Tensor | None, *, cached: bool) -> Tensor:
        if cached:
            # The decoder reads the cache; of the states only the shape matters.
            states = self.subject.states.expand(len(hidden), -1, -1)
            return self.subject.log_probs_of_states(states, self._cache(hidden), decoder)
        states = torch.where(hidden[..., None], self.frame, self.subject.states)
        return self.subject.log_probs_of_states(states, None, decoder)

    def _try_cache(self) -> bool:
        try:
            self._own = self._cross(self.subject.states)
            self._empty = self._cross(self.frame.expand_as(self.subject.states))
            hidden = torch.zeros(1, self.subject.states.shape[1], dtype=torch.bool, device=self.subject.states.device)
            hidden[:, : len(self.cells[0]) : 2] = True
            fast, plain = (self._run(hidden, None, cached=cached) for cached in (True, False))
        except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError):
            return False  # a decoder without such a cache; plain decoding raises whatever is really wrong
        return bool(((fast - plain).abs() <= _SAME).all())

    def _cross(self, states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, head, encoder position, d_head] of each cross-attention layer."""
        ids = self.subject.prompt[None, :1]
        output = self.subject.model(
            encoder_outputs=encoded(states), **self.subject.rest, decoder_input_ids=ids, use_cache=True
        )
        return [(layer.keys, layer.values) for layer in output.past_key_values.cross_attention_cache.layers]

    def _cache(self, hidden: Tensor) -> Any:
        """A decoder cache whose keys and values are the baseline's where masked."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        rows = hidden[:, None, :, None]
        flat = [
            (a, b) for own, empty in zip(self._own, self._empty, strict=True) for a, b in zip(own, empty, strict=True)
        ]
        if not self._buffers or self._buffers[0].shape[0] < len(hidden):
            self._buffers = [own.new_empty(len(hidden), *own.shape[1:]) for own, _ in flat]
        filled = [
            torch.where(rows, empty, own, out=buffer[: len(hidden)])
            for (own, empty), buffer in zip(flat, self._buffers, strict=True)
        ]
        cross = DynamicCache()
        for i in range(0, len(filled), 2):
            cross.update(filled[i][:, :, :0], filled[i + 1][:, :, :0], i // 2)
            # Set by hand, since update would copy them.
            layer: Any = cross.layers[i // 2]
            layer.keys, layer.values = filled[i], filled[i + 1]
        return EncoderDecoderCache(DynamicCache(), cross)


def _frame(subject: EncoderDecoderInput, baseline: Any) -> Tensor:
    """[1, 1, d_model] what a masked encoder position becomes."""
    states = subject.states
    if isinstance(baseline, Tensor):
        if baseline.numel() != states.shape[2]:
            raise WorkbenchError(f"a baseline frame has {states.shape[2]} numbers", shape=baseline.shape)
        return baseline.to(states).view(1, 1, -1)
    if baseline == "zero":
        return torch.zeros_like(states[:, :1])
    if baseline == "mean":
        return states[:, : subject.encoder_extent].mean(1, keepdim=True)
    raise WorkbenchError(
        f"there is no baseline {baseline!r} for the encoder's output", hint="there is zero, mean, or a vector"
    )


def _decoder(subject: ExplainedInput, draw: Draw) -> Tensor | None:
    """[mask, position, d_model] decoder embeddings without the masked previous tokens; None if none are masked."""
    if draw.tokens is None or not isinstance(subject, EncoderDecoderInput):
        return None
    embedded = subject.embedded_decoder()
    gone = torch.zeros(len(draw.tokens), embedded.shape[1], dtype=torch.bool)
    gone[:, len(subject.prompt) :] = draw.tokens[:, : embedded.shape[1] - len(subject.prompt)]
    return embedded.masked_fill(gone[..., None].to(embedded.device), 0.0)
