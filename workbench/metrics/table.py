"""The metrics that go by a name, and how names, functions and metrics of one's own become `Metric`s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workbench.errors import TaskError, nearest
from workbench.metrics.answers import answer_places
from workbench.metrics.divergences import js_divergence, kl_divergence, representation
from workbench.metrics.metric import Metric
from workbench.metrics.right_answer import accuracy, logit_diff, loss, probability

METRICS = {
    metric.name: metric
    for metric in (
        Metric("loss", loss, higher_is_better=False, reads=answer_places, unit="nats"),
        Metric("logit_diff", logit_diff, reads=answer_places, unit="logits"),
        Metric("probability", probability, reads=answer_places),
        Metric("accuracy", accuracy, differentiable=False, reads=answer_places),
        Metric(
            "kl_divergence", kl_divergence, higher_is_better=False, against_clean=True, reads=answer_places, unit="nats"
        ),
        Metric(
            "js_divergence", js_divergence, higher_is_better=False, against_clean=True, reads=answer_places, unit="nats"
        ),
        representation(),
    )
}
"""Metrics by name, as all analyses take them."""


def as_metric(given: Any, name: str | None = None) -> Metric:
    """A metric from its name, a `Metric`, or a function.

    A function is taken to be higher for a better model, and may say more by attributes `against_clean` and `reads`;
    `Metric(name, function, higher_is_better=False)` says all of it.

    Args:
        name: what to call it, in place of its own name.

    Raises:
        TaskError: an unknown name, or what is no function.

    >>> as_metric("loss").unit, as_metric(loss).unit
    ('nats', 'nats')
    """
    if isinstance(given, str):
        if given not in METRICS:
            raise TaskError(f'there is no metric "{given}"', hint=nearest(given, list(METRICS), "metric"))
        given = METRICS[given]
    elif not isinstance(given, Metric):
        given = next((metric for metric in METRICS.values() if metric.function is given), given)
    if isinstance(given, Metric):
        return given if name in (None, given.name) else replace(given, name=str(name))
    if not callable(given):
        what = f'the metric "{name}"' if name else "a metric"
        raise TaskError(
            f"{what} is {type(given).__name__}, expected a name, a Metric or a function of output and batch",
            hint="metric(output, batch) gives one number per example",
        )
    own = str(getattr(given, "name", None) or getattr(given, "__name__", None) or type(given).__name__)
    return Metric(
        name or ("metric" if own == "<lambda>" else own), given,
        against_clean=bool(getattr(given, "against_clean", False)), reads=getattr(given, "reads", None),
    )  # fmt: skip


def as_metrics(given: Any) -> dict[str, Metric]:
    """Metrics by name, from one or several of what `as_metric` takes, or a dict of them.

    Raises:
        TaskError: none, two of one name, or what is no metric.
    """
    if isinstance(given, Mapping):
        found = [as_metric(value, str(name)) for name, value in given.items()]
    else:
        found = [as_metric(value) for value in (given if isinstance(given, (list, tuple)) else [given])]
    if not found:
        raise TaskError("there is no metric", hint=f"give one or several of {', '.join(METRICS)}, or functions")
    named = {metric.name: metric for metric in found}
    if len(named) < len(found):
        raise TaskError("two metrics have the same name", hint="give a dict of metrics by name")
    return named
