"""Recording while a server runs: requests in continuous batches whose keys lie in pages."""

from workbench.hooks.serving.paged_batch import PagedBatch, Served
from workbench.hooks.serving.vllm import recording_backend

__all__ = ["PagedBatch", "Served", "recording_backend"]
