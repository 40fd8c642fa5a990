"""Lightning attention (arXiv 2401.04658): causal linear attention with a decay per head."""

from workbench.kernels.lightning.decay import decays, slopes
from workbench.kernels.lightning.functional import lightning_attention
from workbench.kernels.lightning.naive import naive_lightning, naive_pattern
from workbench.kernels.lightning.pattern import LightningPattern

__all__ = ["LightningPattern", "decays", "lightning_attention", "naive_lightning", "naive_pattern", "slopes"]
