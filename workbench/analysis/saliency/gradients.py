"""Captum's methods, of each output's log-probability, at the input or at the encoder's output.

Those that perturb are captum's own code; of those with gradients only what is needed for all outputs at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.explained_input import ExplainedInput, grid_of
from workbench.analysis.saliency.segments import checked, each, patches, runs, sizes, superpixels
from workbench.analysis.saliency.sums import seen
from workbench.errors import WorkbenchError

METHODS = ("integrated_gradients", "gradient_x_input", "occlusion", "feature_ablation", "kernel_shap")
_WITH_GRADIENTS = ("integrated_gradients", "gradient_x_input")
_FEW = 256  # vectors of a forward, below which copies of the points cost less than a backward of each output
_GAP = 0.05  # share of what is to be explained by which integrated gradients may miss it without a warning


class _Explained:
    """Log-probabilities of the outputs, less those of their contrasts, [batch, output token], as a function of the
    explained part of the input.

    That part, `start`, is [1, time, frequency], [1, token, d_model], [1, channel, row, column], or at the encoder
    [1, position, d_model]. `runs` counts the examples it was called with, copies of one of them once.
    """

    def __init__(self, subject: ExplainedInput, where: str) -> None:
        self.subject, self.where, self.runs = subject, where, 0
        if where == "encoder":
            assert isinstance(subject, EncoderDecoderInput)
            self.whole, extent = subject.states, subject.encoder_extent
        else:
            self.whole, extent = subject.frames_first(subject.main), subject.extent
        whole = subject.kind == "image" and where == "input"
        self.start = subject.main if whole else self.whole[:, :extent].detach().clone()

    def __call__(self, part: Tensor, copies: int = 1) -> Tensor:
        self.runs += len(part) // copies
        return self.subject.score_of(self._log_probs(part))

    def _log_probs(self, part: Tensor) -> Tensor:
        subject = self.subject
        if subject.kind == "image" and self.where == "input":
            return subject.log_probs(part)
        whole = self.whole
        joined = torch.cat([part, whole[:, part.shape[1] :].expand(len(part), -1, -1)], 1)
        if self.where == "encoder":
            assert isinstance(subject, EncoderDecoderInput)
            return subject.log_probs_of_states(joined)
        return subject.log_probs(joined if subject.time_axis == 1 else joined.transpose(1, 2))


class _LeastSquares:
    """A weighted linear regression with an intercept, in the form that captum's Kernel SHAP calls."""

    def fit(self, train_data: Iterable[tuple[Tensor, ...]], **_: Any) -> dict[str, float]:
        """Fit (features, value, weight) batches."""
        x, y, w = (torch.cat(parts).double() for parts in zip(*train_data, strict=True))
        root = w.flatten().sqrt()[:, None]
        rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.coefficients = torch.linalg.lstsq(rows * root, y.view(-1, 1) * root, driver="gelsd").solution[:, 0]
        return {}

    def representation(self) -> Tensor:
        """[1, feature] coefficients."""
        return self.coefficients[None, :-1].float()


class _Replay:
    """Remembers what a function gave, call by call, for methods that make the same calls for every output token."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.at = function, -1
        self.given: list[Tensor] = []

    def rewind(self) -> None:
        self.at = 0 if self.given else -1

    def __call__(self, part: Tensor) -> Tensor:
        if self.at < 0:
            with torch.no_grad():
                self.given.append(self.function(part))
            return self.given[-1]
        self.at += 1
        return self.given[self.at - 1]


def attribute(
    subject: ExplainedInput,
    method: str,
    where: str,
    *,
    segments: Any = None,
    baseline: Any = "zero",
    n_masks: int = 2000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    n_steps: int = 32,
    window: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    n_segments: int = 100,
    repeats: int = 4,
) -> dict[str, Any]:
    """The map of a captum method, as fields of a `Saliency`.

    Integrated gradients should sum to the change of the log-probability between baseline and input (completeness); by
    what share of it they miss it in sum over output tokens is "completeness_gap" in `details`, beside
    "convergence_delta" (sum minus change) and "change" of each token; gradient times input is held against zeros.

    Perturbing methods run once for all output tokens: captum asks for one token at a time, and is given what the first
    pass saw.

    Args:
        segments: for feature ablation and Kernel SHAP; superpixels or runs of about `n_segments` if None.
        n_masks: samples of Kernel SHAP, over all `repeats`, whose spread is its standard error.
        n_steps: of integrated gradients. window, strides: of occlusion over the explained positions.

    Raises:
        WorkbenchError: Kernel SHAP with fewer samples than segments, no steps, or a model that gives no gradient.
    """
    explained = _Explained(subject, where)
    start = explained.start
    base = _baseline(subject, explained, baseline)
    shown, cells, kind = _segments(subject, where, segments, n_segments, start)
    details: dict[str, Any] = {"segments": sizes(shown)}
    n = len(subject.targets)
    if method in _WITH_GRADIENTS:
        maps, more = _by_gradients(explained, method, base, n_steps, batch_size, progress)
        details |= more
        if method == "integrated_gradients":
            _warn_of_gap(details, subject, where, n_steps)
        found, error = _reduced(maps, kind, cells, "sum"), None
    elif method == "kernel_shap":
        found, error = _kernel_shap(explained, base, cells, n, n_masks, repeats, batch_size, seed, kind)
        details["repeats"] = repeats
    else:
        maps = _by_perturbing(explained, method, base, cells, n, window, strides, batch_size)
        found, error = _reduced(maps, kind, cells, "mean"), None
    details["evaluations"] = explained.runs
    hidden = ~seen(subject.visible, found)  # least squares of Kernel SHAP find small numbers there
    found = found.masked_fill(hidden, 0.0)
    error = torch.zeros_like(found) if error is None else error.masked_fill(hidden, 0.0)
    return {
        "scores": found.float().cpu(),
        "standard_error": error.float().cpu(),
        "n_masks": explained.runs,
        "kind": kind,
        "signed": True,
        "segments": shown,
        "details": details,
        "state": {},
    }


def _by_gradients(
    explained: _Explained, method: str, base: Tensor, n_steps: int, batch_size: int, progress: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Maps [output token, ...] of captum's two methods with gradients, and how far their sums are from the change.

    Captum would run the model again for each output token. Here one forward of a batch serves all of them, each with
    a backward of its own.
    """
    start = explained.start
    if method == "gradient_x_input":
        base, points, weights = torch.zeros_like(start), [1.0], [1.0]
    else:
        if n_steps < 1:
            raise WorkbenchError(f"integrated gradients take at least 1 step, not {n_steps}")
        nodes, spans = np.polynomial.legendre.leggauss(n_steps)  # on [-1, 1]
        points, weights = ((1 + nodes) / 2).tolist(), (spans / 2).tolist()
    wide = torch.promote_types(start.dtype, torch.float32)
    total = torch.zeros(len(explained.subject.targets), *start.shape[1:], dtype=wide, device=start.device)
    with torch.enable_grad(), tqdm(total=len(points), desc=method.replace("_", " "), disable=not progress) as bar:
        for first in range(0, len(points), batch_size):
            along, size = (total.new_tensor(each[first : first + batch_size]) for each in (points, weights))
            steps = base + along.view(-1, *[1] * (start.dim() - 1)) * (start - base)
            for gathered, gradient in zip(total, _gradients(explained, steps.to(start)), strict=True):
                gathered += torch.einsum("s,s...->...", size, gradient.to(total))
            bar.update(len(along))
    with torch.no_grad():
        own = explained.subject.score_of(explained.subject.reference[None])
        change = (own - explained(base))[0].double()
    maps = (total * (start - base).to(total)).detach()
    delta = maps.double().flatten(1).sum(1) - change
    return maps, {
        "convergence_delta": tuple(delta.tolist()),
        "change": tuple(change.tolist()),
        "completeness_gap": _share(float(delta.abs().sum()), float(change.abs().sum())),
    }


def _share(missed: float, asked: float) -> float:
    """Of a sum that should be 0 and is, nothing is missed."""
    return missed / asked if asked else math.inf if missed else 0.0


def _gradients(explained: _Explained, points: Tensor) -> Iterator[Tensor]:
    """[point, ...] of each output token in turn, from one forward.

    Few vectors take about as long as one, since it is the weights that are waited for: then each output token has a
    copy of the points in the batch, and one backward is that of all. Otherwise each has a backward of its own.

    Raises:
        WorkbenchError: the model has none.
    """
    points, n = points.detach(), len(explained.subject.targets)
    if n > 1 and n * points.numel() // points.shape[-1] <= _FEW:
        copies = points.repeat(n, *[1] * (points.dim() - 1)).requires_grad_()
        own = explained(copies, n).unflatten(0, (n, -1)).diagonal(dim1=0, dim2=2)
        yield from _gradient(explained, own.sum(), copies).unflatten(0, (n, -1))
        return
    points.requires_grad_()
    said = explained(points).sum(0)
    for k in range(n):
        yield _gradient(explained, said[k], points, retain_graph=k + 1 < n)


def _gradient(explained: _Explained, said: Tensor, points: Tensor, retain_graph: bool = False) -> Tensor:
    try:
        (found,) = torch.autograd.grad(said, points, retain_graph=retain_graph)
    except RuntimeError as error:
        raise WorkbenchError(
            f"{type(explained.subject.model).__name__} gives no gradient here: {error}",
            hint='is it quantized, or compiled? "occlusion", "feature_ablation" and masks need forwards alone',
        ) from None
    return found


def _warn_of_gap(details: dict[str, Any], subject: ExplainedInput, where: str, n_steps: int) -> None:
    gap = details["completeness_gap"]
    if gap <= _GAP:
        return
    worst = max(range(len(details["change"])), key=lambda k: abs(details["convergence_delta"][k]))
    change = details["change"][worst]
    padded = subject.kind == "tokens" and getattr(subject.model.config, "pad_token_id", None) is not None
    other = "pad" if padded and where != "encoder" else "mean"
    warnings.warn(
        f"integrated gradients miss {gap:.0%} of what they should sum to: of output token {worst} "
        f"{change + details['convergence_delta'][worst]:.3g} for a change of {change:.3g} in log-probability. The path "
        f"from a baseline of zeros through a norm such as RMSNorm changes all at its first step: try "
        f'baseline="{other}", or more than n_steps={n_steps}',
        UserWarning,
        stacklevel=4,
    )


def _by_perturbing(
    explained: _Explained, method: str, base: Tensor, cells: Tensor, n: int, window: Any, strides: Any, batch_size: int
) -> Tensor:
    from captum.attr import FeatureAblation, Occlusion

    replay = _Replay(explained)
    maps = []
    for k in range(n):
        replay.rewind()
        common = {"baselines": base, "target": k, "perturbations_per_eval": batch_size}
        if method == "feature_ablation":
            mask = _like(cells, explained.start)
            maps.append(FeatureAblation(replay).attribute(explained.start, feature_mask=mask, **common)[0])
        else:
            shape, steps = _window(explained, window, strides)
            given = {"sliding_window_shapes": shape, "strides": steps}
            maps.append(Occlusion(replay).attribute(explained.start, **given, **common)[0])
    return torch.stack(maps).detach()


def _kernel_shap(
    explained: _Explained, base: Tensor, cells: Tensor, n: int, n_masks: int, repeats: int, batch_size: int, seed: int,
    kind: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from captum.attr import KernelShap

    replay = _Replay(explained)
    shap = KernelShap(replay)
    shap.interpretable_model = _LeastSquares()  # captum's own would need scikit-learn
    features = int(cells.max()) + 1
    samples = n_masks // max(repeats, 1)
    if repeats < 2 or samples < features + 2:
        raise WorkbenchError(
            f"{n_masks} samples are too few for Kernel SHAP of {features} segments in {repeats} repeats",
            hint=f"ask for n_masks={repeats * 2 * (features + 2)} or fewer segments",
        )
    mask = _like(cells, explained.start)
    rounds = []
    for turn in range(repeats):
        replay.given, replay.at = [], -1
        maps = []
        for k in range(n):
            replay.rewind()
            with torch.random.fork_rng():
                torch.manual_seed(seed * 1009 + turn)
                maps.append(
                    shap.attribute(
                        explained.start, base, target=k, feature_mask=mask, n_samples=samples,
                        perturbations_per_eval=batch_size,
                    )[0]
                )  # fmt: skip
        rounds.append(_reduced(torch.stack(maps).detach(), kind, cells, "mean"))
    several = torch.stack(rounds)
    return several.mean(0), several.std(0) / repeats**0.5


def _baseline(subject: ExplainedInput, explained: _Explained, baseline: Any) -> Tensor:
    start = explained.start
    if explained.where == "encoder":
        if isinstance(baseline, Tensor):
            return baseline.to(start).expand_as(start).contiguous()
        if baseline not in ("zero", "mean"):
            raise WorkbenchError(f"there is no baseline {baseline!r} for the encoder's output", hint="zero or mean")
        return (
            torch.zeros_like(start) if baseline == "zero" else start.mean(1, keepdim=True).expand_as(start).contiguous()
        )
    whole = subject.baseline_of(baseline)
    if subject.kind == "spectrogram":
        whole = subject.frames_first(whole)
    return whole[:, : start.shape[1]].contiguous()


def _segments(
    subject: ExplainedInput, where: str, segments: Any, n_segments: int, start: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, str]:
    """Segments over the map's positions, one map over the cells that are perturbed, and what a position is."""
    if where == "encoder" or subject.kind == "tokens":
        n = start.shape[1]
        if segments is not None:
            found = checked(segments, (n,))
        else:
            found = each(n) if subject.kind == "tokens" or n <= n_segments else runs(n, n_segments)
        return found[:1], found[0], "frames" if where == "encoder" else "tokens"
    picture = subject.picture()
    assert picture is not None
    if subject.kind == "image" and segments is None:
        rows, columns, _ = grid_of(subject)
        return each(rows * columns), patches(rows, columns, *picture.shape[1:])[0], "patches"
    if segments is None or isinstance(segments, str):
        found = superpixels(picture, (n_segments,), by_length=False)
    else:
        found = checked(segments, tuple(picture.shape[-2:]))
    return found[:1], found[0], "image" if subject.kind == "image" else "spectrogram"


def _like(cells: Tensor, start: Tensor) -> Tensor:
    """Segment numbers in the shape of the explained part."""
    cells = cells.to(start.device)
    if start.dim() == 4:
        return cells[None, None].expand_as(start)
    return (cells[None, :, None] if cells.dim() == 1 else cells[None]).expand_as(start)


def _window(explained: _Explained, window: Any, strides: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Occlusion's window and steps, in the shape of the explained part without its batch."""
    shape = explained.start.shape[1:]
    if window is None:
        if len(shape) == 3:
            rows, columns, _ = grid_of(explained.subject)
            window = (shape[1] // rows, shape[2] // columns)
        elif explained.where == "encoder" or explained.subject.kind == "tokens":
            window = (1,)
        else:
            window = (min(8, shape[0]), max(1, shape[1] // 4))
    steps = strides if strides is not None else window
    if len(shape) == 3:
        return (shape[0], *window), (shape[0], *steps)
    wide = (*window, *shape[len(window) :])
    return wide, (*steps, *shape[len(steps) :])


def _reduced(maps: Tensor, kind: str, cells: Tensor, how: str) -> Tensor:
    """Maps over positions [output token, position...] from maps over the explained part [output token, ...]."""
    if kind == "spectrogram":
        return maps
    if kind in ("frames", "tokens"):
        return maps.sum(-1) if how == "sum" else maps.mean(-1)
    pixels = maps.sum(1) if how == "sum" else maps.mean(1)
    if kind == "image":
        return pixels
    flat, index = pixels.flatten(1), cells.flatten().to(pixels.device)
    n = int(cells.max()) + 1
    summed = flat.new_zeros(len(flat), n).index_add_(1, index, flat)
    return summed if how == "sum" else summed / index.bincount(minlength=n)
