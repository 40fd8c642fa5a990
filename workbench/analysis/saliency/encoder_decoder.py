"""An input of an encoder-decoder and its hypothesis: run through the whole model, or through its decoder alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.explained_input import ExplainedInput, embedded, embedding_of, normalised_logits


@dataclass
class EncoderDecoderInput(ExplainedInput):
    """One example of an encoder-decoder. Outputs are the tokens of the hypothesis behind the decoder's prompt.

    Attributes:
        states: [1, encoder position, d_model] the encoder's output.
    """

    states: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def encoder_extent(self) -> int:
        """Encoder positions that are no padding."""
        whole = self.states.shape[1]
        return whole if self.kind == "image" else min(whole, math.ceil(self.extent * whole / self.length))

    @property
    def decoder_ids(self) -> Tensor:
        """[1, position] what the decoder reads under teacher forcing: all but the last target."""
        return torch.cat([self.prompt, self.targets])[None, :-1]

    def embedding(self) -> nn.Module:
        """The encoder's table."""
        return embedding_of(self.model.get_encoder())  # type: ignore[operator]

    def log_probs(self, main: Tensor, decoder: Tensor | None = None) -> Tensor:
        """[batch, output token, vocabulary] from inputs like `main`, through encoder and decoder."""
        given = self.given(main) | self._decoder(len(main), decoder)
        return self.scored(self.model(**given, use_cache=False).logits)

    def log_probs_of_states(self, states: Tensor, cache: Any = None, decoder: Tensor | None = None) -> Tensor:
        """[batch, output token, vocabulary] from encoder outputs [batch, encoder position, d_model], decoder only."""
        rest = {name: value.expand(len(states), *value.shape[1:]) for name, value in self.rest.items()}
        past = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        given = self._decoder(len(states), decoder)
        return self.scored(self.model(encoder_outputs=encoded(states), **rest, **given, **past).logits)

    def encode(self, main: Tensor) -> Tensor:
        """[batch, encoder position, d_model] the encoder's output for inputs like `main`."""
        ids = self.prompt[None, :1].expand(len(main), -1)
        output = self.model(**self.given(main), decoder_input_ids=ids, use_cache=False)
        states: Tensor = output.encoder_last_hidden_state
        return states

    def _decoder(self, batch: int, embedded: Tensor | None) -> dict[str, Tensor]:
        if embedded is not None:
            return {"decoder_inputs_embeds": embedded}
        return {"decoder_input_ids": self.decoder_ids.expand(batch, -1)}

    def scored(self, logits: Tensor) -> Tensor:
        """[batch, output token, vocabulary] log-probabilities from the decoder's logits at all its positions."""
        return normalised_logits(logits[:, len(self.prompt) - 1 :])

    def embedded_decoder(self) -> Tensor:
        """[1, position, d_model] embeddings of what the decoder reads.

        Raises:
            WorkbenchError: the decoder's table of embeddings is not found.
        """
        table = embedding_of(self.model.get_decoder())  # type: ignore[operator]
        return embedded(table, self.decoder_ids)


def encoded(states: Tensor) -> Any:
    """Encoder outputs as Hugging Face models take them."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states.contiguous())  # GPT-2's projection takes views
