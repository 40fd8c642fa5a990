"""DaViT: patches attend inside windows of an image, and channels attend to each other over all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.kernels.gates import AdditivePattern
from workbench.kernels.patterns import Pattern, SignedPattern
from workbench.kernels.softmax import SoftmaxPattern
from workbench.mechanisms.frame import Card, Claim, Mechanism, Mixer, Place, Signature, at_places, register


class ChannelAttention(Mixer):
    """Y = softmax(s · Qᵀ K) Vᵀ inside each group of channels: a channel asks with all positions at once.

    With the map held fixed every position is mixed with nothing but itself. What positions have to do with each other
    goes through the map, whose scores are sums over positions: `additive_scores` says what each adds to them, and
    `through_map` how far one moves another.

    Args:
        place: a sequence or a grid, not causal, whose positions play no part; its heads are the groups.
        scale: s. "width": 1/√d of the channels in a group, as published; "tokens": 1/√n of the positions, as in
            Florence-2, so that scores do not grow with the image.

    Raises:
        WorkbenchError: another scale.
    """

    def __init__(self, place: Place, scale: Literal["width", "tokens"] = "width") -> None:
        super().__init__(replace(place, rotary=False))
        if scale not in ("width", "tokens"):
            raise WorkbenchError(f'scale="{scale}" is not known', hint='"width" or "tokens"')
        self.scale = scale

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, group, channel, token]."""
        q, k, v = (self.split(each(x)).mT for each in (self.q, self.k, self.v))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """A·V of each group, [batch, group, channel, token]."""
        wide = self.d_head if self.scale == "width" else x.shape[1]
        return F.scaled_dot_product_attention(q, k, v, scale=wide**-0.5)

    def finish(self, z: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Groups side by side again, and projected."""
        y: Tensor = self.out(z.flatten(1, 2).mT)
        return y

    def through_map(self, x: Tensor) -> Tensor:
        """[batch, token p, token r]: ‖∂Y_p/∂x_r‖ with the values held, a surrogate for a map between positions.

        Holds n² · d_model² numbers for an example: for small images.
        """
        self.check(x)

        def given(one: Tensor, v: Tensor) -> Tensor:
            q, k, _ = self.heads(one[None])
            return self.finish(self.mix(q, k, v, one[None]), v, one[None])[0]

        rows = []
        for one in x.detach():
            jacobian = torch.func.jacrev(given)(one, self.heads(one[None])[2].detach())
            rows.append(jacobian.detach().square().sum((1, 3)).sqrt())
        return torch.stack(rows)


def additive_scores(pattern: SoftmaxPattern, head: int, key: int) -> AdditivePattern:
    """What each token adds to the scores of all channels of a group with one of them, [batch, 1, channel, token].

    Args:
        pattern: of a site of kind "channel", whose queries and keys are known: of this package, or Florence-2's.

    Raises:
        CaptureError: there is no such head or channel.
    """
    pattern.score_parts(0, key, [head])  # checks both
    base = SignedPattern(pattern.scale * pattern.q[:, [head]])
    return AdditivePattern(base, pattern.k[:, [head], key, :, None])


class WindowAttention(Mixer):
    """Softmax attention inside windows of w × w patches that do not overlap, without positions or shifts.

    Args:
        place: a grid. Where windows do not divide it, zeros fill it up below and to the right; as published, they are
            not hidden: their keys and values are the projections' biases.
        window: w; 7, or as much as the longer side has if that is less, if None.

    Raises:
        WorkbenchError: a window that is less than one.
    """

    def __init__(self, place: Place, window: int | None = None) -> None:
        super().__init__(place)
        assert place.grid is not None
        self.window = min(7, max(place.grid)) if window is None else window
        if self.window < 1:
            raise WorkbenchError(f"window={window} holds no patch", hint="at least 1")
        self.filled = tuple(-(-side // self.window) * self.window for side in place.grid)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch · window, head, w², d]; the windows of an image row by row."""
        (rows, columns), w = self._grid, self.window
        image = F.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, self.filled[1] - columns, 0, self.filled[0] - rows))
        parts = image.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3)  # [batch, row, column, w, w, d_model]
        windows = parts.reshape(-1, w * w, x.shape[2])
        q, k, v = (self.split(each(windows)) for each in (self.q, self.k, self.v))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Each window by itself."""
        return F.scaled_dot_product_attention(q, k, v)

    def finish(self, z: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Projected, and the windows put together without what filled them up."""
        (rows, columns), w = self._grid, self.window
        y: Tensor = self.out(z.transpose(1, 2).flatten(2))
        shape = (len(x), self.filled[0] // w, self.filled[1] // w, w, w, self.place.d_model)
        return y.reshape(shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)

    @property
    def _grid(self) -> tuple[int, int]:
        assert self.place.grid is not None
        return self.place.grid


def _added(module: nn.Module, pattern: Pattern) -> dict[str, Tensor]:
    """Of each group what tokens add, for and against, to the largest weight of one channel on another."""
    if not isinstance(module, ChannelAttention) or not isinstance(pattern, SoftmaxPattern):
        return {}
    weights, added = pattern.dense()[:1].clone(), []
    weights[0].diagonal(dim1=1, dim2=2).zero_()  # that of a channel on itself tells little
    for head, of in enumerate(weights[0]):
        query, key = divmod(int(of.argmax()), of.shape[1])
        added.append(additive_scores(pattern, head, key).dense()[0, 0, query])
    found = torch.stack(added)
    return {name: at_places(module.place, part.clamp(min=0)) for name, part in (("for", found), ("against", -found))}


_CODE = "dingmyu/davit, MIT. timm (Apache-2.0) and Florence-2 of transformers (Apache-2.0) are read, and agree."

CHANNELS = register(
    Mechanism(
        "davit-channels",
        Card(
            title="DaViT: channel group attention",
            arxiv="2204.03645",
            equation="A = softmax(Qᵀ K/√d) between the d channels of a group, Y = A Vᵀ; Q, K, V are [token, channel]",
            map="A softmax between channels. A score is a sum over tokens of what each adds to it.",
            kind="channel",
            grade="exact",
            cost="O(n·d) time for each channel; memory for the map d² a group, however many tokens",
            causal="never",
            code=_CODE,
            claims=(
                Claim("Channels that attend to each other give windows the view of the whole image that they lack."),
                Claim("Its cost grows linearly with the number of patches."),
            ),
        ),
        ChannelAttention,
        variants={"by tokens": {"scale": "tokens"}},
        signature=Signature(
            "What tokens add to the strongest pair of channels",
            "Of each group the two channels of which one looks most at the other: what each token adds to their score, "
            "which is a sum over tokens; for it, and against it.",
            _added,
            value="score",
        ),
    )
)

WINDOWS = register(
    Mechanism(
        "davit-windows",
        Card(
            title="DaViT: window attention",
            arxiv="2204.03645",
            equation="A = softmax(q kᵀ/√d) inside each window of w × w patches",
            map="A softmax inside windows, which stand in the batch axis, image by image.",
            kind="window",
            grade="exact",
            cost="O(n·w²) time and memory",
            causal="never",
            grid=True,
            code=_CODE,
            claims=(Claim("With channel attention between them windows need neither shifts nor position biases."),),
        ),
        WindowAttention,
        variants={"filled up": {"window": 4}},
    )
)
