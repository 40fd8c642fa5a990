"""Views of heads over a corpus: their scores on the atlas, what varies, and where they look hardest."""

from __future__ import annotations

from workbench.analysis.corpus import CorpusAtlas
from workbench.analysis.corpus.measuring import MEANINGS, SCORES
from workbench.views.base.registry import register
from workbench.views.base.view import View
from workbench.views.head_atlas import head_atlas
from workbench.views.table import Column, table

_DECILES = (10, 50, 90)


def _view_of_corpus_atlas(found: CorpusAtlas) -> View:
    """Every head on the atlas, a metric for each score."""
    frame = found.table
    shown = [*SCORES, *(["copying"] if frame["copying"].notna().any() else [])]
    unknown = found.n_unknown / found.n_tokens
    of_them = f", {unknown:.0%} of which stand for words that the tokenizer does not know" if unknown > 0.005 else ""
    state = "" if found.complete else " The corpus was not read to its end."
    return head_atlas(
        {name: frame[["layer", "head", name]].rename(columns={name: "value"}) for name in shown},
        title="Heads over a corpus", unit="share", meanings=MEANINGS,
        caption=(
            f"Means over {len(found.windows):,} windows of {found.length} tokens, {found.n_tokens:,} tokens of text"
            f"{of_them}. Streaming caches keep {found.sinks} sinks and {found.recent} recent keys.{state}"
        ),
        provenance=found.provenance,
    )  # fmt: skip


def _more_of_corpus_atlas(found: CorpusAtlas) -> list[View]:
    """What varies within the corpus, and the strongest looks of each head."""
    frame = found.table
    names = [f"L{layer}H{head}" for layer, head in zip(found.layers, found.numbers, strict=True)]
    columns = [
        Column(f"{of} {share} %", frame[f"{of} {share} %"].tolist(), group=f"{of} ({unit})")
        for of, unit in (("entropy", "nats"), ("distance", "tokens"))
        for share in _DECILES
    ]
    columns += [
        Column(
            f"{name} drift",
            frame[f"{name} drift"].tolist(),
            group="second half − first",
            said=[f"standard error {error:.2g}" for error in frame[f"{name} drift error"]],
        )
        for name in SCORES
    ]
    varies = table(
        names, columns, of="head", title="How much heads vary",
        caption=(
            "What 10, 50 and 90 % of the positions lie below, and by how much each score is larger in the second half "
            "of the corpus; pointing at that tells its standard error, as if windows were drawn at random."
        ),
        provenance=found.provenance,
    )  # fmt: skip
    looks = found.examples
    if not len(looks):
        return [varies]
    number = looks.groupby(["layer", "head"]).cumcount() + 1
    rows = [f"L{row.layer}H{row.head} · {i}" for row, i in zip(looks.itertuples(), number, strict=True)]
    examples = table(
        rows,
        [Column("weight", looks["weight"].tolist()), Column("where", looks["text"].tolist())],
        of="look", title="Strongest looks",
        caption="The largest weights on a key that is neither the first nor the query itself, one per window; both are "
        "marked.",
        provenance=found.provenance,
    )  # fmt: skip
    return [varies, examples]


register(CorpusAtlas, _view_of_corpus_atlas, _more_of_corpus_atlas)
