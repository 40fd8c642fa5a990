"""Finds the module that joins the heads of a site: the first linear one that is called with exactly their outputs.

It is found while a forward runs, by value, so that no model needs to be known by name. Where a gate between 0 and 1
lies before it, inside of the site's module, each number of a head is still its own, and what enters is handed out.
Where something else changes the heads' outputs on the way (a norm), nothing is found: a head then has no linear part in
what follows. Where a second linear function is applied to them (an adapter), the first is only a part of what joins
them. In each forward after the one in which it was found, it is compared again what enters it, without waiting for a
device: models are edited between their forwards.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.weights import AsTheyWere, matrix, sources


@dataclass(frozen=True)
class Projection:
    """The output projection of a site. It does not keep the model alive, and a pickle of it is without the module.

    Attributes:
        name: path of the module in the model.
        weights: what its weight was made of when the capture was made.
        beside: where else the heads' outputs entered a linear function; "" if nowhere.
        proof: bool [], whether what entered it were the heads' outputs; None where it was found in this forward.
    """

    name: str
    weights: AsTheyWere
    beside: str = ""
    proof: Tensor | None = field(default=None, compare=False, repr=False)
    _module: weakref.ref[nn.Module] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, module: nn.Module, beside: str = "", proof: Tensor | None = None) -> Projection:
        """The projection as it is now."""
        return cls(name, AsTheyWere.of(sources(module)), beside, proof, weakref.ref(module))

    @classmethod
    def of_all(cls, several: Sequence[Projection | None]) -> Projection | None:
        """That of several calls of a site; None unless all have the same."""
        first = several[0]
        for one in several[1:]:
            if first is None or one is None or (one.name, one.weights) != (first.name, first.weights):
                return None
            proofs = [proof for proof in (first.proof, one.proof) if proof is not None]
            first = replace(first, beside=first.beside or one.beside, proof=_all(proofs))
        return first

    @property
    def module(self) -> nn.Module:
        """The linear module.

        Raises:
            CaptureError: the model is gone.
        """
        found = None if self._module is None else self._module()
        if found is None:
            raise CaptureError(
                f"the model is gone, and {self.name} with it",
                hint="compute results while the model is there, or keep them: save(path, result=True)",
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"proof": None, "_module": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Projection:
        return self

    def slices(self, n_heads: int, width: int) -> Tensor:
        """[head, width, d_model], as `projection_slices` gives them.

        Raises:
            CaptureError: the weight has changed since the capture, cannot be cut into heads, or was given something
                else.
        """
        module = self.module
        if self.proof is not None and not bool(self.proof):
            raise CaptureError(
                f"{self.name} was not given the heads' outputs as they are, as it was in an earlier forward",
                hint="capture forwards before and after a change of the model apart",
            )
        if self.weights.have_changed(sources(module)):
            raise CaptureError(
                f"the weight of {self.name} has changed since the capture",
                hint="compute results before the next step of training, or capture again",
            )
        if self.beside or self.name.endswith(".base_layer"):  # so named, an adapter may also scale what it gives
            how = f"{self.beside} is applied to the heads' outputs too" if self.beside else "an adapter adds to it"
            raise CaptureError(
                f"{self.name} is only a part of its projection: {how}",
                hint="if that is an adapter, merge it into the model first",
            )
        return projection_slices(module, n_heads, width)


def projection_slices(module: nn.Module, n_heads: int, width: int) -> Tensor:
    """Each head's part of W_O, [head, width, d_model], so that out = Σ_h z_h @ slice_h + bias; a view of the weight
    where that is a plain tensor.

    Raises:
        CaptureError: the weight is not a floating-point matrix of n_heads · width inputs.

    >>> projection_slices(nn.Linear(6, 4), n_heads=3, width=2).shape
    torch.Size([3, 2, 4])
    """
    weight = matrix(module) if is_conv1d(module) else matrix(module).T  # [head · width, d_model]
    if weight.shape[0] != n_heads * width:
        raise CaptureError(f"a projection of {n_heads} heads of {width} has other inputs", shape=weight.shape)
    return weight.unflatten(0, (n_heads, width))


@dataclass
class _Again:
    """What is seen in one thread's forward of projections that were found before.

    Attributes:
        merged: by site, what the heads of its last call gave [batch, query, head · width]; entered: bool [] for each
            time that its projection ran since, whether that is what it was given. done: the same of earlier calls;
            missed: sites of them whose projection did not run.
        last: what the last of them was given, while it lives; others: by place, which linear modules were given it.
    """

    merged: dict[str, Tensor] = field(default_factory=dict)
    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    done: dict[str, list[Tensor]] = field(default_factory=dict)
    missed: set[str] = field(default_factory=set)
    last: weakref.ref[Tensor] | None = None
    others: dict[int, tuple[weakref.ref[Tensor], list[tuple[str, nn.Module]]]] = field(default_factory=dict)

    def called(self, site: str, merged: Tensor) -> None:
        """A site's heads gave this; of what they gave before no more will enter."""
        self._settle(site)
        self.merged[site], self.entered[site] = merged, []

    def _settle(self, site: str) -> None:
        if site in self.merged:
            device = self.merged.pop(site).device
            found = self.entered.pop(site)
            self.missed.update(() if found else [site])
            proof = torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=device)
            self.done.setdefault(site, []).append(proof)

    def proof(self, site: str) -> Tensor | None:
        """bool [], whether the heads' outputs entered the projection at each call; None if there was none."""
        self._settle(site)
        return _all(self.done.get(site, []))

    def not_called(self) -> set[str]:
        """Sites of which a call was told, and whose projection did not run after it."""
        for site in list(self.merged):
            self._settle(site)
        return self.missed

    def given(self, name: str, module: nn.Module, given: Tensor) -> list[tuple[str, nn.Module]]:
        """A linear module is about to be applied to this. Given are all that were applied to the same tensor."""
        ref, users = self.others.get(given.data_ptr(), (None, []))
        before = None if ref is None else ref()
        if before is None or before.numel() != given.numel():
            users = []
        users.append((name, module))
        self.others[given.data_ptr()] = weakref.ref(given), users
        return users


class ProjectionFinder:
    """Looks for the projections of sites while a model runs: for each once, until it is not called any more."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, nn.Module]] = {}
        self._joining: dict[nn.Module, str] = {}  # the sites of these modules
        self._unproved: set[str] = set()  # sites of them whose heads' outputs were zero, which a gate and a norm leave
        self._past: set[str] = set()  # sites between whose heads' outputs and projection something lies
        self._gated: set[str] = set()  # those of them where it is a gate
        self._beside: dict[str, str] = {}  # what else the heads' outputs entered, by site
        self._awaited: dict[int, dict[str, Tensor]] = {}  # by thread and site: [batch, query, head · width]
        self._entered: dict[int, dict[str, weakref.ref[Tensor]]] = {}  # what a projection was given, while it lives
        self._again: dict[int, _Again] = {}  # by thread
        self._source: dict[int, dict[str, weakref.ref[Tensor]]] = {}  # by thread and site: of what call

    def knows(self, site: str) -> bool:
        """Whether the projection of a site was found, by outputs of its heads that were not all zero."""
        return site in self._found and site not in self._unproved

    def gated(self, site: str) -> bool:
        """Whether a gate was found before the projection of a site."""
        return site in self._gated

    def awaits(self, site: str, output: Tensor | None = None) -> bool:
        """Whether a call of the site was told in this thread's forward; if given, the one with this output."""
        source = self._source.get(threading.get_ident(), {}).get(site)
        return source is not None and (output is None or source() is output)

    def knows_of(self, site: str, name: str, module: nn.Module) -> None:
        """The projection of a site was found by other means: that of a module which has a reader."""
        if site not in self._found:
            self._found[site] = name, module
            self._past.add(site)

    def joins(self, site: str, name: str, module: nn.Module) -> None:
        """What joins the heads of a site, as they are, was found by other means: in a compiled graph."""
        self._found[site] = name, module

    def saw_call(self, site: str, module: nn.Module, z: Tensor, output: Tensor | None = None) -> None:
        """An attention call gave z [batch, query, head, width], in memory that stays as it is; `output` as the kernel
        gave it.
        """
        if isinstance(module, nn.MultiheadAttention):  # its projection is applied without being called
            self._found[site] = f"{site}.out_proj".lstrip("."), module.out_proj
            return
        thread = threading.get_ident()
        if output is not None:
            self._source.setdefault(thread, {})[site] = weakref.ref(output)
        if self.knows(site) and site not in self._gated:
            self._again.setdefault(thread, _Again()).called(site, z.flatten(2))
            return
        if site in self._unproved and bool(z.any()):
            self._unproved.discard(site)
            self._forget(site)
        self._awaited.setdefault(thread, {})[site] = z.flatten(2)

    def saw_module(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[str, Tensor] | None:
        """A module of the model is about to run on `args`.

        Returns:
            A site, and what its heads give to their projection [batch, query, head · width], where that is this module
            and a gate lies before it.
        """
        thread = threading.get_ident()
        awaited, entered, again = self._awaited.get(thread), self._entered.get(thread), self._again.get(thread)
        if not (awaited or entered or again) or not is_linear(module) or not args or not isinstance(args[0], Tensor):
            return None
        if again is not None:
            self._compare_again(again, name, module, args[0])
        if entered:
            self._compare(entered, name, module, args[0])
        for site, merged in (awaited or {}).items():
            found = self._found[site] if self.knows(site) else None
            through = (not site or name.startswith(f"{site}.")) if found is None else found[1] is module
            if found is None and _same(args[0], merged):
                gate = False
            elif through and gated(args[0], merged):
                gate = True
            else:
                continue
            del self._awaited[thread][site]
            if found is None:
                self._found[site] = name, module
                self._joining[module] = site
                if not bool(merged.any()):
                    self._unproved.add(site)
                    return None
                self._entered.setdefault(thread, {})[site] = weakref.ref(args[0])
                if gate:
                    self._past.add(site)
                    self._gated.add(site)
            return (site, args[0].detach().reshape(merged.shape)) if gate else None
        return None

    def follows(self) -> bool:
        """Whether `saw_linear` is to be told: what a projection was given is still there, in this thread."""
        thread = threading.get_ident()
        again = self._again.get(thread)
        last = None if again is None else again.last
        return bool(self._entered.get(thread)) or (last is not None and last() is not None)

    def saw_linear(self, name: str, module: nn.Module, given: Tensor) -> None:
        """A module that is no linear one applies a linear function to `given`, by its own code."""
        thread = threading.get_ident()
        entered, again = self._entered.get(thread), self._again.get(thread)
        if is_linear(module):
            return
        name = f"a linear function of {name}"
        if entered:
            self._compare(entered, name, module, given)
        if again is not None:
            self._compare_again(again, name, module, given)

    def _compare(self, entered: dict[str, weakref.ref[Tensor]], name: str, module: nn.Module, given: Tensor) -> None:
        for site, ref in list(entered.items()):
            joined = ref()
            if joined is None:
                del entered[site]
            elif self._found[site][1] is not module and (given is joined or _equal(given, joined)):
                self._beside.setdefault(site, name)

    def _compare_again(self, again: _Again, name: str, module: nn.Module, given: Tensor) -> None:
        """Whether what enters a projection is what its heads gave; and what else is applied to the same tensor."""
        site = self._joining.get(module)
        if site in again.merged:
            again.entered[site].append(_is_same(given, again.merged[site]))
            again.last = weakref.ref(given)
        users = again.given(name, module, given) if given.layout == torch.strided else []
        for one in {self._joining[user] for _, user in users if user in self._joining} if len(users) > 1 else ():
            other = next((path for path, user in users if self._joining.get(user) != one), None)
            if other is not None:
                self._beside.setdefault(one, other)

    def end(self, thread: int) -> None:
        """The forward of that thread is over. What was not called in it is looked for anew."""
        again = self._again.pop(thread, None)
        for site in () if again is None else again.not_called():
            self._forget(site)
        for kept in (self._awaited, self._entered, self._source):
            kept.pop(thread, None)

    def _forget(self, site: str) -> None:
        self._joining.pop(self._found.pop(site)[1], None)

    def of(self, site: str, *, entering: bool = False, thread: int | None = None) -> Projection | None:
        """The projection of a site, if one was found.

        Args:
            entering: what enters it is at hand, beside the heads' outputs. Where it is not, a projection that is given
                something else than these outputs is of no use.
            thread: whose forward it is of, which has not ended yet.
        """
        if site not in self._found or (site in self._past and not entering):
            return None
        again = None if thread is None else self._again.get(thread)
        return Projection.of(
            *self._found[site], self._beside.get(site, ""), None if again is None else again.proof(site)
        )


def _all(proofs: Sequence[Tensor]) -> Tensor | None:
    return None if not proofs else proofs[0] if len(proofs) == 1 else torch.stack(list(proofs)).all()


def _is_same(given: Tensor, merged: Tensor) -> Tensor:
    """As `_same`, without waiting for a device."""
    if given.shape[-1:] != merged.shape[-1:] or given.numel() != merged.numel() or given.device != merged.device:
        return torch.tensor(_same(given, merged), device=merged.device)
    given, merged = given.detach(), merged.to(dtype=given.dtype)
    same = (given.reshape(merged.shape) == merged).all()
    if given.dim() == 3 and given.shape[:2] == (merged.shape[1], merged.shape[0]):
        same = same | (given.transpose(0, 1) == merged).all()
    return same


def _equal(given: Tensor, joined: Tensor) -> bool:
    """Whether both have the same numbers, perhaps in other axes or another dtype."""
    if given.shape[-1:] != joined.shape[-1:] or given.numel() != joined.numel() or given.device != joined.device:
        return False
    return torch.equal(given.detach().reshape(joined.shape), joined.detach().to(given.dtype))


def _same(given: Tensor, merged: Tensor) -> bool:
    """Whether a module's input is the merged heads, by value; [query, batch, ...] and flat batches too."""
    if given.shape[-1:] != merged.shape[-1:] or given.numel() != merged.numel():
        return False
    swapped = given.dim() == 3 and given.shape[:2] == (merged.shape[1], merged.shape[0])
    merged = merged.to(device=given.device, dtype=given.dtype)
    flat = given.detach().reshape(merged.shape)
    return torch.equal(flat, merged) or (swapped and torch.equal(given.detach().transpose(0, 1), merged))


def gated(given: Tensor, z: Tensor) -> bool:
    """Whether what a module is given is z, number by number, times something between 0 and 1.

    >>> gated(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, -1.0]])), gated(torch.ones(1, 2), -torch.ones(1, 2))
    (True, False)
    """
    alike = given.shape[-1:] == z.shape[-1:] and given.numel() == z.numel() and given.device == z.device
    if not alike or not given.is_floating_point():
        return False
    given, slack = given.detach().reshape(z.shape), 1 + 8 * torch.finfo(given.dtype).eps
    z = z.to(given.dtype)
    return bool(((given * z >= 0) & (given.abs() <= slack * z.abs())).all())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a weight."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [inputs, outputs]; there is none unless `transformers` is loaded."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)
