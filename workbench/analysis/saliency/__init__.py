"""What output tokens depend on: saliency by masking (SPES) and by captum's methods, with standard errors."""

from workbench.analysis.saliency.explain import saliency
from workbench.analysis.saliency.result import PrecisionError, Saliency

__all__ = ["PrecisionError", "Saliency", "saliency"]
