"""How fast saliency of a decoder's answer is: ours against captum called for each token of the answer.

A random model of GPT-2 small's widths with fewer layers, a prompt and an answer; the log-probability of each token of
the answer by the embeddings of all tokens before it. Captum's arm is its own methods on one plain function, as its
tutorials call them. Both give the same map, which is checked. Writes its section of docs/benchmarks.md.

    python benchmarks/decoder_saliency.py [--layers 6] [--prompt 16] [--answer 5] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from shared.measuring import interleaved, machine, say, table, write_section
from torch import Tensor

import workbench

HEADING = "How fast saliency of a decoder's answer is"
STEPS = 8


def model_of(options: argparse.Namespace) -> Any:
    """A random GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"n_head": 2, "n_embd": 64, "vocab_size": 100} if options.quick else {}
    config = GPT2Config(n_layer=options.layers, n_positions=128, bos_token_id=0, eos_token_id=0, **small)
    return GPT2LMHeadModel(config).eval()


def theirs(model: Any, prompt: Tensor, answer: Tensor, method: str) -> Callable[[], Tensor]:
    """[answer, position] by captum, one call per token of the answer."""
    from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, Occlusion

    embedded = model.get_input_embeddings()(torch.cat([prompt, answer[:-1]])[None]).detach()
    n, width = embedded.shape[1:]

    def plain(given: Tensor) -> Tensor:
        logits = model(inputs_embeds=given, use_cache=False, logits_to_keep=len(answer)).logits
        return logits.log_softmax(-1)[:, range(len(answer)), answer]

    options: dict[str, Any]
    made, options = {
        "gradient_x_input": (InputXGradient, {}),
        "integrated_gradients": (IntegratedGradients, {"n_steps": STEPS, "internal_batch_size": 8}),
        "feature_ablation": (FeatureAblation, {"feature_mask": torch.arange(n)[None, :, None].expand_as(embedded)}),
        "occlusion": (Occlusion, {"sliding_window_shapes": (1, width), "strides": (1, width)}),
    }[method]
    gradients = method in ("gradient_x_input", "integrated_gradients")
    if not gradients:
        options["perturbations_per_eval"] = 8

    def run() -> Tensor:
        explainer = made(plain)
        with torch.set_grad_enabled(gradients):
            start = embedded.clone().requires_grad_(gradients)
            each = [explainer.attribute(start, target=k, **options).detach()[0] for k in range(len(answer))]
        return torch.stack([one.sum(-1) if gradients else one.mean(-1) for one in each])

    return run


def measure(options: argparse.Namespace) -> list[list[str]]:
    """Rows: method, their time over ours, largest difference over the largest score."""
    model, rows = model_of(options), []
    ids = torch.randint(0, 100, (options.prompt + options.answer,), generator=torch.Generator().manual_seed(0))
    prompt, answer = ids.split([options.prompt, options.answer])
    for method in ("gradient_x_input", "integrated_gradients", "feature_ablation", "occlusion"):
        more = {"n_steps": STEPS} if method == "integrated_gradients" else {}
        their = theirs(model, prompt, answer, method)
        with workbench.attach(model) as wb:

            def ours(
                wb: workbench.Workbench = wb, method: str = method, more: dict[str, int] = more
            ) -> workbench.Saliency:
                return workbench.saliency(
                    wb, {"input_ids": prompt[None]}, method, hypothesis=answer, progress=False, batch_size=8, **more
                )

            truth = their()
            off = float((ours().scores - truth).abs().max() / truth.abs().max())
            if off > 1e-3:
                raise SystemExit(f"the maps of {method} differ: {off}")
            seconds = interleaved({"ours": ours, "theirs": their}, options.rounds)
        rows.append([method, f"{seconds['theirs'] / seconds['ours']:.1f}", f"{off:.0e}"])
        say(" ".join(rows[-1]))
    return rows


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--answer", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds = 2, 1
    rows = measure(options)
    text = f"""`python benchmarks/decoder_saliency.py`: a random model of GPT-2 small's widths with {options.layers}
layers, a prompt of {options.prompt} tokens and an answer of {options.answer}; the log-probability of each token of the
answer by all tokens before it. Integrated gradients take {STEPS} steps. Captum runs the model for each token of the
answer, ours once for all of them; where gradients are needed with a backward for each, or, where prompt and answer are
short, with one for copies of them. Ours includes looking whether the model is causal, whether embeddings give what ids
give, and with gradients how far the sums are from the change: three to four forwards; and a sum of the weights' bytes
for the result's provenance.

{table(["method", "captum's time over ours", "difference"], rows)}

Median of {options.rounds} rounds, interleaved in both orders. {machine("torch", "transformers", "captum")}
"""
    if options.quick:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
