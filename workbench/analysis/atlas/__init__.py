"""Which patterns heads have learned: an autoencoder's map of them, clusters, and names. `pattern_atlas`."""

from workbench.analysis.atlas.fitting import pattern_atlas
from workbench.analysis.atlas.result import EncodedPatterns, PatternAtlas

__all__ = ["EncodedPatterns", "PatternAtlas", "pattern_atlas"]
