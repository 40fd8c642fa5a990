"""What the logits are made of: `logit_attribution` over parts, `logit_lens` over layers."""

from workbench.analysis.logits.attribution import logit_attribution
from workbench.analysis.logits.lens import logit_lens
from workbench.analysis.logits.lens_result import LogitLens
from workbench.analysis.logits.result import LogitAttribution

__all__ = ["LogitAttribution", "LogitLens", "logit_attribution", "logit_lens"]
