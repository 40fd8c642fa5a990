"""Numbers and what they count, in words."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int, noun: str, several: str | None = None) -> str:
    """A number and what it counts.

    Args:
        several: the noun for several, where it is not the noun with an s.

    >>> count(1, "head"), count(1200, "head"), count(2, "query", "queries")
    ('1 head', '1,200 heads', '2 queries')
    """
    return f"{number:,} {noun if number == 1 else several or f'{noun}s'}"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """What has these numbers.

    >>> numbered("Figure", [2]), numbered("Section", [1, 3])
    ('Figure 2', 'Sections 1, 3')
    """
    return f"{noun if len(numbers) == 1 else f'{noun}s'} {', '.join(map(str, numbers))}"
