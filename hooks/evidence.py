"""What values say of a call that waits for its axes, and what speaks against it: nothing here is remembered."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from workbench.hooks.proofs.axes import Axes, Bound
from workbench.hooks.proofs.by_value import Proof, prove_axes
from workbench.hooks.proofs.rows import account, own_features
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Run, Unplaced, Waiting, versions


def late(one: Waiting, bound: Bound) -> AttentionCall | str:
    """The call under axes that became known after its kernel had run; or why it cannot be made any more."""
    if one.versions != versions(one.call.tensors):
        return "the model had overwritten its queries, keys or values when their axes became known; run again"
    with torch.enable_grad():  # what the model gave keeps its history
        return one.call.under(bound)


def axes_of_values(call: Unplaced, run: Run) -> Axes | None:
    """The axes by where the values lie in what a linear function gave: heads among the features of one position.

    They are the output's own, where the values have keys in the place of queries and all else alike.
    """
    if call.values is None or len(call.mixed) != 1:
        return None
    for made in reversed(run.made):
        if made.numel() < call.values.numel():
            continue
        own = own_features(made, call.values, call.width)
        proof = prove_axes(call.values, own, call.mixed, call.width)
        if proof is not None and proof.axes is not None and proof.axes.over == "positions":
            bound = proof.axes.bind(tuple(call.output.shape))
            return None if bound is None or bound.count("head") != (call.heads or bound.count("head")) else proof.axes
    return None


def over_features(call: AttentionCall, made: Iterable[Tensor]) -> bool:
    """Whether what a backend takes for keys are features: its values come from a linear function whose rows its width
    runs along.

    Args:
        made: what linear functions gave, the last one last. Where there is nothing, how the values lie in memory says.
    """
    v, nothing = call.v, True
    b, heads, n_keys, width = v.shape
    for given in reversed(list(made)):
        nothing, features = False, given.shape[-1]
        rows = given.numel() // max(features, 1)
        if features % (heads * n_keys) or rows != b * width:
            if not features % (heads * width) and rows == b * n_keys:
                return False
            continue
        proof = prove_axes(v, own_features(given, v, -2), (-2,), -1)  # what it takes for keys lies among the features
        if proof is not None and proof.axes is not None:
            return proof.axes.over == "features"
    return nothing and v.stride(-2) == 1 < v.stride(-1)


def is_gate(proof: Proof, one: Waiting, run: Run) -> bool:
    """Whether each of several rows of an example reads values of its own, by a single query."""
    bound = None if proof.axes is None else proof.axes.bind(tuple(one.output.shape))
    if bound is None or one.call.scored or run.examples is None or bound.axes.over != "positions":
        return False
    if bound.count("query") > 1 or bound.count("batch") <= run.examples:
        return False
    return axes_of_values(one.call, run) is None  # else its keys are positions, as of a window that is pooled


def doubt_of(proof: Proof, one: Waiting, run: Run) -> str | None:
    """Why what lies among the features may be queries, and what lies among the rows heads; None: it may not."""
    shape, bound = one.output.shape, None if proof.axes is None else proof.axes.bind(tuple(one.output.shape))
    n_mixed, n_keys = [shape[axis] for axis in one.call.mixed], one.call.read[1]
    if len(n_mixed) == 2 and n_mixed[0] == n_mixed[1] == n_keys:
        return "the values fit several layouts, as there are as many heads as keys: run an input of another length"
    if len(n_mixed) == 1 and proof.within and bound is not None:
        heads = bound.count("head")
        if bound.count("query") == n_mixed[0] and n_keys == 1:
            return "what lies among the features of the projection may be heads or queries: run a longer input"
        if bound.count("query") < n_mixed[0] and bound.count("query") != n_keys and heads != one.call.heads:
            return "what lies among the features of the projection may be heads that share their values, or queries"
    if bound is None or bound.count("batch") <= (run.examples or 1):
        return None
    # Of one axis, it is that of the queries, and heads have values of their own.
    doubt = any(len(n_mixed) == 1 or shape[axis] == n_keys for axis in proof.within)
    return "queries may lie among the features of the projection: heads look like windows there" if doubt else None


def compare_part(one: Waiting, p: Tensor) -> None:
    """Whether something smaller than what the heads give is a part of it, as of windows whose last is padded.

    Other parts may enter other projections, as those of text and image do where both are attended to together.
    """
    output, n_features = one.output, p.shape[-1]
    if output.numel() % n_features or not one.unchanged:
        return
    one.tried += 1
    found = account(p, [output.movedim(one.call.width, -1)])
    if found is None or found.explained < found.n_rows:
        return
    if one.entered is None:
        one.entered = torch.zeros(output.numel() // output.shape[one.call.width], dtype=torch.bool, device=p.device)
    one.entered[found.row[found.row >= 0]] = True
    per_row = found.owner.shape[1]
    n_entered, n_rows = int(one.entered.sum()) // per_row, len(one.entered) // per_row
    one.fits = n_entered == n_rows
    one.reason = Waiting.reason
    if not one.fits:
        one.reason = (
            f"its call gives {n_rows} rows, of which {n_entered} enter the projection: "
            "the others are dropped, as padding is, which a length that is a multiple of its windows avoids"
        )
