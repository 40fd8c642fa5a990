"""What the map of one answer's token costs: the rows of a vision-language model's heads on the patches of a picture.

A random Qwen2.5-VL of the widths of the smallest, with fewer layers, one picture of 1,024 tokens and a question. Four
arms run the same inputs: the forward alone, `workbench.grounding`, the forward on eager attention, and eager attention
that keeps its maps. Maps are checked against each other. Time is that of one thread on its processor, and memory what
each arm adds at its peak to the process.

    python benchmarks/grounding.py [--layers 2] [--tokens 1024] [--rounds 10] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from shared.measuring import machine, peak_above, say, table, timed, write_section
from torch import Tensor

import workbench
from workbench.analysis.statistics.intervals import mean_t

HEADING = "What the map of an answer's token on a picture costs"
IMAGE, WORDS = 7, 24


def model_of(options: argparse.Namespace) -> Any:
    """A random Qwen2.5-VL."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    wide, heads = (64, 4) if options.quick else (2048, 16)
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": wide // 2,
        "num_heads": heads,
        "out_hidden_size": wide,
        "intermediate_size": 2 * wide,
        "fullatt_block_indexes": [0],
    }
    text = {
        "hidden_size": wide, "num_hidden_layers": options.layers, "num_attention_heads": heads,
        "num_key_value_heads": 2, "intermediate_size": 11008 * wide // 2048, "vocab_size": 1000, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                            "mrope_section": [wide // heads // 8, *[3 * wide // heads // 16] * 2]},
    }  # fmt: skip
    tokens = {"image_token_id": IMAGE, "video_token_id": 8, "vision_start_token_id": 5, "vision_end_token_id": 6}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)).eval()


def inputs_of(tokens: int) -> dict[str, Tensor]:
    """A picture of so many tokens, and a question."""
    side = int(tokens**0.5)
    words = torch.randint(10, 1000, (1, WORDS), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([words[:, :4], torch.full((1, side**2), IMAGE), words[:, 4:]], 1)
    pixels = torch.randn(4 * side**2, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]]),
    }  # fmt: skip


def eager_maps(twin: Any, inputs: dict[str, Tensor]) -> Tensor:
    """[head, patch] the last token's row, from the maps of eager attention, all of which it keeps until its end."""
    kept = twin(**inputs, output_attentions=True, logits_to_keep=1).attentions
    on = inputs["input_ids"][0] == IMAGE
    return torch.cat([each[0, :, -1][:, on] for each in kept])


def measure(options: argparse.Namespace) -> tuple[list[list[str]], str, float]:
    """Rows of the table; time of the map over the forward's; the largest difference from eager."""
    inputs, model = inputs_of(options.tokens), model_of(options)
    twin = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        wb = workbench.attach(model)
        arms = {
            "forward": lambda: model(**inputs, logits_to_keep=1),
            "map": lambda: workbench.grounding(wb, {**inputs, "logits_to_keep": 1}),
            "eager forward": lambda: twin(**inputs, logits_to_keep=1),
            "eager map": lambda: eager_maps(twin, inputs),
        }
        off = float((arms["map"]().weights[0] - arms["eager map"]()).abs().max())
        if off > 1e-5:
            raise SystemExit(f"the maps differ: {off}")
        few, many = dict(list(arms.items())[2:]), dict(list(arms.items())[:2])
        seconds = timed(many, options.rounds, time.process_time)
        base = timed({"forward": arms["forward"], **few}, options.rounds // 4, time.process_time)
        bytes_ = {name: peak_above(run)[0] for name, run in arms.items()}
        wb.detach()
    ratios = {name: _ratio(each, seconds["forward"]) for name, each in seconds.items()}
    ratios |= {name: _ratio(base[name], base["forward"]) for name in few}
    rows = [[name, ratios[name], f"{bytes_[name] / 2**20:,.0f}"] for name in arms]
    for row in rows:
        say(" ".join(row))
    return rows, ratios["map"], off


def _ratio(seconds: list[float], base: list[float]) -> str:
    """The mean of the rounds' ratios with its 95 % interval."""
    ratios = torch.tensor(seconds, dtype=torch.float64) / torch.tensor(base, dtype=torch.float64)
    if len(ratios) < 2 or not float(ratios.std()):
        return f"{float(ratios.mean()):.3f}"
    low, high = (float(end) for end in mean_t(ratios))
    return f"{float(ratios.mean()):.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Measure, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a tiny model; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.layers, options.rounds, options.tokens = 2, 8, 64
    torch.set_num_threads(1)
    rows, ratio, off = measure(options)
    text = f"""`python benchmarks/grounding.py`: a random Qwen2.5-VL as wide as its smallest, one layer in the vision
tower and {options.layers} in the language model, one picture of {options.tokens:,} tokens, {WORDS} words. The map is
`workbench.grounding` at the last token: every head of every layer on every patch, with the weight on sinks and beside
the picture. With its forward it takes {ratio} times the forward alone. Eager attention gives the same maps
to {off:.0e}.

{table(["arm", "time over the forward's, 95 %", "MiB above what was held"], rows)}

Processor time of one thread. Ratios within each of {options.rounds} rounds, {options.rounds // 4} with eager attention,
interleaved in both orders; intervals are Student's t over rounds.
{machine("torch", "transformers")}
"""
    if options.quick:
        print(text)
    else:
        write_section(HEADING, text)


if __name__ == "__main__":
    main()
