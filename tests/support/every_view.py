"""Every view once, small, for the tests that hold of all of them. A new view goes into `VIEWS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from workbench import attach
from workbench.capture import Capture
from workbench.views import View

ROWS = ("entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "received")
WORDS = tuple(f" word{i}" for i in range(64))


class _Words:
    """Decodes ids into given tokens."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens

    def decode(self, ids: Sequence[int], **_: bool) -> str:
        return "".join(self.tokens[i] for i in ids)


@cache
def capture(layers: int = 2, heads: int = 3, tokens: Sequence[str] = WORDS[:12], batch: int = 1) -> Capture:
    """A capture of a random GPT-2 over these tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    n = len(tokens)
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=8 * heads, vocab_size=max(n, 8), n_positions=max(n, 16))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_attn.weight" in name:  # patterns with peaks, as trained models have them
                parameter.mul_(20)
    with attach(model, _Words(tokens)) as wb, torch.inference_mode(), wb.capture(ROWS, values=True) as found:
        model(torch.arange(n).repeat(batch, 1))
    return found


def _token_strip(tokens: Sequence[str] = WORDS[:12]) -> View:
    from workbench import views

    ramp = torch.linspace(0, 0.9, len(tokens)).tolist()
    return views.token_strip(tokens, {"received": ramp, "effect": [v - 0.4 for v in ramp]}, title="Token strip")


def _head_atlas() -> View:
    from workbench import views

    return views.head_atlas(capture())


def _attention_pattern(tokens: Sequence[str] = WORDS[:12]) -> View:
    from workbench import views

    return views.attention_pattern(capture(tokens=tuple(tokens)))


def _compare(tokens: Sequence[str] = WORDS[:12]) -> View:
    from workbench import views

    found = capture(tokens=tuple(tokens))
    return views.compare(
        *(views.attention_pattern(found, site=0, heads=[head]) for head in (0, 1)), labels=("one", "two")
    )


def _figure() -> View:
    import plotly.graph_objects as go

    from workbench import views

    lines = go.Figure(go.Scatter(x=[1, 2, 3], y=[0.5, 0.25, 0.2], name="loss"))
    lines.data[0].update(customdata=[[0, 1], [1, 2], [1, 0]], meta={"select": ["layer", "heads"]})
    return views.figure(lines, title="Loss", caption="Loss by epoch.")


def _figure_of_tokens(tokens: Sequence[str]) -> View:
    import plotly.graph_objects as go

    from workbench import views
    from workbench.tokens import plotly_text

    shown = [plotly_text(token) for token in tokens]
    bars = go.Bar(x=shown, y=torch.linspace(0.1, 0.9, len(tokens)).tolist(), name="received")
    axes = {"type": "category"}  # plotly would read some texts as numbers or dates
    return views.figure(go.Figure(bars, {"xaxis": axes}), title="Figure", caption="A bar per token.")


def _run_timeline() -> View:
    from workbench import views

    return views.run_timeline(capture())


def _tensor_peek() -> View:
    from workbench import views

    return views.tensor_peek(torch.linspace(-1, 1, 60).reshape(3, 4, 5), title="Tensor peek")


def _saliency_map(tokens: Sequence[str] = WORDS[:6]) -> View:
    from workbench import views

    random = torch.Generator().manual_seed(0)
    n, frames, bins = len(tokens), 80, 16
    middles = torch.linspace(6, 34, n)[:, None]
    bumps = torch.exp(-((torch.arange(40) - middles) ** 2) / 8)
    cells = bumps.repeat_interleave(2, 1)[..., None] * torch.rand(bins, generator=random)
    noise = torch.rand(2, 3, n, 40, generator=random)
    return views.saliency_map(
        {"input saliency": cells + 0.2, "encoder-output saliency": bumps + 0.1},
        tokens,
        spectrogram=torch.rand(frames, bins, generator=random),
        errors={"encoder-output saliency": torch.full((n, 40), 0.02)},
        attention=(bumps + 0.4 * noise) / (bumps + 0.4 * noise).sum(-1, keepdim=True),
        alignment_heads=[(1, 0)],
        special=[False] * (n - 1) + [True],
        seconds=0.01,
        spans={
            "attention": torch.cat([middles - 2, middles + 2], 1) * 0.02,
            "said": torch.cat([middles - 3, middles + 1], 1) * 0.02,
        },
        audio=torch.sin(torch.arange(6400) / 8),
        sampling_rate=8000,
        unit="nats",
        title="Saliency map",
    )  # fmt: skip


VIEWS: dict[str, Callable[[], View]] = {
    "saliency_map": _saliency_map,
    "tensor_peek": _tensor_peek,
    "figure": _figure,
    "run_timeline": _run_timeline,
    "compare": _compare,
    "attention_pattern": _attention_pattern,
    "head_atlas": _head_atlas,
    "token_strip": _token_strip,
}
"""Kind of view -> one of it."""

WITH_TOKENS: dict[str, Callable[[Sequence[str]], View]] = {
    "attention_pattern": _attention_pattern,
    "compare": _compare,
    "figure": _figure_of_tokens,
    "saliency_map": _saliency_map,
    "token_strip": _token_strip,
}
"""Kinds of views that show tokens -> one of these tokens."""
