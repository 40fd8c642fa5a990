"""What output tokens depend on: saliency by masking (SPES) and by captum's methods, with standard errors."""

from workbench.analysis.saliency.result import PrecisionError, Saliency
from workbench.analysis.saliency.run import saliency

__all__ = ["PrecisionError", "Saliency", "saliency"]
