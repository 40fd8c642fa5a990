"""What is explained: one input of an encoder-decoder, the hypothesis it gives, and how to run it perturbed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.storage.provenance import find_patches


@dataclass
class ExplainedInput:
    """One example of a model, ready to be perturbed. Made by `prepare_input`.

    Attributes:
        model: the encoder-decoder. name: of its main input. kind: "spectrogram", "image" or "tokens".
        main: the main input as the model takes it, [1, ...]; of tokens their embeddings [1, token, d_model].
        rest: other inputs, such as an attention mask.
        time_axis: of a spectrogram in `main`. extent: positions along time that are no padding.
        prompt, targets: ids [n] of the decoder's prompt and of the hypothesis.
        reference: [output token, vocabulary] log-probabilities of the unperturbed model.
        states: [1, encoder position, d_model] the encoder's output.
    """

    model: nn.Module
    name: str
    kind: str
    main: Tensor
    rest: dict[str, Tensor]
    time_axis: int
    extent: int
    prompt: Tensor
    targets: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))
    states: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def length(self) -> int:
        """Positions of the whole input: frames, tokens, or patches."""
        return self.main.shape[self.time_axis] if self.kind == "spectrogram" else self.main.shape[1]

    @property
    def encoder_extent(self) -> int:
        """Encoder positions that are no padding."""
        whole = self.states.shape[1]
        return whole if self.kind == "image" else min(whole, math.ceil(self.extent * whole / self.length))

    @property
    def decoder_ids(self) -> Tensor:
        """[1, position] what the decoder reads under teacher forcing: all but the last target."""
        return torch.cat([self.prompt, self.targets])[None, :-1]

    def picture(self) -> Tensor | None:
        """The spectrogram [time, frequency] without its padding, or the image [channel, row, column]; else None."""
        if self.kind == "spectrogram":
            return self._frames_first(self.main)[0, : self.extent].detach().float().cpu()
        return self.main[0].detach().float().cpu() if self.kind == "image" else None

    def _frames_first(self, main: Tensor) -> Tensor:
        return main if self.time_axis == 1 else main.transpose(1, 2)

    def masked(self, hidden: Tensor, baseline: Tensor) -> Tensor:
        """Inputs as the model takes them, with cells put to the baseline.

        Args:
            hidden: [batch, time, frequency], [batch, row, column] or [batch, token] of the explained cells.
            baseline: as `baseline_of` gives it.
        """
        hidden = hidden.to(self.main.device)
        if self.kind == "image":
            return torch.where(hidden[:, None], baseline, self.main)
        whole = torch.zeros(len(hidden), self.length, *hidden.shape[2:], dtype=torch.bool, device=self.main.device)
        whole[:, : hidden.shape[1]] = hidden
        if self.kind == "tokens":
            whole = whole[..., None]
        elif self.time_axis == 2:
            whole = whole.transpose(1, 2)
        return torch.where(whole, baseline, self.main)

    def baseline_of(self, baseline: str | float | Tensor) -> Tensor:
        """What masked cells become: "zero", "mean" or "min" of the explained cells, a number, or a tensor.

        Of tokens "zero", "mean" (of the explained embeddings), or "pad" (the padding token's embedding).

        Raises:
            WorkbenchError: another name, a tensor of another shape, or no padding token.
        """
        if isinstance(baseline, Tensor):
            if baseline.shape not in (self.main.shape, self.main.shape[1:]):
                raise WorkbenchError(f"the baseline should be {list(self.main.shape)}", shape=baseline.shape)
            return baseline.to(self.main).expand_as(self.main)
        if isinstance(baseline, (int, float)):
            return torch.full_like(self.main, float(baseline))
        names = ("zero", "mean", "pad") if self.kind == "tokens" else ("zero", "mean", "min")
        if baseline not in names:
            what = "for tokens there is" if self.kind == "tokens" else "there is"
            raise WorkbenchError(
                f"there is no baseline {baseline!r}", hint=f"{what} {', '.join(names)}, a number, or a tensor"
            )
        if baseline == "zero":
            return torch.zeros_like(self.main)
        if self.kind == "tokens":
            one = self._pad_embedding() if baseline == "pad" else self.main[:, : self.extent].mean(1)
            return one.to(self.main).view(1, 1, -1).expand_as(self.main)
        cells = self._frames_first(self.main)[:, : self.extent] if self.kind == "spectrogram" else self.main
        one = cells.float().mean() if baseline == "mean" else cells.float().min()
        return torch.full_like(self.main, float(one))

    def _pad_embedding(self) -> Tensor:
        """[1, d_model]"""
        pad = getattr(self.model.config, "pad_token_id", None)
        if pad is None:
            raise WorkbenchError("the model tells of no padding token", hint='set model.config.pad_token_id, or "mean"')
        found: Tensor = embedding_of(self.model.get_encoder())(torch.tensor([pad], device=self.main.device))  # type: ignore[operator]
        return found

    def log_probs(self, main: Tensor, decoder: Tensor | None = None) -> Tensor:
        """[batch, output token, vocabulary] from inputs like `main`, through encoder and decoder."""
        given = {"inputs_embeds" if self.kind == "tokens" else self.name: main}
        rest = {name: value.expand(len(main), *value.shape[1:]) for name, value in self.rest.items()}
        return self._scored(self.model(**given, **rest, **self._decoder(len(main), decoder), use_cache=False).logits)

    def log_probs_of_states(self, states: Tensor, cache: Any = None, decoder: Tensor | None = None) -> Tensor:
        """[batch, output token, vocabulary] from encoder outputs [batch, encoder position, d_model], decoder only."""
        rest = {name: value.expand(len(states), *value.shape[1:]) for name, value in self.rest.items()}
        past = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        given = self._decoder(len(states), decoder)
        return self._scored(self.model(encoder_outputs=encoded(states), **rest, **given, **past).logits)

    def encode(self, main: Tensor) -> Tensor:
        """[batch, encoder position, d_model] the encoder's output for inputs like `main`."""
        given = {"inputs_embeds" if self.kind == "tokens" else self.name: main}
        rest = {name: value.expand(len(main), *value.shape[1:]) for name, value in self.rest.items()}
        ids = self.prompt[None, :1].expand(len(main), -1)
        states: Tensor = self.model(**given, **rest, decoder_input_ids=ids, use_cache=False).encoder_last_hidden_state
        return states

    def _decoder(self, batch: int, embedded: Tensor | None) -> dict[str, Tensor]:
        if embedded is not None:
            return {"decoder_inputs_embeds": embedded}
        return {"decoder_input_ids": self.decoder_ids.expand(batch, -1)}

    def _scored(self, logits: Tensor) -> Tensor:
        return logits[:, len(self.prompt) - 1 :].float().log_softmax(-1)

    def embedded_decoder(self) -> Tensor:
        """[1, position, d_model] embeddings of what the decoder reads.

        Raises:
            WorkbenchError: the decoder's table of embeddings is not found.
        """
        table = embedding_of(self.model.get_decoder())  # type: ignore[operator]
        found: Tensor = table(self.decoder_ids)
        return found


def encoded(states: Tensor) -> Any:
    """Encoder outputs as Hugging Face models take them."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states.contiguous())  # GPT-2's projection takes views


def embedding_of(tower: nn.Module) -> nn.Module:
    """The table of token embeddings of an encoder or decoder; BART's scales what it looks up."""
    for name in ("embed_tokens", "word_embeddings"):
        for path, module in tower.named_modules():
            if path.rpartition(".")[2] == name:
                return module
    get: Any = getattr(tower, "get_input_embeddings", None)
    found = None if get is None else get()
    if not isinstance(found, nn.Module):
        raise WorkbenchError(f"no table of token embeddings was found in {type(tower).__name__}")
    return found


def grid_of(subject: ExplainedInput) -> tuple[int, int, int]:
    """Rows and columns of an image's patches, and how many encoder positions stand before them.

    Raises:
        WorkbenchError: the model tells of no patches.
    """
    encoder = subject.model.get_encoder()  # type: ignore[operator]
    found = find_patches(encoder)
    if found is None:
        raise WorkbenchError(f"{type(encoder).__name__} tells of no patches", hint='pass segments="slic"')
    (rows, columns), prefix = found["grid"], found["prefix"]
    return rows, columns, prefix
