"""Numbers and texts that a user gives a view, checked before anything is drawn of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from workbench.errors import ReportError


def real_numbers(values: Any, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values as float64, of a tensor or of what numpy takes for numbers.

    Raises:
        ReportError: they are complex, of which a view would show the real part alone, no numbers, or nowhere.

    >>> real_numbers(torch.tensor([1, 2]), "received")
    array([1., 2.])
    """
    if isinstance(values, torch.Tensor):
        if values.is_meta or values.layout != torch.strided or values.is_quantized:
            raise ReportError(
                f"{what} is no plain tensor of numbers", shape=values.shape, hint="make it dense, on a CPU"
            )
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    try:
        found = np.asarray(values)
        if found.dtype.kind == "c":
            raise ReportError(f"{what} is complex", shape=found.shape, hint="show its size: values.abs()")
        return found.astype(np.float64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ReportError(f"{what} is no numbers: {str(error)[:100]}") from None


def check_texts(tokens: Sequence[Any]) -> Sequence[str]:
    """The tokens, if they are texts.

    Raises:
        ReportError: one is not.
    """
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise ReportError(
                f"token {i} is {type(token).__name__}, expected its text", hint="tokenizer.convert_ids_to_tokens(ids)"
            )
    return tokens
