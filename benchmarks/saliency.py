"""How fast saliency by masking is on Whisper base: ours against a loop of one mask and one full forward each.

The naive loop masks the spectrogram (or, for the encoder-output variant, runs the encoder and masks its output), scores
all output tokens by teacher forcing with one forward of the whole model, and adds up. Ours streams the same masks. Also
the error against the number of masks, and peak memory against it. Writes its section of docs/benchmarks.md.

    python benchmarks/saliency.py [--masks 8] [--encoder-masks 64] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from shared.measuring import exponent, interleaved, machine, peak_above, say, table, write_section
from shared.speech import PROMPT, utterances, whisper
from torch import Tensor

import workbench
from workbench import Saliency
from workbench.analysis.saliency.masks import Masks
from workbench.analysis.saliency.segments import superpixels

HEADING = "How fast saliency by masking is"
GRANULARITIES = (2000, 2500, 3000)


def naive(
    model: Any, one: dict[str, Any], targets: Tensor, where: str, n_masks: int, seed: int
) -> Callable[[], Tensor]:
    """The map [output token, position...] by a loop over masks in plain code; the same masks as ours."""
    from transformers.modeling_outputs import BaseModelOutput

    features = one["input_features"]
    frames = int(one["attention_mask"].sum())
    ids = torch.cat([torch.tensor(PROMPT), targets])[None, :-1]
    if where == "input":
        segments = superpixels(features[0, :, :frames].T, GRANULARITIES)
    else:
        segments = (torch.arange(-(-frames // 2)),)
    masks = Masks(tuple(int(one.max()) + 1 for one in segments), 0.5, seed)

    def run() -> Tensor:
        skip = len(PROMPT) - 1
        clean = model(input_features=features, decoder_input_ids=ids).logits[0, skip:].log_softmax(-1)
        total: Any = 0.0
        count: Any = 0.0
        for m in range(n_masks):
            draw = masks.at(m)
            hidden = draw.hidden[0][segments[draw.granularity]]
            if where == "input":
                masked = features.clone()
                masked[0, :, :frames].T[hidden] = 0
                logits = model(input_features=masked, decoder_input_ids=ids).logits
            else:
                states = model.get_encoder()(features).last_hidden_state
                states[0, : len(hidden)][hidden] = 0
                logits = model(encoder_outputs=BaseModelOutput(states), decoder_input_ids=ids).logits
            found = logits[0, skip:].log_softmax(-1)
            score = (clean.exp() * (clean - found)).sum(-1)
            total = total + score.view(-1, *[1] * hidden.dim()) * hidden
            count = count + hidden.float()
        return torch.where(count > 0, total / count.clamp(min=1), 0.0)

    return run


def ours(
    wb: workbench.Workbench,
    one: dict[str, Any],
    targets: Tensor,
    where: str,
    n_masks: int,
    batch_size: int,
    **more: Any,
) -> Callable[[], Saliency]:
    """The same by `workbench.saliency`."""
    method = "spes" if where == "input" else "encoder_output"
    given: dict[str, Any] = {"hypothesis": targets, "prompt": PROMPT, "n_masks": n_masks, "batch_size": batch_size}
    return lambda: workbench.saliency(wb, one, method, progress=False, **given, **more)


def in_bfloat16(work: Callable[[], Saliency]) -> Callable[[], Saliency]:
    """The work in bfloat16 autocast."""

    def run() -> Saliency:
        with torch.autocast("cpu", torch.bfloat16):
            return work()

    return run


def speed(
    wb: workbench.Workbench, one: dict[str, Any], targets: Tensor, options: argparse.Namespace
) -> list[list[str]]:
    """Rows: variant, masks, naive time over ours, largest difference of the maps over their mean error."""
    rows = []
    for where, n_masks, batch in (("input", options.masks, 4), ("encoder", options.encoder_masks, 16)):
        n_masks = max(6, n_masks // 3 * 3)
        plain = naive(wb.model, one, targets, where, n_masks, 0)
        fast = ours(wb, one, targets, where, n_masks, batch)
        arms: dict[str, Callable[[], object]] = {"naive": plain, "ours": fast, "bfloat16": in_bfloat16(fast)}
        truth, same, half = plain(), fast(), in_bfloat16(fast)()
        off = [float((found.scores - truth).abs().mean()) for found in (same, half)]
        if off[0] > 1e-3 * float(truth.abs().mean()):
            raise SystemExit(f"the maps differ: {off}")
        seconds = interleaved(arms, options.rounds)
        error = float(same.standard_error[same.standard_error.isfinite()].mean())
        rows.append(
            [
                where, str(n_masks), f"{n_masks / seconds['naive']:.2f}", f"{seconds['naive'] / seconds['ours']:.1f}",
                f"{seconds['naive'] / seconds['bfloat16']:.1f}", f"{off[0] / error:.1e}", f"{off[1] / error:.1e}",
            ]
        )  # fmt: skip
        say(" ".join(rows[-1]))
    return rows


def errors(
    wb: workbench.Workbench, one: dict[str, Any], targets: Tensor, counts: list[int]
) -> tuple[list[list[str]], float]:
    """Rows: masks, distance from a map of many more, stated error, noise; and the exponent of the distance."""
    truth = ours(wb, one, targets, "encoder", 4 * counts[-1], 16, seed=1)()
    rows, distances = [], {}
    for n in counts:
        found = ours(wb, one, targets, "encoder", n, 16)()
        distances[n] = float((found.scores - truth.scores).square().mean().sqrt())
        stated = float((found.standard_error.square() + truth.standard_error.square()).mean().sqrt())
        rows.append([str(n), f"{distances[n]:.2e}", f"{stated:.2e}", f"{float(found.noise.median()):.2f}"])
    return rows, exponent(distances)


def memory(wb: workbench.Workbench, one: dict[str, Any], targets: Tensor, counts: list[int]) -> list[list[str]]:
    """Rows: masks, peak bytes above the start."""
    ours(wb, one, targets, "encoder", counts[0], 16)()
    rows = []
    for n in counts:
        peak, _ = peak_above(ours(wb, one, targets, "encoder", n, 16))
        rows.append([str(n), f"{peak / 2**20:.0f}"])
    return rows


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=9)
    parser.add_argument("--encoder-masks", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 for PyTorch's own number")
    parser.add_argument("--quick", action="store_true", help="few masks, one round, nothing written: does it work?")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.masks, options.encoder_masks, options.rounds = 6, 16, 1
    model, tokenizer, extractor = whisper()
    one = next(utterances(extractor))
    with workbench.attach(model, tokenizer) as wb, torch.no_grad():
        targets = torch.tensor(
            workbench.saliency(wb, one, "encoder_output", prompt=PROMPT, n_masks=4, progress=False).target_ids
        )
        rows = speed(wb, one, targets, options)
        counts = [16, 64] if options.quick else [64, 256, 1024]
        accuracy, power = errors(wb, one, targets, counts)
        peaks = memory(wb, one, targets, counts)
    text = f"""`python benchmarks/saliency.py`: Whisper base, the voice sample {one["name"]}, {len(targets)} tokens.
Time of a loop of one mask and one full forward over that of `workbench.saliency` with the same masks (4 at a time at
the input, 16 at the encoder's output), in float32 and inside `torch.autocast` with bfloat16; mean difference of the
maps from the loop's, over their mean standard error.

{table(["masks on", "masks", "naive masks a second", "ours", "ours, bfloat16", "difference", "bfloat16's"], rows)}

Encoder-output variant: root mean square distance from a map of {4 * counts[-1]} other masks falls as masks to the power
{power:.2f}; stated is what the two standard errors say of it; noise is the error over the spread of a token's map.

{table(["masks", "distance", "stated", "noise"], accuracy)}

Peak memory above what the process held before:

{table(["masks", "MiB"], peaks)}

Median of {options.rounds}, interleaved in both orders, {torch.get_num_threads()} threads.
{machine("torch", "transformers", "scikit-image")}"""
    if options.quick:
        say(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
