"""Which heads need the whole cache and which do not: retrieval scores on a needle, streaming scores on any prompt."""

from workbench.analysis.head_scores.retrieval import RetrievalScores, retrieval_scores
from workbench.analysis.head_scores.streaming import StreamingScores, streaming_scores

__all__ = ["RetrievalScores", "StreamingScores", "retrieval_scores", "streaming_scores"]
