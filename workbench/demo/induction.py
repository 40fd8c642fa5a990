"""First section of the demo: an induction head, found, on the prompt and at the row that show it best."""

from __future__ import annotations

import torch

from workbench import attach, models, tasks, views
from workbench.report import Report

_PROMPTS = 8
_SEVERAL = 5  # words that were there before


def add(report: Report, seed: int) -> None:
    """Add the head that looks most at what followed an earlier copy, with such a row chosen, and then all heads."""
    model, tokenizer = models.load("demo-lm")
    caps, strengths, logits = [], [], []
    with attach(model, tokenizer) as wb:
        for example in tasks.induction(_PROMPTS, seed=seed):
            with torch.no_grad(), wb.capture(["induction", "entropy", "sink", "previous"]) as cap:
                logits.append(model(**wb.tokenize(example.prompt)).logits[0])
            caps.append(cap)
            strengths.append(cap.stack("induction")[:, 0].nanmean(-1))  # over the queries with an earlier copy
    # Of the prompts in which several words were there before, the one on which a head does it best.
    again = [int(cap.stack("induction")[0, 0, 0].isfinite().sum()) for cap in caps]
    several = [i for i in range(_PROMPTS) if again[i] >= min(_SEVERAL, max(again))]
    best = max(several, key=lambda i: float(strengths[i].max()))
    strength = strengths[best]
    site, head = divmod(int(strength.argmax()), strength.shape[1])
    found = caps[best][site]
    query = int(found.induction[0, head].nan_to_num(-1.0).argmax())
    texts = [text.strip() for text in (caps[best].query_tokens(found.site.name) or [[]])[0]]
    after = [key for key in range(1, query + 1) if texts[key - 1] == texts[query]]  # what followed an earlier copy
    row = found.pattern.rows(query, heads=[head])[0, 0, 0]
    key = max(after, key=lambda each: float(row[each]))
    says = tokenizer.decode(int(logits[best][query].argmax())).strip()
    label = f"L{found.site.layer}H{head}"
    chosen = views.SharedSelection()
    chosen.select(layer=found.site.layer, heads=(head,), query=query, key=key)
    report.add(
        views.attention_pattern(caps[best], site=site, heads=[head], selection=chosen),
        title=f"An induction head, found: {label}",
        note=(
            "Each row is a word, and its strongest cells are the words that it looks at. "
            f"In the chosen row, **{texts[query]}** has been there before, and {label} looks at the word that followed "
            f"it then, **{texts[key]}**, with a weight of {float(row[key]):.2f}; the model expects **{says}** next. "
            f"Over all words of this prompt that were there before, {float(strength[site, head]):.2f} of its weight "
            "lies so, more than of any other head's."
        ),
    )
    report.add(
        views.head_gallery(caps[best], title="All heads", selection=chosen).set_state(order="Induction"),
        title="All heads on the same prompt",
        note="From the one that looks most at what followed an earlier copy; press a head, and every view shows it.",
    )
