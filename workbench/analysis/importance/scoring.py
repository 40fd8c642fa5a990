"""`head_importance`: which heads a model needs, by ablations and by gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.importance.gradients import gate_gradients
from workbench.analysis.importance.partial_pruning import Grid, find_grid, named_parts, part_variants
from workbench.analysis.importance.result import GRADIENTS, HeadImportance
from workbench.errors import InterventionError, WorkbenchError, expect, nearest
from workbench.hooks.heads import parse_heads
from workbench.hooks.sites import Site
from workbench.metrics import Metric, as_metrics
from workbench.session.ablations import WITHOUT_TWINS
from workbench.session.workbench import Workbench
from workbench.sweep.inputs import check_batches, size_of
from workbench.sweep.result import Sweep
from workbench.sweep.run import run_sweep
from workbench.sweep.variants import Variant
from workbench.workers.engine import Engine, opened
from workbench.workers.protocol import Job

METHODS = (*WITHOUT_TWINS, "keep_only", *GRADIENTS)
_NONE = "none of"  # starts the label of a variant without any head of a site


def head_importance(
    wb: Workbench,
    batches: Iterable[Mapping[str, Any]],
    metric: Any = "loss",
    methods: str | Sequence[str] = ("ablation", "gradient"),
    *,
    heads: Any = None,
    partial_pruning: Any = None,
    grid: Grid | None = None,
    prefix: int | None = None,
    renormalise: bool = False,
    reference: Any = None,
    normalise: bool = False,
    seed: int = 0,
    level: float = 0.95,
    resume: Any = None,
    batched: bool = True,
    resumed: bool = True,
    memory: int = 2 << 30,
    engine: str | Engine = "local",
    progress: bool = True,
) -> HeadImportance:
    """How much a model needs each of its heads, example by example.

    Args:
        wb: the model.
        batches: dicts of model inputs; with `labels`, or a task's batches, where the measure needs the right answers.
        metric: names of `workbench.metrics.METRICS` such as "loss", "logit_diff" or "kl_divergence", a
            `metric(output, batch)` that gives [batch] and is higher for a better model, a `Metric`, or several.
        methods: what is done to a head.
            "ablation" or "zero", "mean", "mean_positional", "resample": its output is replaced; how much worse is the
                model?
            "keep_only": all other heads of its site are zeroed; how much better is that than zeroing them all?
            "gradient": ∂M/∂ξ of a gate ξ on the head at 1, the first-order estimate of "zero".
            "gradient_magnitude": its absolute value, averaged over examples (Michel et al. 2019, arXiv 1905.10650).
            "attention_gradient": Σ_ij |A_ij ∂M/∂A_ij|.
        heads: which heads; all by default.
        partial_pruning: what a head loses in place of all of it: "cls" or "patches", the query rows of either;
            ("inside", k) or ("outside", k), what it reads from keys up to k hops away or beyond; or query positions. A
            list of these, or a dict by name; each is a further method.
        grid: rows and columns of patches for hops; found from the model and its images by default.
        prefix: tokens before the patches; as many as there are more than patches by default.
        renormalise: whether hops that stay take over the weight of those that go.
        reference: where means and resampled outputs come from; the batches by default.
        normalise: divide each layer's gradient scores by their Euclidean length, as Michel et al. do.
        seed: of resampling. level: of the intervals of means and medians over examples.
        resume, batched, resumed, memory, engine, progress: as in `workbench.run_sweep`.

    Raises:
        WorkbenchError: bad batches or metrics, an unknown method, no method that has a score.
        InterventionError: no such head, a grid that does not match the tokens, a model that is not deterministic.

    >>> import workbench
    >>> layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
    >>> wb = workbench.attach(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    >>> batches = [{"src": torch.randn(3, 5, 16)}]
    >>> found = head_importance(wb, batches, metric=lambda y, batch: y.mean((1, 2)), progress=False)
    >>> found.score("zero").shape, len(found.ranking("gradient"))
    (torch.Size([8]), 8)
    """
    expect(Workbench, wb=wb)
    measures = as_metrics(metric)
    named = _methods(methods)
    several = check_batches(wb.model, batches)
    wb.check_ready()
    chosen = _choose(wb, heads, several[0])
    if not chosen:
        raise InterventionError(
            "the model has no heads that are read here",
            hint="wb.sites lists its mixers, read and unread; of recurrent ones name heads: heads=(0, 1)",
        )
    labels = _labels(chosen)
    of_parts = named_parts(partial_pruning)
    for name in of_parts:
        if name in METHODS:
            raise WorkbenchError(f'a part cannot be called "{name}", which is a method')
    grid = find_grid(wb.model, several[0]) if grid is None and of_parts else grid
    variants: dict[str, list[Variant]] = {}
    keyed = list(zip(labels, [(site.name, head) for site, head in chosen], strict=True))
    for method in named:
        if method in WITHOUT_TWINS:
            variants[method] = [Variant(key, how=method, label=f"{method} {label}") for label, key in keyed]
        elif method == "keep_only":
            variants[method] = _keep_only(wb, chosen, labels)
    for name, part in of_parts.items():
        variants[name] = part_variants(part, name, keyed, grid, prefix, renormalise)
    scores: dict[tuple[str, str], Tensor] = {}
    clean: dict[str, Tensor] = {}
    skipped: dict[tuple[str, str], str] = {}
    swept: Sweep | None = None
    gradients = [method for method in named if method in GRADIENTS]
    with opened(engine, wb) as workers:
        for name, measure in measures.items():  # first: what has no gradient is told before the long sweep
            if gradients and (measure.against_clean or not measure.differentiable):
                why = "it is smallest at the unedited model" if measure.against_clean else "it has no gradient"
                skipped.update({(method, name): why for method in gradients})
            elif gradients:
                found, values = _gradients(wb, chosen, several, measure, gradients, workers, progress)
                scores.update({(method, name): found[method] for method in gradients})
                clean[name] = values
        if variants:
            flat = [variant for several_variants in variants.values() for variant in several_variants]
            swept = run_sweep(
                wb, flat, several, measures, reference=reference, batched=batched, resumed=resumed, memory=memory,
                resume=resume, seed=seed, engine=workers, progress=progress,
            )  # fmt: skip
            harms = _harms(swept, measures)
            clean |= {name: _clean(swept.clean[j], measures[name]) for j, name in enumerate(swept.metrics)}
            for method in variants:
                for j, name in enumerate(measures):
                    scores[method, name] = _scores(method, harms, j, chosen, labels)
    if not scores:
        raise WorkbenchError(
            "no method has a score", hint="; ".join(f"{m} of {n}: {w}" for (m, n), w in skipped.items())
        )
    return HeadImportance(
        heads=tuple(labels),
        sites=tuple(site.alias for site, _ in chosen),
        layers=tuple(site.layer for site, _ in chosen),
        numbers=tuple(head for _, head in chosen),
        kinds=tuple(site.kind for site, _ in chosen),
        methods=(*named, *of_parts),
        measures=tuple(measures),
        scores={key: scores[key] for method in (*named, *of_parts) for key in scores if key[0] == method},
        clean=clean,
        skipped=skipped,
        higher_is_better={name: measure.higher_is_better for name, measure in measures.items()},
        normalised=normalise,
        grid=grid,
        seed=seed,
        level=level,
        mode="" if swept is None else swept.mode,
        provenance=wb.provenance()
        | {"examples": sum(map(size_of, several)), "batches": len(several)}
        | {key: value for key, value in (swept.provenance if swept else {}).items() if key == "resampling"},
    )


def _methods(methods: str | Sequence[str]) -> tuple[str, ...]:
    several = [methods] if isinstance(methods, str) else list(methods)
    found = ["zero" if method == "ablation" else method for method in several]
    for method in found:
        if method not in METHODS:
            raise WorkbenchError(f'there is no method "{method}"', hint=nearest(str(method), METHODS, "method"))
    return tuple(dict.fromkeys(found))


def _choose(wb: Workbench, heads: Any, batch: Mapping[str, Any]) -> list[tuple[Site, int]]:
    """The heads with their sites; those whose sizes are not known yet are found by running a batch."""
    if any(site.n_heads is None for site in wb.sites):
        with torch.no_grad(), wb.capture(statistics=(), queries_keys=False):
            wb.model(**batch)
    if heads is None:
        return [(site, head) for site in wb.sites if site.kind != "state" for head in range(site.n_heads or 0)]
    parsed = parse_heads(wb.sites, heads)
    return [(wb.sites.find(name), head) for name, several in parsed.items() for head in several]


def _labels(chosen: Sequence[tuple[Site, int]]) -> list[str]:
    """L9H6, or "decoder.3.cross_attn H6" in a model where that names several heads."""
    sites = dict.fromkeys(site for site, _ in chosen)
    plain = len({site.layer for site in sites}) == len(sites)
    return [site.label(head) if plain else f"{site.alias} H{head}" for site, head in chosen]


def _keep_only(wb: Workbench, chosen: Sequence[tuple[Site, int]], labels: Sequence[str]) -> list[Variant]:
    found = []
    for site in dict.fromkeys(site for site, _ in chosen):
        every = [(site.name, head) for head in range(site.n_heads or 0)]
        found.append(Variant(every, label=f"{_NONE} {site.alias}"))
    for (site, head), label in zip(chosen, labels, strict=True):
        others = [(site.name, other) for other in range(site.n_heads or 0) if other != head]
        if others:
            found.append(Variant(others, label=f"keep_only {label}"))
    return found


def _harms(swept: Sweep, measures: Mapping[str, Metric]) -> dict[str, Tensor]:
    """By variant, [measure, example] of how much worse it makes the model."""
    several = list(measures.values())
    return {
        label: torch.stack([measure.harm(swept.values[i, j], swept.clean[j]) for j, measure in enumerate(several)])
        for i, label in enumerate(swept.variants)
    }


def _clean(values: Tensor, measure: Metric) -> Tensor:
    return torch.zeros_like(values) if measure.against_clean else values


def _scores(
    method: str, harms: Mapping[str, Tensor], measure: int, chosen: Sequence[tuple[Site, int]], labels: Sequence[str]
) -> Tensor:
    """[head, example] of a method that the sweep ran."""
    if method != "keep_only":
        return torch.stack([harms[f"{method} {label}"][measure] for label in labels])
    rows = []
    for (site, _), label in zip(chosen, labels, strict=True):
        without = harms[f"{_NONE} {site.alias}"][measure]
        alone = harms.get(f"keep_only {label}")  # a site's only head: nothing is taken away
        rows.append(without - (torch.zeros_like(without) if alone is None else alone[measure]))
    return torch.stack(rows)


def _gradients(
    wb: Workbench,
    chosen: Sequence[tuple[Site, int]],
    batches: Sequence[Mapping[str, Any]],
    measure: Metric,
    methods: Sequence[str],
    workers: Engine,
    progress: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """[head, example] of the gradient methods, and the measure [example]."""
    from tqdm.auto import tqdm

    sites = list(dict.fromkeys(site for site, _ in chosen))
    parts: dict[str, list[Tensor]] = {method: [] for method in methods}
    values = []
    here = partial(gate_gradients, wb, sites, metric=measure, attention="attention_gradient" in methods)
    some = workers.over(Job(wb, here, batches))
    for batch, found in tqdm(some, total=len(batches), desc=f"gradient of {measure.name}", disable=not progress):
        value, gates, attention = found
        values.append(value)
        silent = next((site for site in sites if site.name not in gates), None)
        if silent is not None:
            raise InterventionError("the model does not reach the site", site=silent.name)
        gate = torch.stack([gates[site.name][:, head] for site, head in chosen])
        if gate.shape[1] != size_of(batch):
            raise InterventionError(
                "heads see more or fewer examples than the batch has (windows?), so that no gradient is one example's",
                site=sites[0].name,
                hint="leave the gradient methods out",
            )
        if not bool(gate.isfinite().all()) or not bool(value.isfinite().all()):
            raise WorkbenchError(f'the metric "{measure.name}" or its gradient is not finite')
        for method in methods:
            if method == "attention_gradient":
                parts[method].append(torch.stack([attention[site.name][:, head] for site, head in chosen]))
            else:
                # Taking a head away lowers its gate by one: to first order M falls by ∂M/∂ξ.
                parts[method].append(gate.abs() if method == "gradient_magnitude" else measure.sign * gate)
    return {method: torch.cat(found, 1) for method, found in parts.items()}, torch.cat(values)
