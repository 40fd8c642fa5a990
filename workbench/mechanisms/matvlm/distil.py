"""Distilling a teacher into a student: each new layer is to give what the teacher's block gave, the whole its logits.

The layer loss is that of MaTVLM (arXiv 2503.13440): the student's block is fed what the teacher's block was fed, and
the loss is the Frobenius norm ‖r − t‖ of what they give, summed over the layers that were replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.hooks.changes import Changes
from workbench.mechanisms.matvlm.student import Student
from workbench.session.workbench import Workbench
from workbench.storage.result import Result

if TYPE_CHECKING:
    import pandas as pd

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class BlockCall:
    """How a block of the teacher was called, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gave: Tensor


@dataclass(frozen=True)
class Losses:
    """Of one batch.

    Attributes:
        layers: [layer] ‖r − t‖ of each replaced layer.
        logits: T² KL(teacher ‖ student), nats a token.
    """

    layers: Tensor
    logits: Tensor


@dataclass(frozen=True, repr=False)
class Distillation(Result):
    """How far the layers and the logits of a student are from its teacher, step by step.

    Attributes:
        sites: the replaced attention. layers: [step, layer] ‖r − t‖ over ‖t‖. logits: [step] KL, nats a token.
    """

    form = "workbench.distillation"
    filled = ("step", "layer")

    sites: Annotated[tuple[str, ...], "layer"]
    layers: Float[Tensor, "step layer"]
    logits: Float[Tensor, " step"]
    provenance: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row per replaced layer: its loss at the first step and over the last tenth of them."""
        import pandas as pd

        last = max(1, len(self.layers) // 10)
        return pd.DataFrame(
            {
                "site": self.sites,
                "first": self.layers[0].double().numpy(),
                "last": self.layers[-last:].double().mean(0).numpy(),
            }
        )

    def __repr__(self) -> str:
        first, last = float(self.logits[0]), float(self.logits[-1])
        return (
            f"Distillation({len(self.sites)} layers, {len(self.logits)} steps; "
            f"KL of the logits {first:.3g} to {last:.3g} nats)"
        )


def teacher_calls(teacher: nn.Module, blocks: Iterable[str], batch: Batch) -> tuple[dict[str, BlockCall], Tensor]:
    """How the teacher's blocks are called on a batch, and its logits [batch, position, vocabulary]."""
    found: dict[str, BlockCall] = {}

    def seen(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found[name] = BlockCall(args, dict(kwargs), _first(output))

        return hook

    with torch.no_grad(), Changes() as changes:
        for name in blocks:
            changes.after(teacher.get_submodule(name), seen(name), with_kwargs=True)
        logits = _logits(teacher(**batch, use_cache=False))
    return found, logits


def losses(teacher: nn.Module, student: Student, batch: Batch, temperature: float = 1.0) -> tuple[Losses, Tensor]:
    """What is to become small, with gradients for the student; and [layer] ‖t‖, what layers' losses compare with."""
    calls, wanted = teacher_calls(teacher, student.blocks, batch)
    layers, sizes = [], []
    for block in student.blocks:
        call = calls[block]
        given = _first(student.model.get_submodule(block)(*call.args, **call.kwargs))
        layers.append((given - call.gave).norm())
        sizes.append(call.gave.norm())
    made = _logits(student(**batch, use_cache=False))
    p, q = ((logits / temperature).log_softmax(-1).flatten(0, -2) for logits in (wanted, made))
    away = temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
    none = made.new_zeros(0)
    return Losses(torch.stack(layers) if layers else none, away), torch.stack(sizes) if sizes else none


def distil(
    wb: Workbench, student: Student, batches: Iterable[Batch], *, rate: float = 1e-3, layer_weight: float = 1.0,
    logit_weight: float = 1.0, temperature: float = 1.0, everything: bool = False, progress: bool = True,
) -> Distillation:  # fmt: skip
    """Train a student on what its teacher gives, one step a batch, with AdamW; the rate falls to zero along a line.

    Args:
        wb: attached to the teacher, which is left as it is.
        batches: model inputs, rows of one length each.
        layer_weight, logit_weight: of the losses, as in MaTVLM 1 each.
        everything: train all of the student; the new layers alone if False.

    Raises:
        WorkbenchError: there are no batches, or a student without new layers.
    """
    teacher = wb.model
    if not student.replaced:
        raise WorkbenchError("the student has no layer of its own to train", hint="student(wb, sites) with some sites")
    several = list(batches)
    if not several:
        raise WorkbenchError("there are no batches to train on")
    trained = list(student.parameters()) if everything else [p for mixer in student.mixers for p in mixer.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(several))
    by_layer, by_logits = [], []
    from tqdm.auto import tqdm

    with torch.inference_mode(mode=False), torch.enable_grad():
        for batch in tqdm(several, desc="distil", disable=not progress):
            found, sizes = losses(teacher, student, batch, temperature)
            total = layer_weight * found.layers.sum() + logit_weight * found.logits
            gradients = torch.autograd.grad(total, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            by_layer.append((found.layers / sizes).detach())
            by_logits.append(found.logits.detach())
    settings = {"rate": rate, "layer_weight": layer_weight, "logit_weight": logit_weight, "temperature": temperature,
                "everything": everything, "steps": len(several)}  # fmt: skip
    return Distillation(
        student.replaced, torch.stack(by_layer).float().cpu(), torch.stack(by_logits).float().cpu(),
        wb.provenance() | {"distillation": settings},
    )  # fmt: skip


def _first(output: Any) -> Tensor:
    """The tensor that a block gives, alone or first of several."""
    found = output if isinstance(output, Tensor) else output[0]
    if not isinstance(found, Tensor):
        raise WorkbenchError(f"a block gave a {type(found).__name__}, where hidden states were looked for")
    return found


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise WorkbenchError(f"the model gave a {type(output).__name__} without logits", hint="a causal language model")
    return found
