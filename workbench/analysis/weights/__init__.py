"""What heads can do by their weights alone: copying, what they read and write in the vocabulary, which compose."""

from workbench.analysis.weights.composition import CompositionScores, composition_scores
from workbench.analysis.weights.copying import OVCopying, ov_copying
from workbench.analysis.weights.singular import SingularVectors, singular_vectors

__all__ = [
    "CompositionScores",
    "OVCopying",
    "SingularVectors",
    "composition_scores",
    "ov_copying",
    "singular_vectors",
]
