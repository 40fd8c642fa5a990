"""Proof that the taps tell the truth on a model: it is run bare and observed, and everything seen is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import AttachError
from workbench.hooks.layouts import Layouts
from workbench.hooks.listener import Listener
from workbench.hooks.nested import fresh, tensors_within
from workbench.hooks.observer import observed
from workbench.hooks.sites import Sites, Unread
from workbench.hooks.tap import AttentionCall, Unshown
from workbench.hooks.truth import tolerance

if TYPE_CHECKING:
    import pandas as pd


_COLUMNS = [
    "site", "fired", "shape", "backend", "kernel", "row_sum_error", "output_error", "tolerance", "editable", "idle",
    "ok",
]  # fmt: skip


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        identical: the observed model's outputs equal the bare model's to the bit.
        checks: one dict per call: site, fired, shape ([batch, head, query, key], of which this process checks the heads
            that it holds), backend, kernel, row_sum_error
            (largest |Σp − 1|, NaN for rows that need not sum to 1), output_error (largest |A·V − kernel output|),
            tolerance (for both, by dtype and size of the output), editable (whether the model's output changes when the
            site's heads give nothing; None if that was not tried), idle (it does not, and yet what they give reaches
            the output, by its gradient: such as before a projection whose weights are zero), ok.
        unread: modules that mix tokens and are no site, so that nothing of this is about them. looked: whether that
            list is complete.
        compared: the model's output has tensors; without any there is nothing to compare, nor to be changed.
        unrecorded: by site, why no map shows what it does on these inputs.
    """

    model: str
    identical: bool
    checks: list[dict[str, Any]]
    unread: tuple[Unread, ...] = ()
    looked: bool = True
    compared: bool = True
    unrecorded: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every module that mixes tokens is a site."""
        return self.looked and not self.unread

    @property
    def ok(self) -> bool:
        """Whether everything holds of the sites that there are; `complete` says whether they are all there is."""
        return self.identical and bool(self.checks) and all(check["ok"] for check in self.checks)

    @property
    def table(self) -> pd.DataFrame:
        """The checks as a frame."""
        import pandas as pd

        return pd.DataFrame(self.checks, columns=_COLUMNS).astype({"fired": bool, "idle": bool, "ok": bool})

    def raise_if_failed(self) -> Verification:
        """Itself if all holds, else an AttachError that names the first thing that does not."""
        if self.ok:
            return self
        if not self.identical:
            raise AttachError(
                f"the observed output of {self.model} is not the bare one to the bit",
                hint="is the model deterministic? run it twice and compare",
            )
        bad = next((check for check in self.checks if not check["ok"]), None)
        if bad is None and self.unread:
            first = self.unread[0]
            raise AttachError(f"no mixer of tokens could be read: {first.reason}", site=first.name)
        if bad is None:
            raise AttachError("no site was seen at all", hint="does the forward reach the attention?")
        what = "its A·V is not the kernel's output" if bad["fired"] else "it never fired"
        if bad["site"] in self.unrecorded:
            what = self.unrecorded[bad["site"]]
        if bad["editable"] is False and not bad["idle"]:
            what = "the model's output stays the same when its heads give nothing, and has no gradient there either"
        raise AttachError(f"verification failed: {what}", site=bad["site"], hint="see the .table of the verification")

    def _output(self) -> str:
        if not self.compared:
            return "without tensors to compare"
        return "identical to the bit" if self.identical else "CHANGED"

    def __repr__(self) -> str:
        fired = sum(check["fired"] for check in self.checks)
        sums = [check["row_sum_error"] for check in self.checks if check["row_sum_error"] >= 0]  # NaN: no claim
        rows = max(sums, default=float("nan"))
        out = max((check["output_error"] for check in self.checks if check["fired"]), default=float("nan"))
        editable = [check["editable"] for check in self.checks if check["editable"] is not None]
        tried = f", {sum(editable)} of {len(editable)} change the output when switched off" if editable else ""
        idle = sorted({check["site"] for check in self.checks if check["idle"]})
        if idle:
            tried += f", {', '.join(idle[:3])}{' …' if len(idle) > 3 else ''} reaches it and adds nothing here"
        state = "ok" if self.ok else "FAILED"
        if self.unread:
            mixers = len({check["site"] for check in self.checks} | {one.name for one in self.unread})
            state = f"{len(self.unread)} of {mixers} mixers unread, " + ("the others ok" if self.ok else state)
        elif self.ok and not self.looked:
            state = "ok, not all modules were looked at"
        if self.unrecorded:
            name, reason = next(iter(self.unrecorded.items()))
            state += f", {len(self.unrecorded)} sites not recorded: {name}: {reason}"
        return (
            f"Verification({state}: {self.model}, {fired}/{len(self.checks)} sites fired, "
            f"output {self._output()}, rows sum to 1 within {rows:.1e}, "
            f"A·V equals the kernel's output within {out:.1e}{tried})"
        )


@dataclass(frozen=True)
class _Calls(Listener):
    """Hands on the calls. `edits`: the site at which it changes them; `unrecorded` is given those that no map shows."""

    take: Callable[[AttentionCall], Tensor | None]
    edits: str | None
    unrecorded: dict[str, str]

    def on_call(self, call: AttentionCall) -> Tensor | None:
        """Hand it on."""
        return self.take(call)

    def on_failed(self, site: str, error: Exception) -> bool:
        """The others are verified."""
        if isinstance(error, Unshown):
            self.unrecorded[site] = error.message
        return isinstance(error, Unshown)

    def cannot_wait(self, site: str) -> bool:
        """Where heads are switched off."""
        return site == self.edits

    def leaves_native_path(self) -> bool:
        return self.edits is not None

    def takes_blocks(self) -> bool:
        """Each is switched off by itself."""
        return self.edits is not None


def verify_model(
    model: nn.Module,
    sites: Sites,
    layouts: Layouts,
    args: tuple[Any, ...],
    inputs: Mapping[str, Any],
    edits: bool = True,
) -> Verification:
    """Run the model from one random state: bare, observed, and once per site with that site's heads switched off."""
    checks: list[dict[str, Any]] = []
    unrecorded: dict[str, str] = {}
    cross = {site.name for site in sites if not site.positional}

    def look(call: AttentionCall) -> None:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(call.v.device.type, enabled=False):
            checks.append(_check(call, call.site in cross))

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []

    def run(on_call: Callable[[AttentionCall], Tensor | None] | None, edits: str | None = None) -> Any:
        with torch.random.fork_rng(devices):
            given, named = fresh(args), fresh(dict(inputs))  # a cache grows in each run
            if on_call is None:
                return model(*given, **named)
            with observed(model, _Calls(on_call, edits, unrecorded), layouts):
                return model(*given, **named)

    bare, watched = run(None), run(look)
    checks = [check for check in checks if check["site"] not in layouts.refused | dict.fromkeys(layouts.gates, "")]
    outputs = tensors_within(bare), tensors_within(watched)
    identical = len(outputs[0]) == len(outputs[1]) and all(map(_same_bits, *outputs))
    fired = {check["site"] for check in checks}
    names = sorted(fired) if edits and outputs[0] else []
    with_gradients = torch.is_grad_enabled()
    with torch.no_grad():  # which do not flow through every mixer whose heads are edited
        whole = run(None) if names and with_gradients else bare  # a model may take another way then
        for name in names:
            found = _editable(whole, run(partial(_switched_off, name), name))
            idle = not found and _reaches(run, name)
            for check in checks:
                if check["site"] == name:
                    check["editable"], check["idle"] = found, idle
                    check["ok"] = check["ok"] and (found or idle)
    nan = float("nan")
    checks += [
        {"site": site.name, "fired": False, "shape": None, "backend": "", "kernel": "", "row_sum_error": nan,
         "output_error": nan, "tolerance": nan, "editable": None, "idle": False, "ok": False}
        for site in sites if site.name not in fired
    ]  # fmt: skip
    return Verification(
        type(model).__name__, identical, checks, sites.unread, bool(sites.looked), bool(outputs[0]), unrecorded
    )


def _switched_off(site: str, call: AttentionCall) -> Tensor | None:
    """What heads give that are switched off: [batch, head, query, width]; None at other sites."""
    if call.site != site:
        return None
    if call.finish is None:
        return torch.zeros_like(call.z())
    return torch.zeros_like(call.pattern().outputs(call.v))


def _editable(bare: Any, edited: Any) -> bool:
    """Whether some output has changed by more than another order of the same sums would change it."""
    for a, b in zip(tensors_within(bare), tensors_within(edited), strict=False):
        if a.shape != b.shape:
            return True
        if a.is_floating_point() and a.numel():
            a, b = a.detach().double(), b.detach().double()
            if (a - b).abs().max() > 1e-6 * a.abs().max():
                return True
    return False


def _reaches(run: Callable[..., Any], site: str) -> bool:
    """Whether some output has a gradient, be it zero, with respect to what a site's heads give."""
    given = list[Tensor]()

    def off(call: AttentionCall) -> Tensor | None:
        nothing = _switched_off(site, call)
        if nothing is None:
            return None
        given.append(nothing.detach().requires_grad_())
        return given[-1].clone()

    try:
        with torch.inference_mode(False), torch.enable_grad():
            sums = [
                one.sum() for one in tensors_within(run(off, site)) if one.requires_grad and one.is_floating_point()
            ]
            return bool(sums and given) and any(
                one is not None for one in torch.autograd.grad(sums, given, allow_unused=True)
            )
    except RuntimeError:  # what has no gradient proves nothing
        return False


def _check(call: AttentionCall, cross: bool) -> dict[str, Any]:
    pattern = call.pattern(cross=cross)
    values = call.v.unsqueeze(1) if call.v.dim() == 3 else call.v
    with_ones = torch.cat((values.to(pattern.dtype), torch.ones_like(values[..., :1], dtype=pattern.dtype)), dim=-1)
    applied = pattern.apply(with_ones)
    alive = (pattern.seen.keys_per_query > 0).expand(pattern.shape[:3])
    row_error = float("nan")  # rows that are no distributions need not sum to 1
    if pattern.normalised and alive.any():
        row_error = (applied[..., -1] - 1)[alive].abs().max().item()
    z = applied[..., :-1] if pattern.before is None else applied[..., :-1] + pattern.before.to(applied)
    got = z if call.finish is None else call.finish(z)
    want = (call.z() if call.finish is None else call.output).to(got.dtype)
    if call.finish is None:
        got, want = got[alive], want[alive]  # kernels differ in what they give for a row that sees no key
    error = (got - want).abs().max().item() if got.numel() else 0.0
    allowed = tolerance(call, want)
    dropped = call.dropout > 0  # then the kernel's output is not A·V by design
    return {
        "site": call.site,
        "fired": True,
        "shape": (pattern.n_batch, call.sizes_of_all[0], pattern.n_queries, pattern.n_keys),
        "backend": call.backend or call.tap,
        "kernel": call.kernel,
        "row_sum_error": row_error,
        "output_error": error,
        "tolerance": allowed,
        "editable": None,
        "idle": False,
        "ok": not row_error > allowed and (dropped or error <= allowed),
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.detach().contiguous().flatten().view(torch.uint8) if t.numel() else t for t in (a, b))
    return torch.equal(a, b)
