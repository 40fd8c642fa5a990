"""Class semantics-based attention: what a recogniser says of the classes opens gates over channels and over time."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.readers import reader
from workbench.kernels.checks import check_range
from workbench.kernels.gates import AdditivePattern
from workbench.kernels.patterns import SignedPattern
from workbench.mechanisms.frame import Card, Claim, Gate, Mechanism, Place, read_gate, register

Summary = Literal["moments", "mean"]
Fusion = Literal["sum", "join"]


class ChannelGate(Gate):
    """σ(W₂ relu(W₁ φ(R))): a factor for each channel, of how each class is spread over time; φ is mean, largest and
    standard deviation ("moments"), or the mean alone.
    """

    def __init__(self, place: Place, n_classes: int, summary: Summary) -> None:
        super().__init__(place)
        self.summary, hidden = summary, max(4, place.d_model // 4)
        self.squeeze = nn.Linear(n_classes * (3 if summary == "moments" else 1), hidden)
        self.excite = nn.Linear(hidden, place.d_model)

    def logits(self, classes: Tensor) -> Tensor:
        """[batch, 1, channel] of R [batch, time, class]."""
        found = [classes.mean(1)]
        if self.summary == "moments":
            found += [classes.amax(1), classes.var(1, correction=0).clamp(min=1e-12).sqrt()]
        logits: Tensor = self.excite(F.relu(self.squeeze(torch.cat(found, dim=-1))))
        return logits[:, None]

    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and a factor for each channel."""
        return x, self.logits(source).sigmoid()


class TimeGate(Gate):
    """σ(Conv(relu(Conv(R)))): a factor for each time, of what the classes do around it; one for each channel if
    `per_channel`.
    """

    def __init__(self, place: Place, n_classes: int, kernel: int, per_channel: bool) -> None:
        super().__init__(place)
        hidden = max(4, place.d_model // 4)
        self.first = nn.Conv1d(n_classes, hidden, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(hidden, place.d_model if per_channel else 1, kernel, padding=kernel // 2)

    def logits(self, classes: Tensor) -> Tensor:
        """[batch, time, 1 or channel] of R [batch, time, class]."""
        logits: Tensor = self.second(F.relu(self.first(classes.transpose(1, 2))))
        return logits.transpose(1, 2)

    def parts(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and a factor for each time."""
        return x, self.logits(source).sigmoid()

    def source_map(self, x: Tensor, source: Tensor) -> AdditivePattern:
        """What the classes at each time add to the logit of the factor, its relu held fixed, beside the biases.

        Two kernels reach as far as both together: the map is a band.
        """
        pad, (b, n, _) = self.first.padding, source.shape
        open_now = (self.first.forward(source.transpose(1, 2)) > 0).to(source.dtype)
        alone = (
            torch.diag_embed(source.transpose(1, 2)).permute(0, 3, 1, 2).flatten(0, 1)
        )  # [batch · time, class, time]
        hidden = F.conv1d(alone, self.first.weight, padding=pad).unflatten(0, (b, n)) * open_now[:, None]
        made = F.conv1d(hidden.flatten(0, 1), self.second.weight, padding=pad).unflatten(0, (b, n))
        band = SignedPattern(made.permute(0, 2, 3, 1))  # [batch, head, time, time it comes from]
        return AdditivePattern(band, source.new_ones(b, 1, n, 1))


reader(TimeGate, kind="gate", follows=("first", "second"))(read_gate)


class ClassSemanticsAttention(nn.Module):
    """Fuse(F · a_channel, F · a_time): features F are weighted over channels and over time by what a recogniser says.

    The gates are made of R, the class-rich features, alone, and not of F; where no R is given, F stands for it.

    Args:
        place: F, a sequence of times.
        n_classes: channels of R; as many as F has if None.
        summary: what the channel gate is told of R over time, see `ChannelGate`.
        kernel: times that each of the time gate's convolutions sees, odd.
        per_channel: the time gate has a factor for each channel.
        fusion: "sum" of both, or "join", a linear layer of both side by side.

    Raises:
        WorkbenchError: classes below 1, an even kernel, or a summary or fusion that is not known.
    """

    def __init__(
        self,
        place: Place,
        n_classes: int | None = None,
        summary: Summary = "moments",
        kernel: int = 3,
        per_channel: bool = False,
        fusion: Fusion = "sum",
    ) -> None:
        super().__init__()
        self.place, self.n_classes = place, place.d_model if n_classes is None else n_classes
        check_range("n_classes", self.n_classes, 1, None)
        if kernel < 1 or not kernel % 2:
            raise WorkbenchError(f"kernel={kernel} has no middle", hint="an odd kernel")
        for name, given, known in (("summary", summary, ("moments", "mean")), ("fusion", fusion, ("sum", "join"))):
            if given not in known:
                raise WorkbenchError(f'{name}="{given}" is not known', hint=" or ".join(f'"{one}"' for one in known))
        self.channel = ChannelGate(place, self.n_classes, summary)
        self.time = TimeGate(place, self.n_classes, kernel, per_channel)
        self.fuse = nn.Linear(2 * place.d_model, place.d_model) if fusion == "join" else None

    def forward(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """F [batch, time, d_model] to the same shape.

        Args:
            classes: R, [batch, time, class]; F if None.
        """
        self.place.check(x)
        classes = x if classes is None else classes
        self._check(x, classes)
        both = self.channel(x, classes), self.time(x, classes)
        return both[0] + both[1] if self.fuse is None else self.fuse(torch.cat(both, dim=-1))

    def _check(self, x: Tensor, classes: Tensor) -> None:
        if classes.dim() != 3 or classes.shape[:2] != x.shape[:2] or classes.shape[2] != self.n_classes:
            raise WorkbenchError(
                f"classes must be [{x.shape[0]}, {x.shape[1]}, {self.n_classes}] [batch, time, class]",
                shape=classes.shape,
            )

    def opened_by(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes opened the gates: gradient times R, summed over the times that R comes from.

        Returns:
            [batch, channel, class] for the channel gate's logits, and [batch, time, class] for the time gate's, their
            mean where it has one for each channel.
        """
        given = classes.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.channel.logits(given)[:, 0], self.time.logits(given).mean(-1)
            found = [_gradient_times(each, given) for each in logits]
        return found[0], found[1]


def _gradient_times(logits: Tensor, given: Tensor) -> Tensor:
    """[batch, logit, class] of logits [batch, logit], of examples that do not see each other."""
    rows = [torch.autograd.grad(one.sum(), given, retain_graph=True)[0] for one in logits.unbind(1)]
    return torch.stack([(row * given.detach()).sum(1) for row in rows], dim=1)


def _inputs(place: Place) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, place.length, place.d_model, generator=random) for name in ("x", "classes")}


CSA = register(
    Mechanism(
        "csa",
        Card(
            title="Class Semantics-based Attention",
            arxiv="2109.02613",
            equation="y = Fuse(F · σ(MLP(φ(R))), F · σ(Conv(relu(Conv(R))))), R class-rich features, φ their moments",
            map="Two gates, over channels and over time. Of the latter “source” tells what each time adds to the "
            "logit; `opened_by` tells which classes opened either. Layers are ours: the paper's are not known.",
            kind="gate",
            grade="exact",
            cost="O(n·kernel·classes·d_model)",
            causal="never",
            code="No official code was found.",
            claims=(
                Claim("Attention from class semantics finds actions better than squeeze-and-excitation does."),
                Claim("Both gates together are better than either alone."),
            ),
        ),
        ClassSemanticsAttention,
        variants={"joined": {"fusion": "join"}, "mean": {"summary": "mean"}, "per channel": {"per_channel": True}},
        inputs=_inputs,
    )
)
