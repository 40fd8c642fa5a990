"""What the theory says of a head's capacity, each formula in one function (arXiv 2508.08289, v1).

Unless a docstring says otherwise: n pairs are stored by Hebb's rule with rate 1, keys and values are independent and
uniform on unit spheres of R^d_k and R^d_v, and the query is one of the stored keys. The width of the values drops out.
All functions take numbers, arrays or tensors, and give what arithmetic on them gives.
"""

from __future__ import annotations

import math
from typing import Any

from workbench.errors import WorkbenchError


def interference_power(n: Any, d_k: Any) -> Any:
    """Power of the interference, (n − 1) / d_k, where that of the signal is 1 (theorem 6, step 2).

    With keys that are not uniform, 1/d_k becomes the mean squared cosine of two keys.

    >>> interference_power(33, 64)
    0.5
    """
    return (n - 1) / d_k


def snr(n: Any, d_k: Any) -> Any:
    """Signal-to-noise ratio d_k / (n − 1); infinite for one pair (theorem 6, step 3).

    >>> snr(33, 64), snr(1, 64)
    (2.0, inf)
    """
    noise = interference_power(n, d_k)
    return math.inf if isinstance(noise, (int, float)) and noise == 0 else 1 / noise


def average_capacity(d_k: Any, threshold: Any = 1.0) -> Any:
    """Number of pairs at which the SNR falls to a threshold, 1 + d_k / threshold (theorem 6, step 3).

    >>> average_capacity(64, threshold=2)
    33.0
    """
    return 1 + d_k / threshold


def worst_capacity(d_k: Any, delta: Any = 1.0, epsilon: Any = 0.1) -> Any:
    """Number of pairs below which all are retrieved but for a chance ε, √(ε δ d_k) (theorem 6, step 4).

    An item fails when its interference reaches a share δ of the signal's power. Markov's inequality and a union over
    the items: safe, and far below what random keys really allow.

    >>> worst_capacity(256, delta=1, epsilon=0.25)
    8.0
    """
    return (epsilon * delta * d_k) ** 0.5


def failure_bound(n: Any, d_k: Any, delta: Any = 1.0) -> Any:
    """Upper bound on the chance that one item fails, (n − 1) / (δ d_k), by Markov; above 1 it says nothing.

    >>> failure_bound(5, 256)
    0.015625
    """
    return interference_power(n, d_k) / delta


def union_bound(n: Any, d_k: Any, delta: Any = 1.0) -> Any:
    """Upper bound on the chance that any of n items fails, n (n − 1) / (δ d_k).

    >>> union_bound(5, 256)
    0.078125
    """
    return n * failure_bound(n, d_k, delta)


def retained_signal(lag: Any, decay: Any) -> Any:
    """Amplitude γ^t of a pair that was stored t writes ago, under the decay rule."""
    return decay**lag


def retention_noise(lag: Any, decay: Any, d_k: Any) -> Any:
    """Interference power (1/(1 − γ²) − γ^(2t)) / d_k at lag t, in an endless stream of pairs; 0 < γ < 1."""
    return (1 / (1 - decay**2) - decay ** (2 * lag)) / d_k


def retention_snr(lag: Any, decay: Any, d_k: Any) -> Any:
    """SNR of the pair stored t writes ago, in an endless stream of random pairs under decay γ < 1.

    >>> round(retention_snr(0, 0.5, 64), 6) == 64 * (1 - 0.5**2) / 0.5**2
    True
    """
    return retained_signal(lag, decay) ** 2 / retention_noise(lag, decay, d_k)


def memory_span(decay: float, d_k: float, threshold: float = 1.0) -> float:
    """Largest lag t (a real number) at which `retention_snr` is still above a threshold; below 0 for none.

    γ^(2t) d_k = threshold · (1/(1 − γ²) − γ^(2t)), solved for t.

    >>> t = memory_span(0.9, 64)
    >>> round(retention_snr(t, 0.9, 64), 9)
    1.0
    """
    if not 0 < decay < 1:
        raise WorkbenchError(f"decay is {decay}; the span is that of a memory that forgets, 0 < decay < 1")
    share = threshold / ((1 - decay**2) * (d_k + threshold))
    return math.log(share) / (2 * math.log(decay))


def stack_failure(p: Any, depth: Any, heads: Any) -> Any:
    """Chance 1 − (1 − p^H)^L that a stack fails: some layer in which all H heads fail (theorem 9, step 3).

    Heads and layers fail independently, each head with chance p, and one head that succeeds carries its layer.

    >>> stack_failure(0.5, depth=2, heads=2)
    0.4375
    """
    return 1 - (1 - p**heads) ** depth


def stack_failure_linear(p: Any, depth: Any, heads: Any) -> Any:
    """L p^H, at least `stack_failure` and close to it where p^H is far below 1/L (theorem 9, step 4).

    >>> stack_failure_linear(0.5, depth=2, heads=2)
    0.5
    """
    return depth * p**heads


def redundant_stack_failure(p: Any, depth: Any, heads: Any, needed: int) -> Any:
    """Chance that a stack fails when a layer needs `needed` of its H heads: redundancy is H − needed.

    A layer succeeds with the upper tail of a binomial distribution; `needed` = 1 is `stack_failure`, `needed` = H
    has no redundancy. The paper treats the first; the binomial is the same independence carried on.

    >>> redundant_stack_failure(0.5, 2, 2, needed=1), redundant_stack_failure(0.5, 1, 2, needed=2)
    (0.4375, 0.75)
    """
    if not 1 <= needed <= heads:
        raise WorkbenchError(f"a layer of {heads} heads cannot need {needed} of them")
    works = sum(math.comb(heads, k) * (1 - p) ** k * p ** (heads - k) for k in range(needed, heads + 1))
    return 1 - works**depth


def linear_range(d_k: Any, depth: Any, heads: Any, delta: Any = 1.0) -> Any:
    """Number of pairs far below which the linear form holds, δ d_k L^(−1/H) (theorem 9, step 5).

    >>> linear_range(64, depth=4, heads=2)
    32.0
    """
    return delta * d_k * depth ** (-1 / heads)
