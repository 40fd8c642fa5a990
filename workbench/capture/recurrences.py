"""Join the calls of a recurrence, each of which went on from the state that the one before had left; and of a gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from workbench.capture.settings import Settings
from workbench.capture.site_capture import SiteCapture, joined_outputs
from workbench.errors import CaptureError
from workbench.hooks.tap import StateLink
from workbench.kernels import streaming
from workbench.kernels.patterns import Pattern


def join_recurrence(captures: Sequence[SiteCapture], settings: Settings, ids: Tensor | None) -> SiteCapture:
    """One map over the positions of all calls.

    Where the first of them went on from a state, `before` is what every row reads of it: of the rows of later calls,
    what they read of their own state less what the positions between have put there. Calls of a gate stand beside each
    other; what made their factors is left out.

    Args:
        ids: [batch, position] of all calls, where they are known.

    Raises:
        CaptureError: a call found another state than the one before left, or patterns or values were not kept.
    """
    site, first = captures[0].site, captures[0]
    for one, following in pairwise(captures):
        gone = following.state.found is None or following.state.found != one.state.left
        if gone and site.kind != "gate":
            raise CaptureError(
                "a step found another state in its cache than the step before left there",
                site=site.name,
                hint="beam search reorders the cache, and assisted generation cuts it back; generate greedily or by "
                "sampling, with a plain cache",
            )
    if any(capture.z_gradient is not None for capture in captures):
        raise CaptureError(
            "gradients at single steps cannot be joined", site=site.name, hint="run the whole sequence in one forward"
        )
    patterns = [capture.pattern for capture in captures]
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(patterns[0].device.type, enabled=False):
            pattern = patterns[0].then(patterns[1:])
            pattern.before = None if first.before is None else _before(patterns, pattern)
            statistics = streaming.statistics(pattern, settings.names_at(site), settings.options(ids))
            weights = pattern.dense(limit=None) if settings.pattern else None
    except CaptureError as error:
        raise CaptureError(error.message, site=site.name, shape=error.shape, hint=error.hint) from None
    return replace(
        first,
        shape=pattern.shape,
        statistics=statistics,
        kernel=", ".join(dict.fromkeys(capture.kernel for capture in captures)),
        weights=weights,
        lazy=pattern,
        held=[],
        times=None,
        before=None if pattern.before is None else pattern.before.transpose(1, 2),
        others={} if site.kind == "gate" else first.others,
        state=StateLink(first.state.found, captures[-1].state.left),
        **joined_outputs(captures),
    )


def _before(patterns: Sequence[Pattern], whole: Pattern) -> Tensor:
    if whole.values is None:
        raise CaptureError(
            "the sequence began before the capture, and what rows read of that is told by the values",
            hint="begin the capture before the prompt is run, or capture with values=True",
        )
    given = [pattern.outputs(pattern.values) for pattern in patterns if pattern.values is not None]
    return torch.cat(given, dim=2) - whole.apply(whole.values)
