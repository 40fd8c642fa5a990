"""Which sites a user means."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from workbench.errors import CaptureError
from workbench.hooks.sites import Site, Sites

SiteChoice = None | str | int | Site | Callable[[Site], bool] | Iterable[str | int | Site]


def choose(sites: Sites, wanted: SiteChoice) -> frozenset[str] | None:
    """Names of the wanted sites: a name, TransformerLens name, index, Site, test, or several; None for all."""
    if wanted is None:
        return None
    if callable(wanted):
        names = frozenset(site.name for site in sites if wanted(site))
    else:
        several = [wanted] if isinstance(wanted, (str, int, Site)) else list(wanted)
        names = frozenset(one.name if isinstance(one, Site) else sites[one].name for one in several)
    if not names:
        raise CaptureError("no site was chosen", hint=f"the model has {len(sites)} sites; sites=None takes all")
    return names
