"""How fast each head forgets: decay rates per head, and their powers, of which none is ever above one."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import CaptureError


def slopes(n_heads: int) -> Tensor:
    """[head] float64 slopes of ALiBi (arXiv 2108.12409): 2^(−8(h+1)/H) for H a power of two.

    Any other H takes the slopes of the power of two below it, then every other one of the power of two above it.

    >>> slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> slopes(3).tolist()
    [0.0625, 0.00390625, 0.25]
    """
    if n_heads < 1:
        raise CaptureError(f"there is no head to give a slope: n_heads is {n_heads}", hint="pass at least 1")
    whole = 1 << (n_heads.bit_length() - 1)

    def regular(n: int) -> list[float]:
        return [2 ** (-8 * (h + 1) / n) for h in range(n)]

    more = regular(2 * whole)[::2][: n_heads - whole]
    return torch.tensor(regular(whole) + more, dtype=torch.float64)


def decays(n_heads: int) -> Tensor:
    """[head] float64 decays λ = exp(−slope), as the released Lightning Attention models set them.

    >>> [round(rate, 4) for rate in decays(2).tolist()]
    [0.9394, 0.9961]
    """
    return torch.exp(-slopes(n_heads))


def check_decay(decay: Tensor | None, n_heads: int) -> Tensor:
    """[head] float64 on the CPU; the default decays for None.

    Raises:
        CaptureError: not one number per head, or one outside (0, 1].
    """
    if decay is None:
        return decays(n_heads)
    if decay.dim() != 1 or len(decay) != n_heads:
        raise CaptureError(
            f"decay must be [head], one number for each of {n_heads} heads",
            shape=decay.shape,
            hint="pass a tensor of that length, or None for decays(n_heads)",
        )
    found = decay.detach().to("cpu", torch.float64)
    for head, value in enumerate(found.tolist()):
        if not 0 < value <= 1:  # NaN too
            raise CaptureError(
                f"the decay of head {head} is {value}, outside (0, 1]",
                hint="pass λ itself, such as exp(-slope), neither the slope nor log λ",
            )
    return found


def powers(decay: Tensor, exponents: Tensor, like: Tensor) -> Tensor:
    """λ^exponent, [head, *exponents.shape] with the dtype and device of `like`; exponents are at least zero.

    Powers too small for a normal number of that dtype are zero: a CPU takes far longer over subnormal ones.
    """
    exponents = exponents.to(decay)
    found = decay.view(-1, *[1] * exponents.dim()) ** exponents
    return torch.where(found < torch.finfo(like.dtype).tiny, 0.0, found).to(like)
