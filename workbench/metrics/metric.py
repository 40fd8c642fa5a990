"""`Metric`: one number for each example, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from workbench.errors import TaskError


@dataclass(frozen=True)
class Metric:
    """A number for each example of a batch.

    Attributes:
        name: what it is called in results.
        function: `function(output, batch)` gives [batch]; where `against_clean`, `function(output, batch, clean)`.
        higher_is_better: whether a better model has more of it. Of a divergence, less is closer to the unedited model.
        against_clean: whether it compares with the unedited model's output. It is then smallest there, so that its
            gradient at the unedited model is zero.
        differentiable: whether it has a gradient.
        reads: `reads(batch)` gives the token positions whose logits it reads, or None for all; None: it reads all.
        unit: of its numbers, such as "nats"; "" for shares and counts.
        from_logits: whether logits are all that it reads; else the model has to give more, such as hidden states.

    >>> import torch
    >>> spread = Metric("spread", lambda output, batch: output.std(-1), higher_is_better=False)
    >>> spread(torch.tensor([[1.0, 1.0]]), {}).tolist(), spread.sign
    ([0.0], -1)
    """

    name: str
    function: Callable[..., Tensor]
    higher_is_better: bool = True
    against_clean: bool = False
    differentiable: bool = True
    reads: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    unit: str = ""
    from_logits: bool = True

    @property
    def sign(self) -> int:
        """1 where higher is better, else −1: what turns a change of the metric into a gain for the task."""
        return 1 if self.higher_is_better else -1

    def __call__(self, output: Any, batch: Mapping[str, Any], clean: Any = None) -> Tensor:
        """[batch]; `clean` is the unedited model's output, which only divergences look at."""
        return self.function(output, batch, clean) if self.against_clean else self.function(output, batch)

    def examples(self, output: Any, batch: Mapping[str, Any], n: int, clean: Any = None) -> Tensor:
        """[n], checked.

        Raises:
            TaskError: it gave something other than one real number for each example.
        """
        value = self(output, batch, clean)
        if not isinstance(value, Tensor) or value.shape != (n,) or value.is_complex():
            gave = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TaskError(
                f'the metric "{self.name}" gave {gave}, expected one real number for each of the {n} examples',
                shape=value.shape if isinstance(value, Tensor) else None,
            )
        return value

    def harm(self, edited: Tensor, clean: Tensor) -> Tensor:
        """How much worse the edited model is: positive where the edit has hurt, in the metric's unit."""
        return edited if self.against_clean else self.sign * (clean - edited)
