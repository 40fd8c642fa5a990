"""Where the heads of a site join: the linear layer that writes to the stream, and what each of them gives to it.

Of plain attention that is the head's output z. Behind a gate (Qwen3-Next's attention), and past the norm, gate and skip
of a recurrence, it is z as these leave it. Such a module is a mixer here: its heads write a sum, but what they compute
with is read from the stream by the module as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.reasons import INSTEAD, two_mixers
from workbench.analysis.circuits.model.recording import Recording, equal, factors_between, same_sum
from workbench.errors import AttachError
from workbench.hooks.entering import entering, own_columns
from workbench.hooks.projections import gated, is_linear
from workbench.hooks.sites import Site
from workbench.hooks.tap import AttentionCall

_LIKE = 1e-3  # by how much what a reader says enters the projection may be off what did, of its length; at least


@dataclass(frozen=True)
class Joint:
    """Attributes:
    name: of the layer. module: the layer.
    heads: [batch, position, head, width] that it was given.
    mixer: whether the site's module reads the stream as a whole; see the top of this file.
    """

    name: str
    module: nn.Module
    heads: Tensor
    mixer: bool

    @property
    def n_heads(self) -> int:
        """How many there are."""
        return self.heads.shape[2]


def only_call(seen: Recording, site: Site) -> AttentionCall:
    """The only call of a site.

    Raises:
        AttachError: there are several, or some of its heads are in other processes.
    """
    calls = seen.calls.get(site.name, [])
    if len(calls) != 1:
        raise AttachError(f"the site was called {len(calls)} times in one forward, once is needed", site=site.name)
    if calls[0].shard is not None:
        raise AttachError(
            f"all heads are needed in one process, and {site.elsewhere or 'some are in others'}",
            site=site.name,
            hint="load the model without tensor parallelism",
        )
    return calls[0]


def call_of(seen: Recording, site: Site) -> AttentionCall:
    """The only call of a site, with what plays the part of its queries and keys.

    Raises:
        AttachError: there are several, some heads are in other processes, or queries and keys are not seen.
    """
    call = only_call(seen, site)
    if call.finish is None and call.weights is None and (call.q is None or call.k is None or call.q.dim() != 4):
        raise AttachError("queries and keys are not seen at this site", site=site.name)
    return call


def find_joint(seen: Recording, site: Site) -> Joint:
    """The layer that joins the heads of a site.

    Raises:
        AttachError: there is none to which each head gives columns of its own, or not one call.
    """
    call = only_call(seen, site)
    if call.finish is not None:
        return _past_finish(seen, site, call)
    z = call.z().detach().transpose(1, 2)
    projection = seen.finder.of(site.name)
    if projection is not None:
        return Joint(projection.name, projection.module, z, mixer=False)
    name = _last_linear(seen, site, call)
    given = None if name is None else seen.given.get(name)
    if name is not None and given is not None and given.shape == z.flatten(2).shape and gated(given, z.flatten(2)):
        return Joint(name, call.module.get_submodule(_inside(name, site)), given.view_as(z), mixer=True)
    raise AttachError(
        "the module that joins the heads was not found: something (a norm, another gate) lies between",
        site=site.name,
        hint="heads of this model have no linear part in the residual stream",
    )


def factors_of(seen: Recording, sites: Sequence[Site], block: str) -> list[float]:
    """By what a block multiplies what its mixers, if there are several side by side, add to the stream.

    Found by the stream behind them, which some module reads, or which the block gives. Where an only mixer leaves no
    such stream (an MLP reads beside it) the factor is 1.

    Raises:
        AttachError: no sum of what they write is there, or both are of one kind.
    """
    if len({site.kind == "state" for site in sites}) < len(sites):
        raise _two(seen, sites, block)  # the names of nodes tell a recurrence from attention
    before = seen.given[block]
    parts = torch.stack([seen.gave[find_joint(seen, site).name] for site in sites], dim=-1)
    inside = [name for name in dict.fromkeys(seen.order) if name.startswith(f"{block}.") and name in seen.given]
    ends = [end for end in (*(seen.given[name] for name in inside), seen.gave[block]) if end.shape == before.shape]
    size = before.abs() + parts.abs().sum(-1)
    # In half precision a factor near 1 may fit some other end: what is added as it is comes first.
    if any(same_sum(end, before + parts.sum(-1), size, seen.eps) for end in ends):
        return [1.0] * len(sites)
    for end in ends:
        factors = factors_between(before, parts, end, seen.eps)
        if factors is not None:
            return [float(factor) for factor in factors]
    if len(sites) > 1:
        raise _two(seen, sites, block)
    return [1.0]


def _two(seen: Recording, sites: Sequence[Site], block: str) -> AttachError:
    return AttachError(two_mixers(seen, block, sites[0].name, sites[1].name), site=sites[1].name, hint=INSTEAD)


def _past_finish(seen: Recording, site: Site, call: AttentionCall) -> Joint:
    assert call.finish is not None
    with torch.no_grad():
        z = call.mixed.detach()
        found = entering(call.module, call.finish, z)
        own = found is not None and own_columns(call.module, call.finish, z, found)
    name = "" if found is None else f"{site.name}.{found.name}"
    given = seen.given.get(name)
    if found is None or not own or given is None or given.shape[-1] != z.shape[1] * found.heads.shape[-1]:
        raise AttachError(
            f"what the heads of this {type(call.module).__name__} write cannot be told apart: no linear layer ends it "
            "that is given columns of each",
            site=site.name,
            hint="head_importance, run_sweep, wb.ablate and wb.patch measure and change heads of any model",
        )
    heads = given.unflatten(-1, (z.shape[1], -1))
    want, off = heads.double(), found.heads.transpose(1, 2).double() - heads.double()
    if not float(off.norm()) <= max(_LIKE, 8 * seen.eps) * float(want.norm()):
        raise AttachError(f"{name} was given something else than what is read of the heads", site=site.name)
    return Joint(name, found.module, heads, mixer=True)


def _last_linear(seen: Recording, site: Site, call: AttentionCall) -> str | None:
    """The linear layer whose output is the module's."""
    inside = {f"{site.name}.{name}".strip("."): module for name, module in call.module.named_modules() if name}
    linear = [name for name in seen.order if name in inside and is_linear(inside[name])]
    gave = seen.gave.get(site.name)
    return next((name for name in reversed(linear) if equal(seen.gave.get(name), gave)), None)


def _inside(name: str, site: Site) -> str:
    return name.removeprefix(f"{site.name}.")
