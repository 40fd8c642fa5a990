"""Recordings as a model's input: through the feature extractor of its processor, after looking at them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from workbench.errors import WorkbenchError
from workbench.inputs import check_recording


def with_features(processor: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with their features: made of "audio" and "sampling_rate" where the model's own input is not among them.

    Args:
        processor: what was attached as tokenizer; features need one with a `feature_extractor`.
        inputs: may hold "audio" [sample], from −1 to 1.

    Raises:
        WorkbenchError: the inputs are no dict; the recording is silent, too long, not finite, of several channels, of
            another scale than ±1, of another rate than the extractor's, or of unknown rate; or there is no extractor.
    """
    if not isinstance(inputs, Mapping):
        raise WorkbenchError(
            f"inputs are a dict, not {type(inputs).__name__}", hint="of a text, pass wb.tokenize(text)"
        )
    given = dict(inputs)
    extractor = getattr(processor, "feature_extractor", None)
    wanted = getattr(extractor, "sampling_rate", None)
    rate = given.get("sampling_rate")
    if rate is not None and wanted is not None and int(rate) != wanted:
        raise WorkbenchError(
            f"the audio has {rate} samples per second, the model wants {wanted}", hint=f"resample it to {wanted} Hz"
        )
    if given.get("audio") is None or any(name.startswith(("input_", "pixel_")) for name in given):
        return given
    audio = torch.as_tensor(given["audio"])
    check_recording(audio, "the audio")
    if extractor is None:
        raise WorkbenchError(
            "features need a feature extractor", hint="attach the model with its processor, or pass input_features"
        )
    if rate is None:
        raise WorkbenchError("the audio's rate is not known", hint='pass "sampling_rate" with it')
    longest = getattr(extractor, "n_samples", None)
    if longest is not None and wanted is not None and len(audio) > longest:
        raise WorkbenchError(
            f"the audio lasts {len(audio) / wanted:.1f} s, the model takes {longest / wanted:g} s",
            shape=audio.shape,
            hint="cut it into shorter utterances",
        )
    found = extractor(audio.float().numpy(), sampling_rate=int(rate), return_tensors="pt", return_attention_mask=True)
    return given | {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
