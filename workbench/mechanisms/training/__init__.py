"""The same work for every mechanism: a small language model on bytes of Python's own library, a small image model."""

from workbench.mechanisms.training.files import TrainedModel, load
from workbench.mechanisms.training.images import Scenes, scenes
from workbench.mechanisms.training.models import ByteLM, PatchModel
from workbench.mechanisms.training.run import train
from workbench.mechanisms.training.score import score_images, score_text
from workbench.mechanisms.training.shipped import runs, trained, trained_models
from workbench.mechanisms.training.text import Corpus, copying, corpus, needle, recall, text_batch, text_ids
from workbench.mechanisms.training.work import run_work, size_of, width_for

__all__ = [
    "ByteLM",
    "Corpus",
    "PatchModel",
    "Scenes",
    "TrainedModel",
    "copying",
    "corpus",
    "load",
    "needle",
    "recall",
    "run_work",
    "runs",
    "scenes",
    "score_images",
    "score_text",
    "size_of",
    "text_batch",
    "text_ids",
    "train",
    "trained",
    "trained_models",
    "width_for",
]
