"""How a module's weights are cut over several processes, and so which of its heads are here.

The weights tell, while the module runs: one whose inputs are what the heads give is cut along a mesh of processes, and
the place of this process's part in it is the place of its heads among all. Weights that are only stored in parts, as
with FSDP, are whole while their module runs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from workbench.errors import CaptureError
from workbench.hooks.finding import heads_of, kv_heads_of
from workbench.hooks.head_shards import HeadShard
from workbench.hooks.projections import is_conv1d, is_linear
from workbench.hooks.tap import AttentionCall
from workbench.hooks.waiting import Unplaced
from workbench.hooks.weights import is_distributed


@dataclass(frozen=True)
class _Cut:
    """A weight that is cut along one axis: its size there, where this process's part begins and how long it is."""

    mesh: Any
    mesh_axis: int
    whole: int
    start: int
    length: int


def is_cut(model: nn.Module) -> bool:
    """Whether some weight of a model is a part of one that several processes hold together."""
    return "torch.distributed.tensor" in sys.modules and any(is_distributed(p) for p in model.parameters())


def mesh_of(model: nn.Module) -> Any:
    """The mesh of processes that hold a model's weights together; None where they are all here."""
    return next((p.device_mesh for p in model.parameters() if is_distributed(p)), None)  # type: ignore[attr-defined]


def here(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor; any other as it is."""
    part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return part


def split(made: AttentionCall) -> AttentionCall:
    """The call with what is known of its heads in the whole model; as it is where they are all here.

    Raises:
        CaptureError: its heads are cut in a way that cannot be told.
    """
    n_here, n_kv, _ = made.sizes
    found = _cuts(made.module)
    into = [cut for cut in found["inputs"] if cut.length == n_here * made.v.shape[-1]]
    stated = heads_of(made.module)
    if stated == n_here and n_here * made.v.shape[-1] in _uncut_inputs(made.module):
        return made  # it is another part of the module that is cut, such as an MLP
    if into:  # what the heads give enters a weight of which others have the rest
        cut, width = into[0], made.v.shape[-1]
        n_heads, first = cut.whole // width, cut.start // width
        exact = cut.whole % width == 0 and cut.start % width == 0
    else:
        several = [cut for cut in found["outputs"] if stated == n_here * cut.mesh.size(cut.mesh_axis)]
        if not several:
            return made
        cut = several[0]
        n_heads, first, exact = n_here * cut.mesh.size(cut.mesh_axis), n_here * _rank(cut), True
    if not exact or first + n_here > n_heads:
        raise CaptureError(
            f"its weights are cut into {cut.length} of {cut.whole} features, across heads",
            site=made.site,
            shape=made.output.shape,
            hint="split the heads so that each process holds whole ones",
        )
    shared = kv_heads_of(made.module) == n_kv and n_heads != n_here and n_kv < n_here  # every process has all of them
    kv_heads = n_kv if shared else n_kv * n_heads // n_here
    return replace(made, shard=HeadShard(n_heads, kv_heads, first, n_here, weakref.ref(cut.mesh), cut.mesh_axis))


def with_heads_here(made: Unplaced) -> Unplaced:
    """A call whose axes are not known yet, with the heads that this process has of those that the module states."""
    if made.heads is None:
        return made
    found = _cuts(made.module)
    width = made.output.shape[made.width]
    for cut in found["inputs"]:
        if cut.whole == made.heads * width and cut.length % width == 0:
            return replace(made, heads=cut.length // width)
    return made


def _cuts(module: nn.Module) -> dict[str, list[_Cut]]:
    """How the linear layers in a module are cut: along their inputs, and along their outputs."""
    found: dict[str, list[_Cut]] = {"inputs": [], "outputs": []}
    for part in module.modules():
        weight: Any = getattr(part, "weight", None)
        if not is_linear(part) or not is_distributed(weight):
            continue
        of_inputs = 0 if is_conv1d(part) else 1
        for axis, mesh_axis in _axes(weight):
            size = weight.device_mesh.size(mesh_axis)
            whole, length = weight.shape[axis], weight.to_local().shape[axis]
            step = -(-whole // size)  # as torch.chunk cuts
            cut = _Cut(weight.device_mesh, mesh_axis, whole, 0, length)
            start = min(_rank(cut) * step, whole)
            found["inputs" if axis == of_inputs else "outputs"].append(replace(cut, start=start))
    return found


def _uncut_inputs(module: nn.Module) -> set[int]:
    """How many inputs those linear layers in a module have that are whole."""
    parts = [part for part in module.modules() if is_linear(part) and isinstance(part.weight, Tensor)]
    whole = [part for part in parts if not is_distributed(part.weight) or not any(_axes(part.weight))]
    return {part.weight.shape[0 if is_conv1d(part) else 1] for part in whole if part.weight.dim() == 2}  # type: ignore


def _axes(weight: Any) -> Iterator[tuple[int, int]]:
    """The axes along which a distributed tensor is cut, each with that of the mesh."""
    for mesh_axis, placement in enumerate(weight.placements):
        if placement.is_shard() and weight.device_mesh.size(mesh_axis) > 1:
            yield placement.dim % weight.dim(), mesh_axis


def _rank(cut: _Cut) -> int:
    coordinate = cut.mesh.get_coordinate()
    return 0 if coordinate is None else int(coordinate[cut.mesh_axis])


def check_whole(module: nn.Module, site: str) -> None:
    """Raise a CaptureError if other processes hold a part of the weights that a module is read from."""
    if is_cut(module):
        raise CaptureError(
            f"a {type(module).__name__} cannot be read from weights of which other processes hold a part",
            site=site,
            hint="leave it out with sites=, or run the model in one process",
        )
