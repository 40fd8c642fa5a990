"""What a model's output is measured with: ready measures by name, and those that users write."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError, nearest

_IGNORED = -100  # a label that does not count, as in PyTorch's cross-entropy


@dataclass(frozen=True)
class Measure:
    """A number for each example of a batch.

    Attributes:
        name: what it is called.
        function: `function(output, batch)` gives [batch]; of a divergence, `function(output, batch, clean_output)`.
        higher: True if a better model has more of it, False if less; None for a divergence from the unedited model.
        differentiable: whether it has gradients, at the unedited model.
    """

    name: str
    function: Callable[..., Tensor]
    higher: bool | None = True
    differentiable: bool = True

    def reads(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The token positions whose logits it reads, None for all; of a function, what its attribute `reads` says."""
        reads = getattr(self.function, "reads", None)
        found: Tensor | None = None if reads is None else reads(batch)
        return found

    @property
    def against_clean(self) -> bool:
        """Whether it compares with the unedited model's output."""
        return self.higher is None

    def __call__(self, output: Any, batch: Mapping[str, Any], clean: Any = None) -> Tensor:
        """[batch]."""
        return self.function(output, batch, clean) if self.against_clean else self.function(output, batch)

    def harm(self, edited: Tensor, clean: Tensor) -> Tensor:
        """How much worse the edited model is: positive where the edit has hurt, in the measure's unit."""
        if self.higher is None:
            return edited
        return clean - edited if self.higher else edited - clean


def as_measures(metric: Any) -> dict[str, Measure]:
    """Measures by name, from one or several names, measures or functions, or a dict of them.

    A function is taken to be higher for a better model; `Measure(name, function, higher=False)` says otherwise.

    Raises:
        WorkbenchError: an unknown name, or what is no function.
    """
    if isinstance(metric, Mapping):
        found = [_as_measure(value, str(name)) for name, value in metric.items()]
    else:
        found = [_as_measure(value, None) for value in (metric if isinstance(metric, (list, tuple)) else [metric])]
    if not found:
        raise WorkbenchError("there is no metric", hint=f"give one or several of {', '.join(READY)}, or functions")
    named = {measure.name: measure for measure in found}
    if len(named) < len(found):
        raise WorkbenchError("two metrics have the same name", hint="give a dict of metrics by name")
    return named


def _as_measure(value: Any, name: str | None) -> Measure:
    if isinstance(value, str):
        if value not in READY:
            raise WorkbenchError(f'there is no metric "{value}"', hint=nearest(value, list(READY), "metric"))
        value = READY[value]
    if isinstance(value, Measure):
        return Measure(name or value.name, value.function, value.higher, value.differentiable)
    if not callable(value):
        raise WorkbenchError(f"a metric is a name or a function of output and batch, not {type(value).__name__}")
    own = getattr(value, "__name__", type(value).__name__)
    return Measure(name or ("metric" if own == "<lambda>" else own), value)


@dataclass
class _Readout:
    """Logits [batch, place, class], and which places count [batch or 1, place or 1], with their targets where known."""

    logits: Tensor
    counts: Tensor
    targets: Tensor | None = None

    def mean(self, values: Tensor) -> Tensor:
        """[batch]: the mean over the places that count."""
        counts = self.counts.expand(values.shape)
        return values.masked_fill(~counts, 0.0).sum(-1) / counts.sum(-1)

    def target(self) -> Tensor:
        """Targets [batch, place, 1], with 0 where none counts."""
        if self.targets is None:
            raise WorkbenchError(
                "what the right class is cannot be told from the batch",
                hint="put labels into the batches, use a task's batches, or give a metric of your own",
            )
        return self.targets.clamp_min(0)[..., None]


def logits_of(output: Any) -> Tensor:
    """A model's logits.

    Raises:
        WorkbenchError: it gives none.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise WorkbenchError(
            f"{type(output).__name__} has no logits [batch, class] or [batch, position, class]",
            shape=getattr(found, "shape", None),
            hint="give a metric of your own: metric(output, batch) -> [batch]",
        )
    return found if found.dtype == torch.float64 else found.float()


def _readout(output: Any, batch: Mapping[str, Any]) -> _Readout:
    """Where the model says its classes. Labels [batch] are classes; labels [batch, position] tokens, those of the next
    position where they repeat the input; without labels, the next tokens of the input are the targets."""
    logits = logits_of(output)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if logits.dim() == 2:
        targets = labels[:, None] if isinstance(labels, Tensor) and labels.dim() == 1 else None
        always = torch.ones(1, 1, dtype=torch.bool, device=logits.device)
        return _Readout(logits[:, None], always if targets is None else targets != _IGNORED, targets)
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if "decoder_input_ids" in batch:
        mask = batch.get("decoder_attention_mask")
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:2]:
        counted = labels != _IGNORED
        repeats = isinstance(ids, Tensor) and ids.shape == labels.shape and bool(((ids == labels) | ~counted).all())
        if not repeats:
            return _Readout(logits, counted, labels)
        return _Readout(logits[:, :-1], counted[:, 1:], labels[:, 1:])
    if isinstance(ids, Tensor) and ids.shape == logits.shape[:2]:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return _Readout(logits[:, :-1], real[:, 1:] & real[:, :-1], ids[:, 1:])
    return _Readout(logits, torch.ones(1, 1, dtype=torch.bool, device=logits.device))


def _answers(output: Any, batch: Any) -> tuple[Tensor, list[list[int]], list[list[int]]] | None:
    """Logits at the last token [batch, class] with the right and the wrong answers, of a task's batch."""
    if not hasattr(batch, "answers") or not hasattr(batch, "wrong"):
        return None
    import workbench

    last = workbench.tasks.metrics.last_logits(logits_of(output), batch)
    return last, [list(right) for right in batch.answers], [list(wrong) for wrong in batch.wrong]


def _right(output: Any, batch: Any) -> Tensor | None:
    """[batch] log of the probability of the right answers of a task's batch."""
    task = _answers(output, batch)
    if task is None:
        return None
    logs = task[0].log_softmax(-1)
    return torch.stack([row[right].logsumexp(0) for row, right in zip(logs, task[1], strict=True)])


def loss(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the right class, or of the right tokens (their mean), in nats: [batch]."""
    right = _right(output, batch)
    if right is not None:
        return -right
    read = _readout(output, batch)
    return read.mean(-read.logits.log_softmax(-1).gather(-1, read.target())[..., 0])


def probability(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Probability of the right class, or of the right tokens (their mean): [batch]."""
    right = _right(output, batch)
    if right is not None:
        return right.exp()
    read = _readout(output, batch)
    return read.mean(read.logits.softmax(-1).gather(-1, read.target())[..., 0])


def accuracy(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """1 where the right class is the most likely one, else 0; of tokens, their mean: [batch]."""
    task = _answers(output, batch)
    if task is not None:
        best = task[0].argmax(-1).tolist()
        return torch.tensor([float(one in right) for one, right in zip(best, task[1], strict=True)])
    read = _readout(output, batch)
    return read.mean((read.logits.argmax(-1, keepdim=True) == read.target())[..., 0].to(read.logits.dtype))


def logit_diff(output: Any, batch: Mapping[str, Any]) -> Tensor:
    """Logit of the right class minus the largest other one, or, of a task's batch, minus that of its wrong answer."""
    task = _answers(output, batch)
    if task is not None:
        sides = zip(*task, strict=True)
        return torch.stack([row[right].logsumexp(0) - row[wrong].logsumexp(0) for row, right, wrong in sides])
    read = _readout(output, batch)
    right = read.logits.gather(-1, read.target())[..., 0]
    others = read.logits.scatter(-1, read.target(), -torch.inf).amax(-1)
    return read.mean(right - others)


def js_divergence(output: Any, batch: Mapping[str, Any], clean: Any) -> Tensor:
    """Jensen-Shannon divergence from the unedited model's classes, in nats, 0 to ln 2; of tokens, their mean: [batch].

    JSD(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2.
    """
    task = _answers(output, batch)
    if task is not None:
        before = _answers(clean, batch)
        assert before is not None
        return jensen_shannon(task[0].double(), before[0].double())
    read, before_read = _readout(output, batch), _readout(clean, batch)
    # One example at a time: in double precision, which small divergences need, all would take much memory.
    pairs = zip(read.logits, before_read.logits, strict=True)
    return read.mean(torch.stack([jensen_shannon(a.double(), b.double()) for a, b in pairs]))


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """JSD of the softmax of two tensors of logits [..., class], in nats: [...].

    >>> float(jensen_shannon(torch.tensor([0.0, -1e9]), torch.tensor([-1e9, 0.0])))  # ln 2
    0.693147...
    """
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = [torch.where(log.exp() > 0, log.exp() * (log - log_m), 0.0) for log in (log_p, log_q)]
    return (0.5 * (terms[0] + terms[1]).sum(-1)).clamp_min(0.0)


def representation(position: int | None = None) -> Measure:
    """1 − cosine of the last hidden state and that of the unedited model; 0 for no change, 2 for the opposite.

    Args:
        position: at one token, such as 0 for CLS; None for the mean over the tokens that `attention_mask` calls real.
    """

    def change(output: Any, batch: Mapping[str, Any], clean: Any) -> Tensor:
        now, before = (_last_hidden(given).double() for given in (output, clean))
        off = 1 - torch.nn.functional.cosine_similarity(now, before, dim=-1)  # [batch, position], or [batch]
        if off.dim() == 1:
            return off
        if position is not None:
            return off[:, position]
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        fits = isinstance(mask, Tensor) and mask.shape == off.shape
        return _Readout(off, mask.bool() if fits and mask is not None else torch.ones_like(off).bool()).mean(off)

    change.__qualname__ = f"representation({position})"
    return Measure("representation", change, higher=None, differentiable=False)


def _last_hidden(output: Any) -> Tensor:
    """[batch, position, d_model], or [batch, d_model]."""
    states = None
    for name in ("last_hidden_state", "decoder_hidden_states", "hidden_states"):
        states = getattr(output, name, None)
        if states is not None:
            break
    found = states[-1] if isinstance(states, (tuple, list)) and states else states
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise WorkbenchError(
            f"{type(output).__name__} holds no last hidden state",
            hint='put "output_hidden_states": True into the batches',
        )
    return found


def _answers_at(batch: Any) -> Tensor | None:
    """Where a task's batch is measured; None for other batches, of which all places count."""
    if not hasattr(batch, "answers") or not hasattr(batch, "wrong"):
        return None
    import workbench

    found: Tensor = workbench.tasks.metrics.last_places(batch)
    return found


for _function in (loss, logit_diff, probability, js_divergence, accuracy):
    setattr(_function, "reads", _answers_at)  # noqa: B010

READY = {
    "loss": Measure("loss", loss, higher=False),
    "logit_diff": Measure("logit_diff", logit_diff),
    "probability": Measure("probability", probability),
    "js_divergence": Measure("js_divergence", js_divergence, higher=None, differentiable=False),
    "accuracy": Measure("accuracy", accuracy, differentiable=False),
    "representation": representation(),
}
"""The ready measures by name. Divergences have no gradient at the unedited model: it is their minimum."""
