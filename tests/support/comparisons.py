"""Results of saliency and cross-attention with known maps, filled by hand."""

from __future__ import annotations

from typing import Any

import torch

from workbench.analysis.cross_attention import CrossAttentionSaliency
from workbench.analysis.cross_attention.alignment import align, disagreement
from workbench.analysis.cross_attention.correlate import correlate
from workbench.analysis.cross_attention.result import MEASURES, ORDERS, SCORES
from workbench.analysis.saliency import Saliency

TOKENS = ("one", "two", "<end>")


def saliency(kind: str = "spectrogram", n: int = 3, **changes: Any) -> Saliency:
    """Random scores of a kind."""
    shapes = {"spectrogram": (40, 8), "frames": (20,), "tokens": (5,), "patches": (6,), "image": (4, 6)}
    random = torch.Generator().manual_seed(1)
    scores = torch.rand(n, *shapes[kind], generator=random) + 0.1
    held: dict[str, Any] = {
        "scores": scores,
        "standard_error": 0.1 * scores,
        "n_masks": 300,
        "method": "spes",
        "at": "encoder" if kind == "frames" else "input",
        "kind": kind,
        "score": "kl",
        "baseline": "zero",
        "p": 0.5,
        "exact": False,
        "signed": False,
        "partial": False,
        "stopped": "budget",
        "target_ids": tuple(range(n)),
        "target_texts": (TOKENS * n)[:n],
        "special": tuple(i == n - 1 for i in range(n)),
        "contrast_ids": (),
        "contrast_texts": (),
        "visible": (),
        "prompt_ids": (1,),
        "picture": torch.rand(40, 8, generator=random) if kind == "spectrogram" else None,
        "position_texts": tuple(f" in{i}" for i in range(5)) if kind == "tokens" else (),
        "position_words": (),
        "grid": (2, 3) if kind == "patches" else None,
        "length": shapes[kind][0],
        "seconds_per_position": {"spectrogram": 0.01, "frames": 0.02}.get(kind),
        "segments": (),
        "token_scores": None,
        "token_error": None,
        "seed": 0,
        "details": {},
        "state": {},
        "provenance": {"model_name": "small"},
    }
    return Saliency(**(held | changes))


def comparison(utterances: int = 3, *, kind: str = "spectrogram", curves: bool = True) -> CrossAttentionSaliency:
    """Two layers of two heads; head L1H0 attends where input saliency lies."""
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    names = [f"L{a}H{b}" for a, b in heads] + ["L0", "L1", "all", "alignment heads"]
    random = torch.Generator().manual_seed(0)
    positions = 20 if kind == "spectrogram" else 5
    found = torch.full((utterances, len(names), 2, 2), torch.nan, dtype=torch.float64)
    maps, aligned = [], []
    for u in range(utterances):
        own = torch.rand(3, positions, generator=random)
        theirs = own + 0.3 * torch.rand(3, positions, generator=random)
        attention = torch.rand(2, 2, 3, positions, generator=random)
        attention[1, 0] = own + 0.2 * attention[1, 0]
        attention /= attention.sum(-1, keepdim=True)
        each = [attention[a, b] for a, b in heads]
        each += [attention[0].mean(0), attention[1].mean(0), attention.mean((0, 1)), attention[1, 0]]
        for a, rows in enumerate(each):
            for s, other in enumerate((own, theirs)):
                for m, measure in enumerate(MEASURES):
                    found[u, a, s, m] = correlate(rows[:2], other[:2], measure=measure)
        cells = own.repeat_interleave(2, 1)[..., None] * torch.linspace(0.2, 1, 8) if kind == "spectrogram" else own
        maps.append(
            {
                "name": f"clip {u}",
                "target_texts": TOKENS,
                "special": (False, False, True),
                "picture": torch.rand(40, 8, generator=random) if kind == "spectrogram" else None,
                "kind": kind,
                "grid": None,
                "position_texts": () if kind == "spectrogram" else tuple(f" in{i}" for i in range(5)),
                "input_saliency": cells,
                "input_error": 0.1 * cells,
                "pooled_input_saliency": own,
                "encoder_saliency": theirs,
                "encoder_error": 0.1 * theirs,
                "attention": attention,
                "layers": (0, 1),
                "seconds_per_position": 0.02 if kind == "spectrogram" else None,
                "seconds_per_input_position": 0.01 if kind == "spectrogram" else None,
                "n_masks": (300, 300),
                "audio": torch.sin(torch.arange(3200) / 8) if kind == "spectrogram" else None,
                "sampling_rate": 8000 if kind == "spectrogram" else None,
            }
        )
        a, b = align(each[-1][:2]), align(own[:2])
        aligned.append(
            {
                "token": (0, 1),
                "token_text": TOKENS[:2],
                "attention": a,
                "saliency": b,
                "disagreement": disagreement(a, b),
            }
        )
    fractions = torch.linspace(0, 1, 5, dtype=torch.float64)
    orders = ORDERS if curves else ()
    falling = -4 * fractions[:, None] * torch.tensor([1.0, 0.1, float("nan")], dtype=torch.float64)
    rates = torch.linspace(1, 0.5, len(ORDERS), dtype=torch.float64)[: len(orders), None, None, None]
    return CrossAttentionSaliency(
        aggregates=tuple(names),
        kinds=("head",) * 4 + ("layer",) * 2 + ("all", "alignment heads"),
        layers=(0, 0, 1, 1, 0, 1, None, None),
        heads=(0, 1, 0, 1, None, None, None, None),
        saliencies=("input", "encoder_output"),
        measures=MEASURES,
        correlations=found,
        pooled=found.mean(0),
        between=found[:, 0, 0],
        undefined=(),
        skipped=(),
        pooling="max",
        normalise="token",
        special_tokens=False,
        method="spes",
        utterances=tuple(f"clip {u}" for u in range(utterances)),
        hypotheses=("one two",) * utterances,
        references=("one two",) * utterances,
        orders=orders,
        fractions=fractions,
        scores=SCORES,
        curves=(rates * falling).expand(utterances, len(orders), 2, 5, 3),
        reference_errors=torch.full((utterances, len(orders), 2, 5), torch.nan, dtype=torch.float64),
        reference_words=torch.full((utterances,), 2),
        thresholds=torch.linspace(0, 1, 21, dtype=torch.float64),
        sizes=torch.ones(utterances, len(orders), 21, dtype=torch.float64),
        maps=tuple(maps),
        alignments=tuple(aligned),
        alignment_heads=((1, 0),),
        seed=0,
        level=0.95,
        provenance={"model_name": "small"},
    )  # fmt: skip
