"""The same work for every mechanism: small models of bytes of Python's own library, of pairs to recall and strings to
copy, and of images."""

from workbench.mechanisms.training.files import TrainedModel, load
from workbench.mechanisms.training.images import Scenes, scenes
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.run import train
from workbench.mechanisms.training.score import score_images, score_induction, score_mqar, score_text
from workbench.mechanisms.training.shipped import runs, trained, trained_models
from workbench.mechanisms.training.text import (
    Corpus,
    copying,
    corpus,
    induction_batch,
    mqar_batch,
    needle,
    recall,
    text_batch,
    text_ids,
)
from workbench.mechanisms.training.work import run_work, size_of, width_for

__all__ = [
    "ByteLM",
    "Corpus",
    "PatchModel",
    "Scenes",
    "TrainedModel",
    "copying",
    "corpus",
    "induction_batch",
    "load",
    "mqar_batch",
    "needle",
    "recall",
    "run_work",
    "runs",
    "scenes",
    "score_images",
    "score_induction",
    "score_mqar",
    "score_text",
    "size_of",
    "text_batch",
    "text_ids",
    "train",
    "trained",
    "trained_models",
    "width_for",
]
