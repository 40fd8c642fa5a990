"""What a model's output is measured with: one `Metric` for tasks, importance, circuits and sweeps.

>>> from workbench.metrics import METRICS
>>> METRICS["logit_diff"].higher_is_better, METRICS["loss"].higher_is_better
(True, False)
"""

from workbench.metrics.answers import Scored, TaskBatch, last_logits, last_places, scored_logits
from workbench.metrics.divergences import jensen_shannon, js_divergence, kl_divergence, representation
from workbench.metrics.metric import Metric
from workbench.metrics.right_answer import accuracy, logit_diff, loss, probability
from workbench.metrics.table import METRICS, as_metric, as_metrics

__all__ = [
    "METRICS",
    "Metric",
    "Scored",
    "TaskBatch",
    "accuracy",
    "as_metric",
    "as_metrics",
    "jensen_shannon",
    "js_divergence",
    "kl_divergence",
    "last_logits",
    "last_places",
    "logit_diff",
    "loss",
    "probability",
    "representation",
    "scored_logits",
]
