"""What is explained: one input of an encoder-decoder, the hypothesis it gives, and how to run it perturbed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.inputs import decoder_start
from workbench.storage.provenance import find_patches
from workbench.tokens import piece

EXTRAS = ("audio", "sampling_rate", "seconds_per_frame", "name", "reference")
"""Entries of `inputs` that are not for the model: they are passed on to results and views."""
_MAIN = {
    "input_features": "spectrogram",
    "pixel_values": "image",
    "input_ids": "tokens",
    "input_values": "samples",
}
_TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
_QUIET = 1e-6


@dataclass
class Reading:
    """One example of a model, ready to be perturbed. Made by `read`.

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

        Raises:
            WorkbenchError: another name, or a tensor of another shape.
        """
        if isinstance(baseline, Tensor):
            if baseline.shape not in (self.main.shape, self.main.shape[1:]):
                raise WorkbenchError(f"the baseline should be {list(self.main.shape)}", shape=baseline.shape)
            return baseline.to(self.main).expand_as(self.main)
        if isinstance(baseline, (int, float)):
            return torch.full_like(self.main, float(baseline))
        cells = self._frames_first(self.main)[:, : self.extent] if self.kind == "spectrogram" else self.main
        known = {"zero": 0.0, "mean": float(cells.float().mean()), "min": float(cells.float().min())}
        if baseline not in known or (self.kind == "tokens" and baseline != "zero"):
            hint = "for tokens there is zero" if self.kind == "tokens" else f"there is {', '.join(known)}, or a number"
            raise WorkbenchError(f"there is no baseline {baseline!r}", hint=hint)
        return torch.full_like(self.main, known[baseline])

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


def read(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    hypothesis: Tensor | None = None,
    prompt: Tensor | list[int] | None = None,
    frames: int | None = None,
    time_axis: int | None = None,
    **decoding: Any,
) -> Reading:
    """Read one example: its input, its hypothesis (decoded unless given), and the unperturbed model's probabilities.

    Args:
        inputs: one example as the model takes it, [1, ...]; `EXTRAS` are left aside. Its `decoder_input_ids` or
            `labels` are taken for the hypothesis.
        hypothesis: ids [n] behind the prompt.
        prompt: decoder ids that are given and not explained; the start token if None.
        frames: positions along time that are no padding; those of the attention mask if None, else all.
        time_axis: axis of time in a spectrogram [1, a, b], 1 or 2; found from the model's number of mel bins if None.
        decoding: for `decode`.

    Raises:
        WorkbenchError: no encoder-decoder with cross-attention, no or several examples, an input that is too long or
            silent, or an empty hypothesis.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise WorkbenchError(
            f"{type(model).__name__} is no encoder-decoder: it has no cross-attention from outputs to an input",
            hint="pass a speech-to-text, translation or captioning model",
        )
    given = {name: value for name, value in inputs.items() if name not in EXTRAS and name not in _TARGETS}
    name = next((known for known in _MAIN if given.get(known) is not None), None)
    if name is None:
        raise WorkbenchError(
            f"there is no input to explain among {', '.join(given) or 'nothing'}",
            hint=f"pass one of {', '.join(_MAIN)}, as the model's feature extractor or tokenizer makes them",
        )
    kind = _MAIN[name]
    if kind == "samples":
        raise WorkbenchError(
            "raw samples are not explained", hint="saliency of the encoder's input needs a spectrogram"
        )
    main = torch.as_tensor(given[name])
    rank = {"spectrogram": 3, "image": 4, "tokens": 2}[kind]
    if main.dim() == rank - 1:
        main = main[None]
    if main.dim() != rank or len(main) != 1:
        raise WorkbenchError(f"{name} should hold one example", shape=main.shape, hint="pass utterances one by one")
    parameter = next(model.parameters())
    main = main.to(parameter.device)
    mask = given.get("attention_mask")
    rest: dict[str, Tensor] = {}
    axis = 1
    if kind == "spectrogram":
        axis = _time_axis(config, main) if time_axis is None else time_axis
        limit = _longest(config)
        if limit is not None and main.shape[axis] > limit:
            raise WorkbenchError(
                f"the audio has {main.shape[axis]} frames, the model takes {limit}",
                shape=main.shape,
                hint="cut it into shorter utterances",
            )
        if limit is not None and main.shape[axis] < limit:
            raise WorkbenchError(
                f"the features have {main.shape[axis]} frames, the model wants {limit}, padding included",
                shape=main.shape,
                hint="let the model's feature extractor pad them, and pass its attention_mask",
            )
        main = main.to(parameter.dtype)
        extent = _extent(frames, mask, main.shape[axis])
        cells = main[:, :extent] if axis == 1 else main[:, :, :extent]
        if float(cells.float().std(correction=0)) < _QUIET:
            raise WorkbenchError(
                "the audio is silent: its spectrogram is constant", shape=main.shape, hint="check the recording"
            )
        if mask is not None and getattr(config, "model_type", "") != "whisper":
            rest["attention_mask"] = torch.as_tensor(mask).to(main.device).view(1, -1)
    elif kind == "tokens":
        if main.shape[1] == 0:
            raise WorkbenchError("the input text is empty", shape=main.shape)
        rest["attention_mask"] = torch.ones_like(main) if mask is None else torch.as_tensor(mask).to(main).view(1, -1)
        extent = _extent(frames, rest["attention_mask"], main.shape[1])
    else:
        main, extent = main.to(parameter.dtype), main.shape[2]
    reading = Reading(model, name, kind, main, rest, axis, extent, _prompt(model, prompt, parameter.device))
    with torch.no_grad():
        if kind == "tokens":
            reading.main = embedding_of(model.get_encoder())(main)  # type: ignore[operator]
        reading.states = reading.encode(reading.main)
        targets = _given_targets(inputs, reading.prompt) if hypothesis is None else torch.as_tensor(hypothesis)
        if targets is None:
            targets = decode(reading, reading.states, **decoding)[0]
        reading.targets = targets.to(parameter.device).long().flatten()
        specials = special_ids(model, None)
        if not len(reading.targets) or all(int(i) in specials for i in reading.targets):
            raise WorkbenchError(
                "the hypothesis is empty: the model says nothing about this input",
                hint="pass hypothesis= to explain a text of your own",
            )
        reading.reference = reading.log_probs(reading.main)[0]
        if kind == "tokens":
            _check_embeddings(reading, main)
    if not reading.reference.isfinite().all():
        raise WorkbenchError("the model's probabilities for this input are not finite")
    return reading


def decode(
    reading: Reading,
    states: Tensor,
    *,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    no_repeat_ngram_size: int = 0,
) -> list[Tensor]:
    """Hypotheses (ids behind the prompt, the end token with them) for encoder outputs [batch, position, d_model].

    Greedy by default; SPES decodes with 5 beams and no repeated 5-grams.
    """
    from transformers import GenerationConfig, GenerationMixin

    model = reading.model
    ends = _ends(model)
    config = getattr(model, "config", None)
    room = min(max_new_tokens or 128, _decoder_limit(config) - len(reading.prompt))
    generation = GenerationConfig(
        max_length=len(reading.prompt) + room,  # max_new_tokens would warn of the model's own max_length
        num_beams=num_beams,
        no_repeat_ngram_size=no_repeat_ngram_size,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=_pad(model, ends),
        decoder_start_token_id=int(reading.prompt[0]),
        use_cache=True,
    )
    rest = {name: value.expand(len(states), *value.shape[1:]) for name, value in reading.rest.items()}
    ids = reading.prompt[None].expand(len(states), -1)
    # Models with a generate of their own (Whisper's cuts audio into windows) want the input; here there is none.
    generate: Any = GenerationMixin.generate
    given = {"decoder_input_ids": ids, "generation_config": generation, **rest}
    found: Tensor = generate(model, encoder_outputs=encoded(states), **given)
    rows = []
    for row in found[:, len(reading.prompt) :]:
        stop = next((i + 1 for i, token in enumerate(row.tolist()) if token in ends), len(row))
        rows.append(row[:stop])
    return rows


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


def special_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids of special tokens, as tokenizer and generation config tell."""
    known = set(getattr(tokenizer, "all_special_ids", ()) or ())
    for index, token in (getattr(tokenizer, "added_tokens_decoder", None) or {}).items():
        if getattr(token, "special", False):
            known.add(int(index))
    for owner in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        for name in ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"):
            value = getattr(owner, name, None)
            known |= {int(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None}
    return known


def texts_of(tokenizer: Any, ids: Tensor) -> tuple[str, ...]:
    """Text of each id; the id itself without a tokenizer."""
    decoder = tokenizer if hasattr(tokenizer, "decode") else getattr(tokenizer, "tokenizer", None)
    decoder = getattr(decoder, "tokenizer", decoder)
    return tuple(str(i) if decoder is None else piece(decoder, i) for i in ids.tolist())


def grid_of(reading: Reading) -> tuple[int, int, int]:
    """Rows and columns of an image's patches, and how many encoder positions stand before them.

    Raises:
        WorkbenchError: the model tells of no patches.
    """
    encoder = reading.model.get_encoder()  # type: ignore[operator]
    found = find_patches(encoder)
    if found is None:
        raise WorkbenchError(f"{type(encoder).__name__} tells of no patches", hint='pass segments="slic"')
    (rows, columns), prefix = found["grid"], found["prefix"]
    return rows, columns, prefix


def _time_axis(config: Any, main: Tensor) -> int:
    """Which axis of [1, a, b] is time: the one that is not the number of mel bins."""
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    owners = (config, getattr(config, "encoder", None))
    bins = next((getattr(o, n) for o in owners for n in names if isinstance(getattr(o, n, None), int)), None)
    fits = [axis for axis in (1, 2) if main.shape[3 - axis] == bins]
    if len(fits) == 2 and getattr(config, "model_type", "") == "whisper":
        return 2
    if len(fits) != 1:
        raise WorkbenchError(
            f"which axis of the features is time cannot be told ({bins} mel bins)",
            shape=main.shape,
            hint="pass time_axis=1 or time_axis=2",
        )
    return fits[0]


def _longest(config: Any) -> int | None:
    """Most input frames that the model takes; Whisper's convolutions halve them."""
    if getattr(config, "model_type", "") == "whisper":
        return 2 * int(config.max_source_positions)
    return None


def _extent(frames: int | None, mask: Any, length: int) -> int:
    extent = length
    if frames is not None:
        extent = frames
    elif mask is not None:
        extent = int(torch.as_tensor(mask).flatten().nonzero().max()) + 1 if torch.as_tensor(mask).any() else 0
    if not 1 <= extent <= length:
        raise WorkbenchError(f"{extent} of {length} positions cannot be explained", hint="check frames= and the mask")
    return extent


def _prompt(model: nn.Module, prompt: Tensor | list[int] | None, device: torch.device) -> Tensor:
    if prompt is None:
        start = decoder_start(model)
        assert start is not None
        prompt = [start]
    found = torch.as_tensor(prompt, device=device).long().flatten()
    if not len(found):
        raise WorkbenchError("the prompt is empty", hint="give the decoder's start token at least")
    return found


def _given_targets(inputs: Mapping[str, Any], prompt: Tensor) -> Tensor | None:
    """Ids behind the prompt, from labels or decoder inputs."""
    if inputs.get("labels") is not None:
        labels = torch.as_tensor(inputs["labels"]).flatten()
        return labels[labels >= 0]
    if inputs.get("decoder_input_ids") is None:
        return None
    ids = torch.as_tensor(inputs["decoder_input_ids"]).flatten()
    n = len(prompt)
    return ids[n:] if torch.equal(ids[:n].cpu(), prompt.cpu()) else ids


def _check_embeddings(reading: Reading, ids: Tensor) -> None:
    direct = reading.model(input_ids=ids, **reading.rest, decoder_input_ids=reading.decoder_ids, use_cache=False).logits
    off = float((reading._scored(direct)[0] - reading.reference).abs().max())
    if off > 1e-3:
        raise WorkbenchError(
            f"embeddings passed by hand change the model's log-probabilities by {off:.1e}",
            hint="the encoder treats token ids in a way of its own; explain its output with method='encoder_output'",
        )


def _ends(model: nn.Module) -> list[int]:
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "eos_token_id", None)
        if value is not None:
            return [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return []


def _pad(model: nn.Module, ends: list[int]) -> int:
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(owner, "pad_token_id", None)
        if value is not None:
            return int(value)
    return ends[0] if ends else 0


def _decoder_limit(config: Any) -> int:
    owners = (config, getattr(config, "decoder", None))
    names = ("max_target_positions", "max_position_embeddings", "n_positions")
    found = [getattr(o, n) for o in owners for n in names if isinstance(getattr(o, n, None), int)]
    return min(found) if found else 512
