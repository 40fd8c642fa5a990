"""Models that run as code that `torch.compile` made: what is compiled (`regions`), how attention is recorded in it."""
