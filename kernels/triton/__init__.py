"""Fused Triton kernels for the statistics of softmax patterns on a GPU; `launch` imports triton when it is needed."""
