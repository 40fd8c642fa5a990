"""Attention in the graph that Dynamo hands to a compiler, and the operator behind each.

There `scaled_dot_product_attention`, softmax and FlexAttention's operator are nodes of their own still. They stay as
they are, so that the kernel that runs is the model's own.
"""

from __future__ import annotations

import itertools
import operator
import re
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from workbench.hooks.compiled.operator import ATTENTION
from workbench.hooks.compiled.sameness import Expressions, Runs
from workbench.hooks.compiled.shapes import like, resolved, wanted_function
from workbench.hooks.compiled.way_out import Joined, joined
from workbench.hooks.proofs.axes import Axes
from workbench.hooks.sdpa import SIGNATURE
from workbench.hooks.written_out import Follower, WrittenOut
from workbench.kernels.checks import place_of

Kind = Literal["sdpa", "flex", "written out"]
SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Place:
    """An attention of a graph, as it was compiled.

    Attributes:
        kind: what kind of call it is.
        site: path of the module that it was compiled in; None where a function was compiled, whoever calls it.
        region: path of the region that was compiled.
        common, anchor_below: what the module's path and the anchor's have in common, and the rest of the latter.
            Modules that are alike may share a graph, and which of them runs shows in the parameter that comes in.
        axes: of its output, where the graph shows them. joins: path of the module that joins its heads.
        equation: of one that is written out as an einsum, with `weights_first` or the values.
        score, mask: what changes and hides scores in FlexAttention, and how many of the buffers the first reads.
        graph: number of the graph. shared: that of the mask, equal where masks are in one run; None: nothing tells.
        mask_comes_in: whether the mask is an input of the graph.
    """

    kind: Kind
    site: str | None
    region: str = ""
    common: str = ""
    anchor_below: str = ""
    axes: Axes | None = None
    joins: str | None = None
    equation: str | None = None
    weights_first: bool = True
    score: fx.GraphModule | None = None
    mask: fx.GraphModule | None = None
    n_score_buffers: int = 0
    graph: int = 0
    shared: int | None = None
    mask_comes_in: bool = False

    def moved(self, path: str, anchor: str) -> str | None:
        """A path of the graph's in the layer whose anchor came in; None if that is none of a layer that is alike."""
        stem, dot, _ = anchor.rpartition(f".{self.anchor_below}")
        here = stem if dot else None if anchor != self.anchor_below else ""
        return None if here is None else replaced_stem(path, self.common, here)


def replaced_stem(path: str, stem: str, by: str) -> str | None:
    """A path below another module than it was.

    >>> replaced_stem("h.0.attn", "h.0", "h.3"), replaced_stem("attn", "", "h.3"), replaced_stem("h.0", "h.0", "")
    ('h.3.attn', 'h.3.attn', '')
    """
    if stem and path != stem and not path.startswith(f"{stem}."):
        return None
    return ".".join(part for part in (by, path[len(stem) :].lstrip(".")) if part)


_places: list[Place] = []  # the operator's `place` counts in it
_graphs = itertools.count()
_lock = threading.Lock()


def place(number: int) -> Place:
    """The attention of that number."""
    return _places[number]


_runs = Runs()


def mask_key(number: int, mask: Tensor | None) -> Hashable | None:
    """What two masks of compiled code share only if they hold the same; None if nothing tells. To be asked once each
    time that an attention fires.

    One that came in is told by where it lies, and held by its key: nothing writes to a graph's inputs unseen.
    """
    found = _places[number]
    run = _runs.of(found.graph, number)
    if mask is None or found.shared is None:
        return None
    if not found.mask_comes_in:
        return found.graph, run, found.shared
    return None if mask.is_inference() else _CameIn((mask.data_ptr(), mask.dtype, *place_of(mask)), mask)


@dataclass(frozen=True)
class _CameIn:
    """A tensor that is told by where it lies, and held so that no other can lie there."""

    at: tuple[Any, ...]
    held: Tensor = field(compare=False)


@dataclass(frozen=True)
class Names:
    """What modules and parameters of the model that runs are called: by id as text, and by where a parameter lies.

    Attributes:
        region: path of the compiled part that runs.
    """

    modules: Mapping[str, str]
    parameters: Mapping[int, str]
    region: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """Those of a model; parameters that several modules share tell of none of them."""
        modules = {str(id(module)): name for name, module in model.named_modules()}
        found: dict[int, str | None] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            at = lies_at(parameter)
            found[at] = None if at in found else name
        return cls(modules, {at: name for at, name in found.items() if name is not None and at})


def lies_at(tensor: Tensor) -> int:
    """Where a parameter lies; 0 if it is of a kind that lies nowhere by itself."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


class _Naming(threading.local):
    """Those of the models that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Names] = []


_naming = _Naming()


@contextmanager
def naming(names: Names) -> Iterator[None]:
    """What is compiled in this thread belongs to a model whose modules are called so."""
    _naming.stack.append(names)
    try:
        yield
    finally:
        _naming.stack.remove(names)


@dataclass(frozen=True)
class _Found:
    """An attention: the node behind which the operator stands, and the operator's arguments by name."""

    kind: Kind
    node: fx.Node
    given: dict[str, Any]
    mixed: tuple[int, ...]
    width: int
    place: dict[str, Any]


def insert(module: fx.GraphModule) -> int:
    """Put the operator behind each attention of a graph; how many there are."""
    names = _naming.stack[-1] if _naming.stack else Names({}, {})
    count = _insert(module, names, _anchors(module.graph, names))
    if count:
        module.graph.lint()
        module.recompile()
    return count


def _insert(module: fx.GraphModule, names: Names, anchors: dict[fx.Node, str]) -> int:
    count, graph, expressions, own = 0, module.graph, Expressions(module.graph), next(_graphs)
    for found in list(_attentions(module)):
        stack = [key.split("@")[0] for key in found.node.meta.get("nn_module_stack") or ()]
        site = next((names.modules[key] for key in reversed(stack) if key in names.modules), None)
        site = _of_frame(anchors) if site is None else site
        out = joined(found.node, found.mixed, found.width)
        anchor, common, anchor_below = _nearest(site, anchors)
        joins = _owner(out, site, anchors)
        mask = found.given.get("mask")
        facts: dict[str, Any] = {
            "graph": own,
            "shared": expressions.number(mask),
            "mask_comes_in": getattr(mask, "op", "") == "placeholder",
        }
        made = Place(found.kind, site, names.region, common, anchor_below, out.axes, joins, **found.place, **facts)
        with _lock:
            _places.append(made)
            number = len(_places) - 1
        given = {"q": None, "k": None, "weights": None, "mask": None, "buffers": [], "scale": None} | found.given
        with graph.inserting_after(found.node):
            graph.call_function(ATTENTION, (
                number, given["q"], given["k"], given["v"], found.node, given["weights"], given["mask"], None, anchor,
                given["buffers"], "", given["scale"], given.get("causal", False), given.get("dropout", 0.0),
            ))  # fmt: skip
        count += 1
    for node in list(graph.nodes):  # bodies of checkpoints and the like: their inputs are its arguments, in order
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target is not _flex():
            count += sum(_insert_below(module, node, body, names, anchors) for body in node.args)
    return count


def _insert_below(
    module: fx.GraphModule, node: fx.Node, body: Any, names: Names, anchors: dict[fx.Node, str]
) -> int:  # fmt: skip
    child = getattr(module, str(body.target), None) if getattr(body, "op", "") == "get_attr" else None
    if not isinstance(child, fx.GraphModule):
        return 0
    given = [each for each in node.args if isinstance(each, fx.Node) and each.op != "get_attr"]
    inputs = zip(child.graph.find_nodes(op="placeholder"), given, strict=False)
    count = _insert(child, names, {own: anchors[outer] for own, outer in inputs if outer in anchors})
    if count:
        child.recompile()
    return count


def _anchors(graph: fx.Graph, names: Names) -> dict[fx.Node, str]:
    """The graph's inputs that are parameters of the model, with their names."""
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        given = getattr(node.meta.get("grapharg"), "example", None)
        if isinstance(given, nn.Parameter) and (name := names.parameters.get(lies_at(given))) is not None:
            found[node] = name
    return found


def _of_frame(anchors: Mapping[fx.Node, str]) -> str | None:
    """The path of the module whose method a graph begins with, as after a break, by its own parameters; None if it has
    none among the graph's inputs.
    """
    for node, name in anchors.items():
        source = getattr(node.meta.get("grapharg"), "source", None)
        spelled = getattr(source, "name", "")
        spelled = spelled() if callable(spelled) else spelled
        inside = _SELF.fullmatch(spelled)
        if inside is None:
            continue
        below = ".".join(_PARTS.findall(inside.group(1)))
        if name == below or name.endswith(f".{below}"):
            return name[: len(name) - len(below)].rstrip(".")
    return None


_SELF = re.compile(r"""L\[['"]self['"]\]((?:\._(?:modules|parameters)\[['"][^'"]+['"]\])+)""")
_PARTS = re.compile(r"""\[['"]([^'"]+)['"]\]""")


def _nearest(site: str | None, anchors: Mapping[fx.Node, str]) -> tuple[fx.Node | None, str, str]:
    """The parameter nearest to a module, what the paths of both have in common, and the rest of the parameter's."""
    best: tuple[int, fx.Node | None, str, str] = (-1, None, "", "")
    for node, name in anchors.items() if site is not None else ():
        own = str(site).split(".") if site else []
        parts = name.split(".")
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(own, parts, strict=False))))
        if common > best[0]:
            best = common, node, ".".join(own[:common]), ".".join(parts[common:])
    return best[1:]


def _owner(out: Joined, site: str | None, anchors: Mapping[fx.Node, str]) -> str | None:
    """The path of the module whose weight joins the heads."""
    name = None if out.weight is None or site is None else anchors.get(out.weight)
    return None if name is None else name.rpartition(".")[0]


def _attentions(module: fx.GraphModule) -> Iterator[_Found]:
    """Each attention of a graph, its subgraphs left out."""
    written = _WrittenOut()
    for node in module.graph.nodes:
        if node.target is SDPA:
            bound = SIGNATURE.bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            names = ("q", "k", "v", "mask", "dropout", "causal", "scale")
            given = dict(zip(names, list(bound.arguments.values())[: len(names)], strict=True))
            yield _Found("sdpa", node, given, (-2,), -1, {})
        elif node.target is _flex():
            yield from _of_flex(module, node)
        elif (found := written.saw(node)) is not None:
            yield found


def _flex() -> Any:
    return torch.ops.higher_order.flex_attention


def _of_flex(module: fx.GraphModule, node: fx.Node) -> Iterator[_Found]:
    out = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    if out is None:
        return
    given_as: tuple[Any, ...] = node.args
    q, k, v, score, block_mask, scale, _, *more = given_as
    of_score, of_mask = (tuple(each) for each in (*more, (), ())[:2])
    if not all(isinstance(one, fx.Node) and _is_tensor(one) for one in (*of_score, *of_mask)):
        return  # numbers that change from call to call; the site does not fire, which is said
    functions = [getattr(module, str(one.target)) for one in (score, block_mask[-1])]
    given = {"q": q, "k": k, "v": v, "scale": scale, "buffers": [*of_score, *of_mask]}
    facts = {"score": functions[0], "mask": functions[1], "n_score_buffers": len(of_score)}
    yield _Found("flex", out, given, (-2,), -1, facts)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


class _WrittenOut:
    """Finds attention that is written out, by following shapes as the tap on functions follows tensors."""

    def __init__(self) -> None:
        self._follower = Follower(self._report)
        self._values: dict[fx.Node, Any] = {}  # nodes that matter, as tensors without content
        self._nodes: dict[int, fx.Node] = {}
        self._found: WrittenOut | None = None

    def _report(self, found: WrittenOut) -> None:
        self._found = found

    def saw(self, node: fx.Node) -> _Found | None:
        """A node in the graph's order; an attention if it is a product of weights with values."""
        function = wanted_function(node)
        if function is None or not _is_tensor(node):
            return None
        args, kwargs = resolved(node.args, self._of), resolved(node.kwargs, self._of)
        self._found, result = None, self._of(node)
        if result is None:
            return None
        self._follower.saw(function, args, kwargs, result)
        return None if self._found is None else self._as_found(node, args, self._found)

    def _of(self, node: fx.Node) -> Any:
        if node not in self._values:
            self._values[node] = made = like(node)
            if isinstance(made, Tensor):
                self._nodes[id(made)] = node
        return self._values[node]

    def _as_found(self, node: fx.Node, args: Sequence[Any], found: WrittenOut) -> _Found | None:
        equation = args[0] if args and isinstance(args[0], str) else None
        operands = [one for one in _flat(node.args) if isinstance(one, fx.Node)]
        operands += [one for one in node.kwargs.values() if isinstance(one, fx.Node)]
        for first, (weights, values) in ((True, operands[:2]), (False, operands[1::-1])):
            followed = self._follower.weights_of(self._of(weights))
            before = None if followed is None else self._nodes.get(id(followed[0]))
            if before is not None:
                given = {"v": values, "weights": before, "dropout": found.dropout}
                facts = {"equation": equation, "weights_first": first}
                return _Found("written out", node, given, found.mixed, found.width, facts)
        return None


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for each in args:
        yield from _flat(each) if isinstance(each, (list, tuple)) else (each,)
