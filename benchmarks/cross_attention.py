"""Does Whisper base's cross-attention explain? Attention against saliency, per head, per layer and averaged.

Voice samples of Debian's alsa-utils and sentences spoken by espeak-ng are explained by SPES at the input and by the
same estimator at the encoder's output; every attention map is compared with both. Deletion and insertion curves for
attention, saliency and random order. The paper's figures, for its own Conformer models, stand beside. Prints; writes
its section of docs/benchmarks.md with --write.

    python benchmarks/cross_attention.py [--masks 240] [--encoder-masks 2400] [--keep FOLDER] [--write]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from shared.measuring import machine, say, table, write_section
from shared.speech import ALIGNMENT_HEADS, PROMPT, utterances, whisper

import workbench
from workbench import CrossAttentionSaliency, Saliency

HEADING = "Does Whisper base's cross-attention explain?"
PAPER = """Papi et al. 2025 (arXiv 2509.18010) report for their own models (Conformer encoders, 20,000 masks,
EuroParl-ST): Pearson with input saliency up to 0.588 for the base model (English ASR) and 0.639 for the multilingual
ones, last decoder layers best, single heads weak, averages over heads and then layers better; with encoder-output
saliency 0.03 to 0.18 more; 52 to 75 % of encoder-output saliency covered; deletion (area under WER, base) 41.2 for
attention, 57.04 for pooled and 91.3 for full-resolution saliency. Neither model, data nor number of masks are the same
here: the figures are no reproduction."""


def bounds(mean: float | None, low: float | None, high: float | None) -> str:
    """A mean with its interval."""
    return "undefined" if mean is None or low is None or high is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def aggregates(found: CrossAttentionSaliency, other: CrossAttentionSaliency) -> str:
    """One row per layer, head index and average."""
    rows = []
    held, whole = found.table, other.table
    for name, kind in zip(found.aggregates, found.kinds, strict=True):
        if kind == "head":
            continue
        cells = [name, kind]
        for frame, saliency, measure in (
            (held, "input", "pearson"), (held, "encoder_output", "pearson"), (held, "input", "spearman"),
            (held, "encoder_output", "spearman"), (whole, "input", "pearson"), (whole, "encoder_output", "pearson"),
        ):  # fmt: skip
            mask = (frame["aggregate"] == name) & (frame["saliency"] == saliency) & (frame["measure"] == measure)
            row = frame[mask].iloc[0]
            cells.append(bounds(row["mean"], row["low"], row["high"]))
        rows.append(cells)
    header = [
        "attention",
        "kind",
        "input ρ",
        "encoder ρ",
        "input rank ρ",
        "encoder rank ρ",
        "input ρ, all",
        "encoder ρ, all",
    ]
    return table(header, rows)


def heads(found: CrossAttentionSaliency, saliency: str) -> str:
    """Layer by head, published alignment heads marked."""
    values, interval = found.by_head(saliency), found.interval(saliency)
    n_heads = values.shape[1]
    rows = []
    for layer, row in enumerate(values.tolist()):
        cells = []
        for head, value in enumerate(row):
            low, high = interval[layer * n_heads + head].tolist()
            mark = "*" if (layer, head) in ALIGNMENT_HEADS else ""
            cells.append(f"{value:.2f} [{low:.2f}, {high:.2f}]{mark}")
        rows.append([str(layer), *cells])
    return table(["layer", *(f"H{head}" for head in range(n_heads))], rows)


def curves(found: CrossAttentionSaliency) -> str:
    """Areas under the curves, and the word error rate per fraction."""
    areas = found.areas
    if not found.orders:
        return "(left out)"
    rows = []
    for order in found.orders:
        cells = [order]
        for curve, score in (
            ("deletion", "wer"),
            ("deletion", "probability"),
            ("insertion", "wer"),
            ("insertion", "probability"),
        ):
            row = areas[(areas["order"] == order) & (areas["curve"] == curve) & (areas["score"] == score)].iloc[0]
            cells.append(bounds(row["area"], row["low"], row["high"]))
        size = found.size_table
        cells.append(f"{size[size['order'] == order]['size'].iloc[0]:.1f}")
        rows.append(cells)
    steps = [
        [order, *(f"{value:.0f}" for value in found.curves[:, o, 0, :, 2].mean(0).tolist())]
        for o, order in enumerate(found.orders)
    ]
    header = ["order", "deletion WER", "deletion p", "insertion WER", "insertion p", "size"]
    shares = [f"{fraction:.0%}" for fraction in found.fractions.tolist()]
    return table(header, rows) + "\n\nWER (%) by share of cells removed:\n\n" + table(["order", *shares], steps)


def explain(wb: workbench.Workbench, one: dict[str, object], options: argparse.Namespace) -> tuple[Saliency, Saliency]:
    """Saliency of the input and of the encoder's output; from the folder of `--keep` where it is there."""
    stem = f"{one['name']}".split(":")[0].replace(" ", "-") + f"-{len(str(one['name']))}-{options.seed}"
    files = [options.keep / f"{stem}-{n}.safetensors" for n in ("input", "encoder")] if options.keep else []
    if files and all(file.exists() for file in files):
        first, second = (Saliency.load(file) for file in files)
        return first, second
    common = {"prompt": PROMPT, "seed": options.seed, "progress": False}
    began = time.perf_counter()
    first = workbench.saliency(
        wb,
        one,
        "spes",
        n_masks=options.masks,
        granularities=options.granularities,
        baseline="mean",
        batch_size=4,
        **common,
    )
    second = workbench.saliency(wb, one, "encoder_output", n_masks=options.encoder_masks, batch_size=32, **common)
    for file, found in zip(files, (first, second), strict=False):
        found.save(file)
    say(
        f"{one['name']}: {''.join(first.target_texts)!r}, {first.positions} frames, "
        f"segments {first.details['segments']}, "
        f"noise {first.noise.median():.2f} and {second.noise.median():.2f}, {time.perf_counter() - began:.0f} s"
    )
    return first, second


def main() -> None:
    """Explain, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=240)
    parser.add_argument("--encoder-masks", type=int, default=2400)
    parser.add_argument("--utterances", type=int, nargs="+", default=list(range(6)), help="their numbers, 0 to 6")
    parser.add_argument("--granularities", type=int, nargs="+", default=[80, 120, 160])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--window", type=int, default=30, help="seconds that the encoder sees")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="leave the model in float32, not in bfloat16 autocast")
    parser.add_argument("--keep", type=Path, help="a folder that keeps maps for later runs with the same options")
    parser.add_argument("--explain-only", action="store_true", help="keep the maps, compare nothing")
    parser.add_argument("--no-curves", action="store_true", help="leave out deletion and insertion")
    parser.add_argument("--write", action="store_true", help="write the section of docs/benchmarks.md")
    options = parser.parse_args()
    model, tokenizer, extractor = whisper(options.window)
    inputs = [one for i, one in enumerate(utterances(extractor)) if i in options.utterances]
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=not options.float32),
        workbench.attach(model, tokenizer) as wb,
    ):
        pairs = [explain(wb, one, options) for one in inputs]
        if options.explain_only:
            return
        given = [one | {"labels": torch.tensor(pair[0].target_ids)} for one, pair in zip(inputs, pairs, strict=True)]
        common = {"prompt": PROMPT, "alignment_heads": ALIGNMENT_HEADS, "seed": options.seed}
        shown = {"orders": ()} if options.no_curves else {"fractions": options.fractions}
        found = workbench.cross_attention_saliency(wb, given, pairs, baseline="mean", **shown, batch_size=6, **common)
        other = workbench.cross_attention_saliency(wb, given, pairs, normalise="all", orders=(), **common)
    arithmetic = "float32" if options.float32 else "bfloat16 autocast"
    noise = torch.cat([pair[0].noise for pair in pairs]).median(), torch.cat([pair[1].noise for pair in pairs]).median()
    disagreement = torch.cat([one["disagreement"] for one in found.alignments]).median()
    seconds = found.maps[0]["seconds_per_position"] or 0.02
    coverage = found.coverage.set_index("aggregate")
    lines = [f"{i}. {n}: “{h}”" for i, (n, h) in enumerate(zip(found.utterances, found.hypotheses, strict=True), 1)]
    text = f"""`python benchmarks/cross_attention.py`: {found.n_utterances} utterances, {arithmetic}, an encoder window
of {options.window} s; {options.masks} masks at the input (superpixel granularities {options.granularities}, baseline
the mean of the spectrogram) and {options.encoder_masks} at the encoder's output (frames, zero). Median noise of the
maps (standard error over spread): {noise[0]:.2f} and {noise[1]:.2f}. Mean over utterances with 95 % t
intervals; maps standardised per token (“all”: over all cells); the end token and padding left out. Heard:

{chr(10).join(lines)}

{aggregates(found, other)}

Single heads against input saliency (Pearson; * published alignment heads):

{heads(found, "input")}

Single heads against encoder-output saliency:

{heads(found, "encoder_output")}

Best single map: {found.best}. Averaged over all heads, {coverage.loc["all", "share"]:.2f} of the correlation with
encoder-output saliency is left at the input (difference {coverage.loc["all", "difference"]:.2f}); input and
encoder-output saliency correlate by {found.between[:, 0].nanmean():.2f}. Deletion and insertion, area under the mean
curve (WER against the unperturbed hypothesis in percent, a mean over utterances; p the mean probability of its tokens),
and size (of the cells of all tokens' maps):

{curves(found)}

Alignments of tokens by attention (alignment heads) and by input saliency differ by {disagreement * seconds:.2f} s in
the median.

{PAPER}

{machine("torch", "transformers", "scikit-image")}"""
    if options.write:
        write_section(HEADING, text)
    else:
        print(f"## {HEADING}\n\n{text}")


if __name__ == "__main__":
    main()
