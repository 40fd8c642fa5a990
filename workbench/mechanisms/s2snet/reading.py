"""What the model looks at, by element and by atom."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.patterns import Pattern
from workbench.mechanisms.s2snet.model import S2SNet

if TYPE_CHECKING:
    import pandas as pd


def atom_gradients(model: S2SNet, numbers: Tensor, positions: Tensor) -> Tensor:
    """[crystal, atom]: Σ |∂ logit / ∂ atom| of the second class over features, as shares of a crystal; a surrogate."""
    atoms = model.atoms(numbers, positions).detach().requires_grad_()
    real = numbers > 0
    logit = model.head(model.read(model.encoded(atoms, real), real))[:, 1].sum()
    (gradient,) = torch.autograd.grad(logit, atoms)
    size = gradient.abs().sum(-1) * real
    return size / size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)


def element_pairs(pattern: Pattern, numbers: Tensor) -> pd.DataFrame:
    """Mean weight of atoms of one element on an atom of another: rows are queries, columns keys, NaN where none meet.

    Args:
        pattern: of a layer, [crystal, head, atom, atom]. numbers: [crystal, atom].

    Raises:
        WorkbenchError: numbers of other crystals.
    """
    import pandas as pd

    if numbers.shape != (pattern.n_batch, pattern.n_keys) or pattern.n_queries != pattern.n_keys:
        raise WorkbenchError(f"the map is {list(pattern.shape)}", shape=numbers.shape, hint="that of the same crystals")
    weights = pattern.dense().double().mean(1)
    elements = [int(z) for z in numbers.unique() if z > 0]
    of = torch.stack([numbers == z for z in elements]).double()  # [element, crystal, atom]
    total = torch.einsum("ebi,bij,fbj->ef", of, weights, of)
    pairs = torch.einsum("ebi,fbj->ef", of, of)
    mean = torch.where(pairs > 0, total / pairs.clamp(min=1), torch.nan)
    return pd.DataFrame(mean.numpy(), index=pd.Index(elements, name="query"), columns=pd.Index(elements, name="key"))
