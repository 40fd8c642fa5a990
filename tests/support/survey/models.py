"""All models of the survey: those of the zoo, one for each architecture, and those that are built for it."""

from __future__ import annotations

from collections.abc import Iterator

from support.survey.hybrids import HYBRIDS
from support.survey.packages import PACKAGES
from support.survey.senses import SENSES
from support.survey.surveyed import Surveyed
from support.survey.text import TEXTS
from support.tiny import ZOO, make

_LENGTHS = {
    "T5": (17, 9), "BART": (17, 9), "Whisper": (40, 20, 9), "DINOv2": (17,), "Swin": (9, 81, 25), "LLaVA": (17, 9),
    "torch.nn.Transformer": (17, 9),
}  # fmt: skip
_AS_WIDE_AS_LONG = ("ViT", "CLIP", "timm ViT")  # in the zoo; the survey has them in other sizes
_LIBRARIES = {"torch.nn.Transformer": "torch", "TransformerBridge": "transformer-lens"}


def _of_the_zoo() -> Iterator[Surveyed]:
    labels: set[str] = set()
    for one in ZOO:
        if one.label not in labels and one.label not in _AS_WIDE_AS_LONG:
            labels.add(one.label)
            lengths, library = _LENGTHS.get(one.label, (17,)), _LIBRARIES.get(one.label, "transformers")
            yield Surveyed(one.label, lambda one=one: make(one), one.inputs, lengths, library)  # type: ignore[misc]


SURVEY = [*_of_the_zoo(), *TEXTS, *HYBRIDS, *SENSES, *PACKAGES]
