"""What heads do over a whole corpus: their roles, how much they differ from text to text, and where they show most."""

from workbench.analysis.corpus.duo_attention import read_duo_attention
from workbench.analysis.corpus.headvis import read_headvis
from workbench.analysis.corpus.result import CorpusAtlas, CorpusAtlasInterrupted
from workbench.analysis.corpus.run import head_atlas_over

__all__ = ["CorpusAtlas", "CorpusAtlasInterrupted", "head_atlas_over", "read_duo_attention", "read_headvis"]
