"""What is explained: one input of a model, the outputs it leads to, and how to run it perturbed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.saliency.token_names import special_ids, texts_of
from workbench.errors import WorkbenchError
from workbench.hooks.weights import is_distributed
from workbench.storage.provenance import find_patches

_SAME = 1e-3  # largest difference of log-probabilities between ids and embeddings


def _no_ids() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass
class ExplainedInput(ABC):
    """One example of a model, ready to be perturbed. Made by `prepare_input`; what kinds of models there are, its
    subclasses say.

    Attributes:
        model: the model. name: of its main input. kind: "spectrogram", "image" or "tokens".
        main: the main input as the model takes it, [1, ...]; of tokens their embeddings [1, token, d_model].
        ids: [token] of tokens; empty for other kinds.
        rest: other inputs, such as an attention mask.
        time_axis: of a spectrogram in `main`. extent: positions along time that are no padding.
        prompt, targets: ids [n] of what stands before the first explained output, and of the explained outputs.
        contrast: [n] ids that outputs are held against; None for none.
        reference: [output, vocabulary] log-probabilities of the unperturbed model.
    """

    model: nn.Module
    name: str
    kind: str
    main: Tensor
    rest: dict[str, Tensor]
    time_axis: int = 1
    extent: int = 0
    ids: Tensor = field(default_factory=_no_ids)
    prompt: Tensor = field(default_factory=_no_ids)
    targets: Tensor = field(default_factory=_no_ids)
    contrast: Tensor | None = None
    reference: Tensor = field(default_factory=lambda: torch.zeros(0))

    @abstractmethod
    def log_probs(self, main: Tensor, decoder: Tensor | None = None) -> Tensor:
        """[batch, output, vocabulary] from inputs like `main`.

        Args:
            decoder: [batch, position, d_model] what the decoder of an encoder-decoder reads in place of its tokens.
        """

    @property
    def visible(self) -> tuple[int, ...]:
        """[output] how many of the explained positions each output can depend on; empty where that is all."""
        return ()

    def own_texts(self, ids: Tensor, tokenizer: Any) -> tuple[str, ...]:
        """What outputs are called."""
        return texts_of(tokenizer, ids)

    def special(self, tokenizer: Any) -> tuple[bool, ...]:
        """[output] whether it is a special token."""
        odd = special_ids(self.model, tokenizer)
        return tuple(int(i) in odd for i in self.targets)

    def score_of(self, log_probs: Tensor, *, probability: bool = False) -> Tensor:
        """[batch, output] ln P (or P) of each output, less that of its contrast, from [batch, output, vocabulary]."""

        def of(ids: Tensor) -> Tensor:
            found = log_probs.gather(2, ids[None, :, None].expand(len(log_probs), -1, 1))[..., 0]
            return found.exp() if probability else found

        return of(self.targets) if self.contrast is None else of(self.targets) - of(self.contrast)

    @property
    def length(self) -> int:
        """Positions of the whole input: frames, tokens, or patches."""
        return self.main.shape[self.time_axis] if self.kind == "spectrogram" else self.main.shape[1]

    def picture(self) -> Tensor | None:
        """The spectrogram [time, frequency] without its padding, or the image [channel, row, column]; else None."""
        if self.kind == "spectrogram":
            return self.frames_first(self.main)[0, : self.extent].detach().float().cpu()
        return self.main[0].detach().float().cpu() if self.kind == "image" else None

    def frames_first(self, main: Tensor) -> Tensor:
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
        cells = self.frames_first(self.main)[:, : self.extent] if self.kind == "spectrogram" else self.main
        one = cells.float().mean() if baseline == "mean" else cells.float().min()
        return torch.full_like(self.main, float(one))

    def _pad_embedding(self) -> Tensor:
        """[1, d_model]"""
        pad = getattr(self.model.config, "pad_token_id", None)
        if pad is None:
            raise WorkbenchError("the model tells of no padding token", hint='set model.config.pad_token_id, or "mean"')
        found: Tensor = embedded(self.embedding(), torch.tensor([pad], device=self.main.device))
        return found

    def embedding(self) -> nn.Module:
        """The table that `main` is looked up in, of tokens."""
        return embedding_of(self.model)

    def given(self, main: Tensor) -> dict[str, Tensor]:
        """Arguments of the model for inputs like `main`."""
        rest = {name: value.expand(len(main), *value.shape[1:]) for name, value in self.rest.items()}
        return {"inputs_embeds" if self.kind == "tokens" else self.name: main, **rest}


def normalised_logits(logits: Tensor) -> Tensor:
    """Log-probabilities, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def check_finite(said: Tensor) -> Tensor:
    """What a model says of an input, as it is.

    Raises:
        WorkbenchError: a value is not finite.
    """
    if not said.isfinite().all():
        raise WorkbenchError("the model's probabilities for this input are not finite")
    return said


def check_embeddings(direct: Tensor, by_hand: Tensor, instead: str) -> None:
    """Compare log-probabilities of token ids with those of embeddings that were passed by hand.

    Raises:
        WorkbenchError: they differ.
    """
    off = float((direct - by_hand).abs().max())
    if not off <= _SAME:
        raise WorkbenchError(
            f"embeddings passed by hand change the model's log-probabilities by {off:.1e}",
            hint=f"the model treats token ids in a way of its own; {instead}",
        )


def embedding_of(tower: nn.Module) -> nn.Module:
    """The table of token embeddings of a model or one of its towers; BART's scales what it looks up."""
    for name in ("embed_tokens", "word_embeddings"):
        for path, module in tower.named_modules():
            if path.rpartition(".")[2] == name:
                return module
    get: Any = getattr(tower, "get_input_embeddings", None)
    found = None if get is None else get()
    if not isinstance(found, nn.Module):
        raise WorkbenchError(f"no table of token embeddings was found in {type(tower).__name__}")
    return found


def embedded(table: nn.Module, ids: Tensor) -> Tensor:
    """What a table of embeddings gives for ids; where FSDP has cut its weights, all processes call it at once."""
    cut = {name: p for name, p in table.named_parameters() if is_distributed(p)}
    if cut and not (table._forward_pre_hooks or table._forward_hooks):  # those of tensor parallelism know their part
        whole = {name: p.full_tensor() for name, p in cut.items()}  # type: ignore[attr-defined]
        found: Tensor = torch.func.functional_call(table, whole, (ids,))
    else:
        found = table(ids)
    return found


def grid_of(subject: ExplainedInput) -> tuple[int, int, int]:
    """Rows and columns of an image's patches, and how many encoder positions stand before them.

    Raises:
        WorkbenchError: the model tells of no patches.
    """
    get: Any = getattr(subject.model, "get_encoder", None)
    encoder = subject.model if get is None else get()
    found = find_patches(encoder)
    if found is None:
        raise WorkbenchError(f"{type(encoder).__name__} tells of no patches", hint='pass segments="slic"')
    (rows, columns), prefix = found["grid"], found["prefix"]
    return rows, columns, prefix
