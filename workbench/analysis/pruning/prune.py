"""`prune_heads`: a copy of a model that is really smaller, without some of its heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from workbench.errors import AttachError, InterventionError, expect
from workbench.hooks.cut_weights import is_cut
from workbench.hooks.finding import find_sites, heads_of, kv_heads_of
from workbench.hooks.heads import parse_heads
from workbench.hooks.projections import is_conv1d
from workbench.hooks.sites import Site

Model = TypeVar("Model", bound=nn.Module)

# Names of (query, key, value) beside each other in a module, and of what joins the heads, there or in its parent.
_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_OUT = ("o_proj", "out_proj", "o", "dense", "proj")
_FUSED = "qkv"  # timm's name of all three in one layer
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
_TOTALS = ("inner_dim", "all_head_size", "split_size", "attn_dim")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass
class _Attention:
    """The parts of an attention module.

    Attributes:
        fused: query, key and value are one layer, "conv" as in GPT-2 or "linear" as in timm; "" where they are not.
        width: d_head. heads, kv_heads: how many there are.
    """

    site: Site
    module: Any
    q: Any
    k: Any
    v: Any
    out: Any
    fused: str
    width: int
    heads: int
    kv_heads: int


def prune_heads(model: Model, heads: Any) -> Model:
    """A deep copy of a model without some heads: their slices of W_Q, W_K, W_V and W_O, and of the biases, are gone.

    Its outputs are those of the model with the heads zero-ablated, up to rounding. It can be attached to, saved and
    trained; its heads are counted anew from 0 in each layer. Its weights no longer fit the model's config.

    Where several query heads share a kv head, a kv group goes as a whole; single query heads go only if all groups that
    stay keep as many. Of a site that loses all heads, one is left that gives nothing.

    Works for attention written as in GPT-2, Llama, BERT, ViT, T5, Whisper and timm's ViT, and for all that name their
    projections so and reshape by d_head or by a number of heads that the module holds.

    Args:
        model: any such model; it is left as it is.
        heads: which heads, as `Workbench.ablate` takes them.

    Raises:
        InterventionError: no such head; a kv group that would be cut; attention of another kind.

    >>> from transformers import GPT2Config, GPT2Model
    >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=20)).eval()
    >>> smaller = prune_heads(model, ["L0H1", "L1H0", "L1H3"])
    >>> [block.attn.num_heads for block in smaller.h]
    [3, 2]
    """
    expect(nn.Module, model=model)
    sites = find_sites(model)
    if not sites:
        raise AttachError(f"no attention was found in {type(model).__name__}")
    chosen = parse_heads(sites, heads)
    if is_cut(model):
        raise InterventionError(
            "the weights are cut over several processes", hint="prune the model in one process, and split it afterwards"
        )
    _check_hooks(model)
    smaller = copy.deepcopy(model)
    done: set[nn.Module] = set()
    for name, gone in chosen.items():
        attention = _parts(smaller, sites.find(name))
        if attention.module in done:
            raise InterventionError("the module is that of several layers", site=name)
        done.add(attention.module)
        bad = [head for head in gone if head >= attention.heads]
        if bad:
            raise InterventionError(f"there is no head {bad[0]}: the site has {attention.heads} heads", site=name)
        before = copy.deepcopy(attention.module) if attention.fused == "linear" else None
        _prune(attention, gone)
        if before is not None:
            _check_order(attention, before, gone)
    return smaller


@torch.no_grad()
def _check_order(attention: _Attention, before: Any, gone: Sequence[int]) -> None:
    """Refuse a layer of queries, keys and values in which heads lie in another order than was taken for granted.

    Args:
        before: a copy of the module as it was, which is then like the ablated one.
    """
    reads: Any = next(o for name in _OUT if _is_linear(o := getattr(before, name, None)))
    reads.weight[:, _rows(gone, attention.width)] = 0
    weight = attention.q.weight
    random = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    training = attention.module.training
    try:
        found, want = attention.module.eval()(random), before.eval()(random)
    except (RuntimeError, TypeError, ValueError) as error:
        raise _unknown(attention.site, before, f"cut, it does not run ({type(error).__name__})") from error
    finally:
        attention.module.train(training)
    limit = 1e3 * torch.finfo(weight.dtype).eps * float(want.abs().max())
    if found.shape != want.shape or float((found - want).abs().max()) > limit:
        raise _unknown(attention.site, before, f"its heads lie in {_FUSED} in an order that is not known")


def _check_hooks(model: nn.Module) -> None:
    quantized = getattr(model, "hf_quantizer", None) or getattr(model, "quantization_method", None)
    if quantized:
        raise InterventionError("the model is quantized, its weights cannot be cut", hint="load it in floating point")


def _parts(model: nn.Module, site: Site) -> _Attention:
    """The parts of a site's module.

    Raises:
        InterventionError: it is not made of parts that are known.
    """
    module: Any = model.get_submodule(site.name)
    heads = heads_of(module)
    kv_heads = kv_heads_of(module) or heads
    width = next((w for name in _WIDTHS if isinstance(w := getattr(module, name, None), int)), None)
    names = next((names for names in _QKV if all(_is_linear(getattr(module, name, None)) for name in names)), None)
    fused = ""
    if names is None:
        linear = _is_linear(getattr(module, _FUSED, None))
        fused = "conv" if is_conv1d(getattr(module, "c_attn", module)) else "linear" if linear else ""
    if heads is None or kv_heads is None or width is None or (names is None and not fused):
        raise _unknown(site, module, "its projections are not found")
    if fused == "linear":
        q = k = v = getattr(module, _FUSED)
        out = next((o for name in _OUT if _is_linear(o := getattr(module, name, None))), None)
        if out is None or (_outputs(q), _inputs(out)) != (3 * heads * width, heads * width):
            raise _unknown(site, module, f"its projections do not have the sizes of {heads} heads of {width}")
    elif fused:
        across = getattr(module, "is_cross_attention", False)
        q = module.q_attn if across else module.c_attn
        k = v = module.c_attn
        out = module.c_proj
    else:
        assert names is not None
        q, k, v = (getattr(module, name) for name in names)
        parent = model.get_submodule(site.name.rpartition(".")[0])
        beside = (module, getattr(parent, "output", None))
        out = next((o for at in beside for name in _OUT if _is_linear(o := getattr(at, name, None))), None)
        if out is None:
            raise _unknown(site, module, "its output projection is not found")
        if _outputs(k) != kv_heads * width and _outputs(k) == heads * width:
            kv_heads = heads  # a config's kv heads that this module does not have
        sizes = (_outputs(q), _outputs(k), _outputs(v), _inputs(out))
        if sizes != (heads * width, kv_heads * width, kv_heads * width, heads * width):
            raise _unknown(site, module, f"its projections have sizes {sizes} for {heads} heads of {width}")
    found = _Attention(site, module, q, k, v, out, fused, width, heads, kv_heads)
    _check_rest(found)
    return found


def _check_rest(found: _Attention) -> None:
    """Refuse weights that pruning would have to cut and that are not known."""
    known = {id(p) for part in (found.q, found.k, found.v, found.out) for p in part.parameters()}
    for name, parameter in found.module.named_parameters():
        per_head = tuple(parameter.shape) == (found.width,)  # such as the norm of a single head's queries
        if id(parameter) in known or per_head or name == "relative_attention_bias.weight":
            continue
        raise _unknown(found.site, found.module, f"it has a further weight {name} {list(parameter.shape)}")


def _unknown(site: Site, module: nn.Module, why: str) -> InterventionError:
    return InterventionError(
        f"{type(module).__name__} cannot be pruned: {why}",
        site=site.name,
        hint="heads of any attention can be switched off with wb.ablate",
    )


def _prune(attention: _Attention, gone: Sequence[int]) -> None:
    keep = [head for head in range(attention.heads) if head not in set(gone)]
    group = attention.heads // attention.kv_heads
    if not keep:  # a module without heads could not reshape: one group stays, and its output is nothing
        keep = list(range(group))
        with torch.no_grad():
            _weight_in(attention.out, keep, attention.width).zero_()
    left = {kv: sum(head // group == kv for head in keep) for kv in range(attention.kv_heads)}
    keep_kv = [kv for kv, n in left.items() if n]
    counts = {left[kv] for kv in keep_kv}
    if len(counts) > 1:
        cut = next(kv for kv in keep_kv if left[kv] < group)
        raise InterventionError(
            f"kv group {cut} (heads {cut * group} to {(cut + 1) * group - 1}) would keep {left[cut]} of its {group} "
            "heads, other groups another number",
            site=attention.site.name,
            hint=f'prune it as a whole ("L{attention.site.layer}KV{cut}"), or as many heads of each',
        )
    rows, kv_rows = _rows(keep, attention.width), _rows(keep_kv, attention.width)
    if attention.fused == "linear":
        total = attention.heads * attention.width
        _cut_outputs(attention.q, torch.cat([rows + i * total for i in range(3)]))
    elif attention.fused:
        _cut_fused(attention, rows)
    else:
        _cut_outputs(attention.q, rows)
        _cut_outputs(attention.k, kv_rows)
        _cut_outputs(attention.v, kv_rows)
    _cut_inputs(attention.out, rows)
    _tell(attention, keep, len(keep_kv))


def _tell(attention: _Attention, keep: Sequence[int], n_kv: int) -> None:
    """The module's own account of its sizes."""
    module: Any = attention.module
    for name in _HEADS:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, len(keep))
    if heads_of(module) != len(keep):
        module.num_heads = len(keep)
    if kv_heads_of(module) not in (None, n_kv) or "num_key_value_heads" in vars(module):
        module.num_key_value_heads = n_kv
    if hasattr(module, "num_key_value_groups"):
        module.num_key_value_groups = len(keep) // n_kv
    for name in _TOTALS:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, len(keep) * attention.width)
    if hasattr(module, "compute_bias"):
        from workbench.analysis.pruning.kept_bias import keep_bias

        keep_bias(attention.site, module, keep, attention.heads)


def _rows(heads: Sequence[int], width: int) -> Tensor:
    """Places of heads in a projection."""
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


def _cut_outputs(layer: Any, rows: Tensor) -> None:
    _set(layer, "weight", layer.weight.detach()[rows])
    if layer.bias is not None:
        _set(layer, "bias", layer.bias.detach()[rows])
    layer.out_features = len(rows)


def _cut_inputs(layer: Any, rows: Tensor) -> None:
    if is_conv1d(layer):
        _set(layer, "weight", layer.weight.detach()[rows])
        if hasattr(layer, "nx"):
            layer.nx = len(rows)
    else:
        _set(layer, "weight", layer.weight.detach()[:, rows])
        layer.in_features = len(rows)


def _cut_fused(attention: _Attention, rows: Tensor) -> None:
    """GPT-2's query, key and value in one layer; across sequences, key and value, with the query beside them."""
    total = attention.heads * attention.width
    own: list[tuple[Any, int]] = [(attention.k, attention.k.weight.shape[1] // total)]
    own += [(attention.q, 1)] if attention.q is not attention.k else []
    for layer, parts in own:
        columns = torch.cat([rows + i * total for i in range(parts)])
        _set(layer, "weight", layer.weight.detach()[:, columns])
        _set(layer, "bias", layer.bias.detach()[columns])
        layer.nf = len(columns)


def _weight_in(layer: Any, heads: Sequence[int], width: int) -> Tensor:
    """A view of what an output projection reads from the first heads."""
    end = len(heads) * width
    return layer.weight.detach()[:end] if is_conv1d(layer) else layer.weight.detach()[:, :end]


def _set(layer: Any, name: str, value: Tensor) -> None:
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(value.clone(memory_format=torch.contiguous_format), old.requires_grad))


def _is_linear(layer: Any) -> bool:
    return type(layer) is nn.Linear


def _outputs(layer: Any) -> int:
    return int(layer.weight.shape[0])


def _inputs(layer: Any) -> int:
    return int(layer.weight.shape[1])
