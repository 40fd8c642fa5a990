"""From the end of the residual stream to the logits: the final norm and the output projection, found by value."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.anatomy import find_head
from workbench.analysis.circuits.model.recording import Recording, equal, same_product
from workbench.analysis.logits.norms import Norm, find_norm
from workbench.errors import AttachError
from workbench.hooks.configs import read

_LONGEST = 6  # modules between the last block and the logits
_PART = 1 << 28  # bytes of logits at a time


@dataclass(frozen=True)
class Readout:
    """What a model makes of the last block's output.

    Attributes:
        end: name of the last block. norm: the final norm; None where there is none.
        steps: names of the modules behind it, in order, each with the number that its input is multiplied with.
        scale: of the last module's output. bias: [vocab] that is added then. cap: the logits are cap · tanh(x / cap)
            of it; None where they are not capped.
    """

    end: str
    norm: Norm | None
    steps: tuple[tuple[str, float], ...]
    scale: float
    bias: Tensor | None
    cap: float | None
    eps: float
    model: nn.Module = field(repr=False)

    @property
    def source(self) -> str:
        """Name of the module whose output the steps read: the final norm, or the last block."""
        return self.end if self.norm is None else self.norm.name

    def normed(self, stream: Tensor) -> Tensor:
        """What the final norm makes of the stream [..., d_model], computed by the module itself."""
        if self.norm is None:
            return stream
        made: Tensor = self.model.get_submodule(self.norm.name)(stream)
        return made

    def uncapped(self, normed: Tensor) -> Tensor:
        """Logits [..., vocab] before they are capped, computed by the model's modules."""
        for name, factor in self.steps:
            normed = self.model.get_submodule(name)(normed if factor == 1 else normed * factor)
        made = normed if self.scale == 1 else normed * self.scale
        return made if self.bias is None else made + self.bias.to(made.dtype)

    def logits(self, stream: Tensor) -> Tensor:
        """Logits [n, vocab] of vectors of the stream [n, d_model]; in float32 at least."""
        made = self.uncapped(self.normed(stream))
        made = made if made.dtype == torch.float64 else made.float()
        return made if self.cap is None else self.cap * torch.tanh(made / self.cap)

    def at_a_time(self, vocabulary: int) -> int:
        """How many vectors to make logits of at a time."""
        return max(1, _PART // (8 * vocabulary))

    def towards(self, normed: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Directions whose products with what the norm gave are sums of uncapped logits.

        Args:
            normed: [n, d_model]. weights: [n, vocab] by which each logit counts.

        Returns:
            The directions [n, d_model], what the biases add [n], and the sums themselves [n], in float64.

        Raises:
            AttachError: the logits are no linear function of it, or have no gradient.
        """
        if self.cap is None and (rows := self._rows(weights)) is not None:
            direction, constant = (each.to(normed.device) for each in rows)
            return direction, constant, (direction * normed.double()).sum(-1) + constant
        with torch.enable_grad():
            leaf = normed.detach().clone().requires_grad_()
            made = self.uncapped(leaf)
            chosen = (made.double() * weights).sum(-1)
            try:
                (direction,) = torch.autograd.grad(chosen.sum(), leaf)
            except RuntimeError as error:
                raise AttachError(
                    f"{self.steps[-1][0]} has no gradient, so that no direction of a logit can be read: {error}",
                    hint="is it quantized? load the model in floating point",
                ) from None
        with torch.no_grad():
            constant = (self.uncapped(torch.zeros_like(normed)).double() * weights).sum(-1)
        whole = (direction.double() * normed.double()).sum(-1) + constant
        size = direction.double().norm(dim=-1) * normed.double().norm(dim=-1) + constant.abs()
        if bool(((whole - chosen).abs() > max(1e-4, 8 * self.eps) * size).any()):
            raise AttachError(
                f"{', '.join(name for name, _ in self.steps)} is no linear map, so that parts have no shares of a logit"
            )
        return direction.double(), constant, chosen.detach()

    def _rows(self, weights: Tensor) -> tuple[Tensor, Tensor] | None:
        """The directions and what the biases add, from those rows of the output projection that count at all.

        None where it is more than one plain linear layer: then only running it tells.
        """
        (name, factor), *others = self.steps
        module = self.model.get_submodule(name)
        if others or type(module) is not nn.Linear or "forward" in vars(module):
            return None
        weight, bias = module.weight, module.bias
        hooked = module._forward_hooks or module._forward_pre_hooks
        if hooked or type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            return None
        tokens = weights.any(0).nonzero()[:, 0]
        chosen, at = weights[:, tokens], tokens.to(weight.device)
        constants = chosen.new_zeros(len(tokens))
        if bias is not None:
            constants += bias.detach()[at].to(chosen) * self.scale
        if self.bias is not None:
            constants += self.bias[tokens.to(self.bias.device)].to(chosen)
        return chosen @ weight.detach()[at].to(chosen) * (factor * self.scale), chosen @ constants


def find_readout(model: nn.Module, seen: Recording, end: str) -> Readout:
    """How the output of the block `end` becomes the logits of a recorded forward.

    Raises:
        AttachError: the output projection or the final norm cannot be found; it says which.
    """
    head = find_head(seen)
    if head is None or head not in seen.given:
        raise AttachError(
            "the output projection cannot be found: no module gives the logits",
            hint="logits are read in language models whose last module maps the residual stream to the vocabulary",
        )
    several = (name for name in seen.order if name.startswith(f"{head}.") and name in seen.given)
    inner = next((name for name in several if equal(seen.gave.get(name), seen.gave[head])), None)
    if inner is not None:  # the last of several modules in one, such as norm and projection
        with suppress(AttachError):
            return _readout_through(model, seen, end, inner)
    return _readout_through(model, seen, end, head)


def _readout_through(model: nn.Module, seen: Recording, end: str, head: str) -> Readout:
    """The way from the block `end` to the logits through a module that gives these, or what they are scaled from."""
    stream, eps = seen.gave[end], seen.eps
    steps: list[tuple[str, float]] = []
    norm, wanted, name = None, seen.given[head], head
    while len(steps) < _LONGEST:
        factor = _factor(wanted, stream, eps)
        if factor is not None:
            steps.insert(0, (name, factor))
            break
        maker = _maker(seen, end, wanted)
        if maker is None:
            raise AttachError(
                f"the final norm cannot be found: no module outside of the blocks makes what {name} reads",
                hint="logits are read where a norm, or none, and linear modules lie between the last block and them",
            )
        before, factor = maker
        steps.insert(0, (name, factor))
        if _factor(seen.given[before], stream, eps) == 1:
            try:
                norm = find_norm(before, model.get_submodule(before), stream, seen.gave[before], eps)
            except AttachError:
                if not _is_linear(model.get_submodule(before)):
                    raise
                steps.insert(0, (before, 1.0))
            break
        name, wanted = before, seen.given[before]
    else:
        raise AttachError(f"more than {_LONGEST} modules lie between the last block and the logits")
    scale, bias, cap = _after(model, seen.gave[head], seen.logits, eps)
    return Readout(end, norm, tuple(steps), scale, bias, cap, eps, model)


def _maker(seen: Recording, end: str, wanted: Tensor) -> tuple[str, float] | None:
    """The module outside of the blocks whose output, times a number, is what is read; and that number."""
    inside = end.rpartition(".")[0]
    found = []
    for name in reversed(seen.order):
        gave, given = seen.gave.get(name), seen.given.get(name)
        outside = not name.startswith(f"{inside}.") and not f"{end}.".startswith(f"{name}.") and seen.times[name] == 1
        if not outside or gave is None or given is None or gave.shape != wanted.shape or torch.equal(gave, given):
            continue
        factor = _factor(wanted, gave, seen.eps)
        if factor is not None:
            found.append((name, factor))
    return max(found, key=lambda each: each[0].count("."), default=None)


def _factor(wanted: Tensor, gave: Tensor, eps: float) -> float | None:
    """The number by which one tensor is the other; None if it is no multiple."""
    if wanted.shape != gave.shape:
        return None
    a, b = wanted.double(), gave.double()
    factor = float((a * b).sum() / b.square().sum().clamp_min(1e-300))
    if torch.equal(wanted, gave):
        return 1.0
    return factor if factor and same_product(a, b * factor, eps) else None


def _after(
    model: nn.Module, gave: Tensor, logits: Tensor | None, eps: float
) -> tuple[float, Tensor | None, float | None]:
    """(scale, bias, cap) by which the logits differ from what the output projection gave."""
    assert logits is not None
    gave, logits = gave.double(), logits.detach().double()
    factor = _factor(logits, gave, eps)
    if factor is not None:
        return factor, None, None
    left = logits - gave
    if same_product(left, left[:1, :1].expand_as(left), max(eps, 1e-6)):
        return 1.0, left[0, 0], None
    for cap in _caps(model):
        if same_product(logits, cap * torch.tanh(gave / cap), eps):
            return 1.0, None, cap
    raise AttachError(
        "the logits are not what the output projection gives, nor that scaled, shifted or softcapped as the config says"
    )


def _caps(model: nn.Module) -> Sequence[float]:
    configs: list[Any] = [read(model, "config")]
    configs += [read(configs[0], "text_config"), read(configs[0], "decoder")]
    found = [read(config, name) for config in configs for name in ("final_logit_softcapping", "logits_soft_cap")]
    return [float(each) for each in found if isinstance(each, (int, float)) and each > 0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
