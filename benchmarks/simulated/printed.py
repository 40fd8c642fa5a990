"""Who prints which interval or p-value, and the rows of docs/simulations.md that show how it holds.

A test compares this with the package: a module that makes an interval or a p-value without a row here fails it.
"""

from __future__ import annotations

# Function of workbench.analysis.statistics, module below workbench -> what is printed, and its rows.
PRINTED: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("means_t", "analysis.importance.result"): ("`HeadImportance.interval`", ("mean",)),
    ("medians", "analysis.importance.result"): ("`HeadImportance.median`", ("median",)),
    ("means_t", "analysis.logits.result"): ("`LogitAttribution.interval`", ("mean",)),
    ("means_t", "analysis.head_scores.retrieval"): ("`RetrievalScores.interval`", ("mean",)),
    ("means_t", "analysis.head_scores.streaming"): ("`StreamingScores.interval`", ("mean",)),
    ("means_t", "analysis.eviction.result"): ("`Eviction.interval`", ("mean",)),
    ("mean_t", "analysis.grounding.pointing"): ("`Pointing.table`, weights", ("mean",)),
    ("proportions", "analysis.grounding.pointing"): ("`Pointing.table`, hits", ("proportion",)),
    ("mean_t", "investigator.analyses"): ("`Investigation`, sentences of findings", ("mean",)),
    ("means_t", "investigator.analyses"): ("`Investigation`, which heads it takes", ("mean",)),
    ("proportions", "investigator.analyses"): ("`Investigation`, accuracies", ("proportion",)),
    ("mean_t", "mechanisms.dualformer.study"): ("lengths of Dualformer's traces", ("mean",)),
    ("proportions", "mechanisms.dualformer.study"): ("Dualformer's rates", ("proportion",)),
    ("mean_t", "mechanisms.screens.card"): ("claims of papers that look and remember", ("mean",)),
    ("means_t", "mechanisms.matvlm.maps"): ("`HybridMaps.beyond`, `losses`", ("mean",)),
    ("means_t", "views.head_atlas.numbers"): ("`views.head_atlas` of a capture", ("mean",)),
    ("means_t", "analysis.profile.result"): (
        "`AttentionProfile.interval`, `mass_interval`",
        ("mean",),
    ),
    ("means_t", "analysis.cross_attention.result"): (
        "`CrossAttentionSaliency.interval`, `areas`, `size_table`",
        ("mean",),
    ),
    ("jackknife_t", "analysis.cross_attention.result"): ("`CrossAttentionSaliency.corpus_areas`", ("corpus area",)),
    ("mean_t", "analysis.circuits.faithfulness"): ("`Faithfulness.lost`, `in_metric`", ("mean",)),
    ("means_t", "analysis.circuits.faithfulness_curve"): ("`FaithfulnessCurve.in_metric`", ("mean",)),
    ("mean_t", "analysis.circuits.shares"): ("the `denominator` of shares", ("mean",)),
    ("share_interval", "analysis.circuits.shares"): (
        "`Faithfulness.interval`, minimality and incompleteness, `FaithfulnessCurve.intervals`, `cpr_interval`, "
        "`CircuitOverlap.cross_faithfulness`",
        ("share", "size of a share", "area under shares"),
    ),
    ("share_intervals", "analysis.circuits.patching.results"): (
        "`HeadPatching.interval`, `LayerPatching.interval`",
        ("share",),
    ),
    ("proportions", "analysis.circuits.repair"): ("`Repair.table`, accuracies", ("proportion",)),
    ("mean_t", "analysis.circuits.repair"): ("`Repair.change`, changes of attention in `Repair.table`", ("mean",)),
    ("drawn_t", "analysis.circuits.overlap"): (
        "`CircuitOverlap.intervals`, `stages`, `curve`",
        ("overlap of heads", "overlap of edges"),
    ),
    ("middle", "analysis.circuits.overlap"): (
        "what chance gives: `CircuitOverlap.curve`",
        ("edges: renamed", "heads: renamed"),
    ),
    ("middle", "analysis.circuits.overlap_result"): (
        "what chance gives: `CircuitOverlap.table`",
        ("edges: renamed", "heads: renamed"),
    ),
    ("among_draws", "analysis.circuits.overlap"): (
        "`CircuitOverlap.p_value`, `views.overlap_matrix`",
        ("edges: renamed", "heads: renamed", "nodes: renamed"),
    ),
    ("among_draws", "analysis.circuits.overlap_null"): ("`CircuitOverlap.p_beyond_nodes`", ("edges: degrees",)),
    ("jackknife_t", "analysis.conditioning.curves"): (
        "`Capacity.low`, `high`, `n_low`, `n_high`",
        ("capacity curve", "n*"),
    ),
    ("rank_correlation", "analysis.conditioning.with_importance"): ("`Capacity.correlation`", ("rank correlation",)),
    ("means_t", "analysis.conditioning.experiments"): (
        "`Conditioning.low`, `high`, `contrast_low`, `contrast_high`",
        ("mean",),
    ),
    ("jackknife_t", "analysis.conditioning.experiments"): ("`Conditioning.correlation`", ("correlation of curves",)),
}
OTHERS: dict[str, tuple[str, ...]] = {  # printed without an interval, and simulated all the same
    "`Stability`: between disjoint halves and redrawn prompts": ("stability",),
    "`Saliency`, `HeadPatching`, `LayerPatching` and `simulate_stack`: standard errors": ("standard error",),
}
