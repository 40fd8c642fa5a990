"""Spikformer: neurons that fire make queries, keys and values, and attention counts where these meet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes
from workbench.kernels.checks import check_range
from workbench.kernels.linear import LinearPattern
from workbench.kernels.patterns import Pattern
from workbench.kernels.spiking import leaky_fire, spiking_attention
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, register


class Leaky(nn.Module):
    """Leaky integrate-and-fire neurons over steps of time, which lie along the second axis.

    Attributes:
        threshold: at which one fires. tau: how slowly they leak. step_axis: where steps lie.
    """

    step_axis = 1

    def __init__(self, threshold: float = 1.0, tau: float = 2.0) -> None:
        super().__init__()
        self.threshold, self.tau = threshold, tau

    def forward(self, current: Tensor) -> Tensor:
        """Spikes [batch, step, …] of what drives the neurons."""
        return leaky_fire(current.transpose(0, 1), threshold=self.threshold, tau=self.tau).spikes.transpose(0, 1)


class FeatureNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis, whose offset alone begins by driving neurons to fire at the last step."""

    def __init__(self, d: int, steps: int) -> None:
        super().__init__(d)
        nn.init.constant_(self.bias, _enough(steps))

    def forward(self, x: Tensor) -> Tensor:
        """[…, feature] to the same shape."""
        return super().forward(x.flatten(0, -2)).view(x.shape)


class SpikingAttention(Mixer):
    """s · Q Kᵀ V, of spikes that leaky neurons make of what is projected, step by step; neurons fire again of that.

    An input without steps is given again at each of them, and the rate of the output's spikes is what comes out. One
    with steps, [batch, step, token, d_model], gives spikes at each step, as inside of a spiking model. Steps stand in
    the batch axis of what a capture shows, example by example.

    Args:
        place: not causal; positions play no part.
        steps: how often an input is given. scale: s.

    Raises:
        WorkbenchError: less than one step, or a scale that is not positive.
    """

    def __init__(self, place: Place, steps: int = 4, scale: float = 0.125) -> None:
        super().__init__(replace(place, rotary=False))
        check_range("steps", steps, 1, None)
        if not scale > 0:
            raise WorkbenchError(f"scale={scale} is not above zero")
        self.steps, self.scale, d = steps, scale, place.d_model
        self.q, self.k, self.v = (nn.Sequential(_projection(d), FeatureNorm(d, steps)) for _ in range(3))
        self.out = _projection(d)
        self.out_norm = FeatureNorm(d, steps)
        self.asks, self.answers, self.gives = Leaky(), Leaky(), Leaky()
        self.reads, self.fires = Leaky(threshold=0.5), Leaky()

    def check(self, x: Tensor) -> None:
        """Raise a WorkbenchError unless x fits the place, with steps or without."""
        super().check(x[:, 0] if x.dim() == 4 and x.shape[1] else x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spikes [batch · step, head, token, d] of queries, keys and values."""
        made = []
        for project, neurons in ((self.q, self.asks), (self.k, self.answers), (self.v, self.gives)):
            current = project(x)
            current = current if x.dim() == 4 else current[:, None].expand(-1, self.steps, -1, -1)
            made.append(self.split(neurons(current).flatten(0, 1)))
        return made[0], made[1], made[2]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """A·V of each step; both products are of whole numbers."""
        return spiking_attention(q, k, v, scale=self.scale)

    def finish(self, z: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Neurons read what attention gives, and fire of its projection; their rate where x has no steps."""
        steps = x.shape[1] if x.dim() == 4 else self.steps
        joined = z.transpose(1, 2).flatten(2).unflatten(0, (len(x), steps))
        spikes: Tensor = self.fires(self.out_norm(self.out(self.reads(joined))))
        return spikes if x.dim() == 4 else spikes.mean(1)


def _enough(steps: int) -> float:
    """The constant current that reaches the threshold after so many steps: I (1 − 2⁻ᵀ) = 1."""
    return 1 / (1 - 0.5**steps)


def _projection(d: int) -> nn.Linear:
    """Drives neurons hard enough that some of them fire from the start."""
    made = nn.Linear(d, d, bias=False)
    nn.init.normal_(made.weight, std=(2 / d) ** 0.5)
    return made


class SpikingStem(nn.Module):
    """Patches of an image as spikes: convolutions that halve it, each normalised and followed by neurons.

    Between two that halve, one of 1 × 1 widens to twice the channels and one narrows again, and what was there is
    added; this part is as secondary sources describe Spikformer V2 (arXiv 2401.02020), whose code was not seen.

    Args:
        d_model: channels at the end. steps: of time. halvings: how often sides are halved. in_channels: of the image.

    Raises:
        WorkbenchError: halvings that d_model cannot be divided for.
    """

    def __init__(self, d_model: int, steps: int = 4, halvings: int = 2, in_channels: int = 3) -> None:
        super().__init__()
        check_range("halvings", halvings, 1, None)
        if d_model % 2 ** (halvings - 1):
            raise WorkbenchError(f"d_model={d_model} cannot be halved {halvings - 1} times")
        widths = [in_channels, *(d_model // 2**i for i in reversed(range(halvings)))]
        self.halving = nn.ModuleList(_Fires(a, b, steps, 3, 2) for a, b in pairwise(widths))
        self.widening = nn.ModuleList(
            nn.Sequential(_Fires(d, 2 * d, steps), _Fires(2 * d, d, steps)) for d in widths[1:]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, step, channel, row, column] to [batch, step, d_model, row, column]; small whole numbers."""
        for half, widen in zip(self.halving, self.widening, strict=True):
            x = half(x)
            x = x + widen(x)
        return x


class _Fires(nn.Module):
    """Convolution, batch normalisation and neurons, over [batch, step, channel, row, column]."""

    def __init__(self, given: int, made: int, steps: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(given, made, kernel, stride, kernel // 2, bias=False)
        nn.init.normal_(self.conv.weight, std=(2 / self.conv.weight[0].numel()) ** 0.5)
        self.norm, self.neurons = nn.BatchNorm2d(made), Leaky()
        nn.init.constant_(self.norm.bias, _enough(steps))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        spikes: Tensor = self.neurons(y)
        return spikes


class _Block(nn.Module):
    """Attention and an MLP of two layers of neurons; spikes are added to what is there, which stays whole numbers."""

    def __init__(self, place: Place, steps: int) -> None:
        super().__init__()
        d = place.d_model
        self.attention = SpikingAttention(place, steps)
        self.up, self.up_norm, self.up_fires = nn.Linear(d, 4 * d, bias=False), FeatureNorm(4 * d, steps), Leaky()
        self.down, self.down_norm, self.down_fires = nn.Linear(4 * d, d, bias=False), FeatureNorm(d, steps), Leaky()
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=(2 / layer.in_features) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        hidden = self.up_fires(self.up_norm(self.up(x)))
        spikes: Tensor = self.down_fires(self.down_norm(self.down(hidden)))
        return x + spikes


class Spikformer(nn.Module):
    """A spiking image classifier: stem, blocks, the mean over patches, a linear head, and the mean over steps.

    Args:
        place: of the attention, a grid. n_classes: of the head. layers: blocks. steps: how often an image is given.
        halvings, in_channels: of the stem; images have 2^halvings · rows of the grid, and columns.

    >>> import torch
    >>> model = Spikformer(Place(16, 2, 12, causal=False, grid=(3, 4)), n_classes=5)
    >>> model(torch.zeros(2, 3, 12, 16)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self, place: Place, n_classes: int, layers: int = 2, steps: int = 4, halvings: int = 2, in_channels: int = 3
    ) -> None:
        super().__init__()
        if place.grid is None:
            raise WorkbenchError("Spikformer is for the patches of an image", hint="Place(…, grid=(rows, columns))")
        self.place, self.steps = place, steps
        self.stem = SpikingStem(place.d_model, steps, halvings, in_channels)
        self.blocks = nn.ModuleList(_Block(place, steps) for _ in range(layers))
        self.head = nn.Linear(place.d_model, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, class] of images [batch, channel, row, column]."""
        x = self.stem(images[:, None].expand(-1, self.steps, -1, -1, -1))
        if x.shape[-2:] != self.place.grid:
            raise WorkbenchError(
                f"these images make {' × '.join(map(str, x.shape[-2:]))} patches, and not "
                f"{' × '.join(map(str, self.place.grid or ()))}",
                shape=images.shape,
            )
        x = x.flatten(3).mT
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(2))
        return logits.mean(1)


@contextmanager
def flipped(neurons: Leaky, where: tuple[int | slice, ...]) -> Iterator[None]:
    """Turns spikes of some neurons over while open: what comes of one spike is seen without a surrogate gradient.

    Args:
        where: an index into the spikes [batch, step, …] that the neurons give.
    """

    def turned(module: nn.Module, given: tuple[Tensor, ...], spikes: Tensor) -> Tensor:
        changed = spikes.clone()
        changed[where] = 1 - changed[where]
        return changed

    with Changes() as changes:
        changes.after(neurons, turned)
        yield


def _rates(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """[head, step, token] of queries and keys: the share of their features that fire, in the first example."""
    if not isinstance(module, SpikingAttention) or not isinstance(pattern, LinearPattern):
        return {}
    parts = {"queries": pattern.q, "keys": pattern.k}
    return {name: (t[: module.steps] > 0).to(torch.float32).mean(-1).transpose(0, 1) for name, t in parts.items()}


SPIKFORMER = register(
    Mechanism(
        "spikformer",
        Card(
            title="Spikformer V2: spiking self-attention",
            arxiv="2401.02020",
            equation="Q, K, V = LIF(BN(W x)), zeros and ones; A = s Q Kᵀ at each step, out = LIF(BN(W LIF(A V)))",
            map="s times the number of features in which query and key both fire, step by step in the batch axis. Rows "
            "do not sum to one, and a silent query has a row of zeros. From step to step neurons carry a potential, "
            "each by itself, which no map of tokens shows.",
            kind="self",
            grade="exact",
            cost="O(steps · n · d · min(n, d)) additions; no product of two real numbers",
            causal="never",
            code="ZK-Zhou/spikformer, MIT, has the first version alone. spikingjelly is read, and agrees.",
            claims=(
                Claim("It needs less energy than a transformer of equal size, as spikes are added and not multiplied."),
                Claim("Its convolutional stem, and learning to fill in what was masked, make it more accurate."),
            ),
        ),
        SpikingAttention,
        variants={"one step": {"steps": 1}},
        signature=Signature(
            "Which tokens fire, step by step",
            "The share of a head's features in which the query and the key of each token fire at each step of the "
            "first example. A weight of the map counts the features in which both do; where nothing fires its row or "
            "column is empty.",
            _rates,
            rows="step",
            columns="patch",
            value="rate",
        ),
    )
)
