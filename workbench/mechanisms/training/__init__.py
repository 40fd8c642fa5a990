"""The same work for every mechanism: a small language model on bytes of Python's own library, recall and copying."""

from workbench.mechanisms.training.files import TrainedModel, load
from workbench.mechanisms.training.language import ByteLM
from workbench.mechanisms.training.run import train
from workbench.mechanisms.training.score import score
from workbench.mechanisms.training.text import Corpus, copying, corpus, recall, text_batch

__all__ = ["ByteLM", "Corpus", "TrainedModel", "copying", "corpus", "load", "recall", "score", "text_batch", "train"]
