"""The matrices of every head, W_Q, W_K, W_V and W_O, and of the vocabulary, W_E and W_U, with norms folded in.

Found by value in one forward of a few tokens. A norm x ↦ scale · (x − mean) · gain is a matrix up to its scale: its
gain and centring are folded into what reads behind it, the scale (one positive number a position) and biases are left
out. Vectors are rows: a head writes x W_V W_O and scores x W_Q · y W_K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.analysis.circuits.model.layers import find_projection
from workbench.analysis.circuits.model.modules import Projection
from workbench.analysis.circuits.model.recording import Recording, same_product
from workbench.analysis.logits.asked import check_model, sites_on_tokens
from workbench.analysis.logits.norms import Norm, find_norm
from workbench.analysis.logits.readout import Readout
from workbench.analysis.logits.writers import Heads, find_readout_of, writers_in
from workbench.errors import AttachError, CaptureError
from workbench.hooks.sites import Site
from workbench.inputs import context_length, decoder_start, device_for_inputs, without_cache
from workbench.session.workbench import Workbench

_SHORT = 8  # tokens that are enough to find a model's parts
_SPELLED = {"q": "queries", "k": "keys", "v": "values"}
_PART = 1 << 14  # rows of the vocabulary at a time


@dataclass(frozen=True)
class SiteWeights:
    """The heads of one site, in float64.

    Attributes:
        order: of its block among those of the stream.
        v: [kv head, d_model, width]. o: [head, width, d_model]. q: [head, d_model, d_head] and k: [kv head, d_model,
            d_head], as they are when the query is `distance` positions behind the key; None where they were not asked
            for.
    """

    site: Site
    order: int
    v: Tensor
    o: Tensor
    q: Tensor | None
    k: Tensor | None

    @property
    def n_heads(self) -> int:
        """How many query heads."""
        return self.o.shape[0]

    def each(self, part: Tensor | None) -> Tensor:
        """[head, ...] of what is there for each head or group of heads."""
        assert part is not None
        return part.repeat_interleave(self.n_heads // part.shape[0], 0)


@dataclass(frozen=True)
class ModelWeights:
    """Sites of self-attention in order, and [vocab, d_model] of the vocabulary: what is read, and what logits read."""

    sites: tuple[SiteWeights, ...]
    embedding: Tensor
    unembedding: Tensor

    @property
    def heads(self) -> list[tuple[SiteWeights, int]]:
        """Every head."""
        return [(site, head) for site in self.sites for head in range(site.n_heads)]


def find_weights(wb: Workbench, *, qk: bool, vocabulary: bool = True, distance: int = 0) -> ModelWeights:
    """The weights of a decoder's self-attention.

    Args:
        qk: whether queries and keys are needed. vocabulary: whether the embeddings are; else they are empty.
        distance: positions from the key to the query, where rotary positions turn queries and keys.

    Raises:
        AttachError: weights are quantized or offloaded to where they cannot be read, are no matrices (a norm on queries
            or keys), or the stream is no sum of parts; the module is named. CaptureError: the distance is none.
    """
    check_model(wb)
    longest = context_length(wb.model)
    if distance < 0 or (longest is not None and distance >= longest):
        upto = "" if longest is None else f" and lies within the context's {longest} tokens"
        raise CaptureError(f"a distance is at least 0{upto}, and not {distance}")
    with torch.inference_mode(mode=False), torch.enable_grad():
        ids = _ids(wb, max(_SHORT, distance + 1))
        inputs = {"input_ids": ids, **without_cache(wb.model)}
        if decoder_start(wb.model) is not None:
            inputs["decoder_input_ids"] = ids
        sites_on_tokens(wb, inputs)
        seen, sites, blocks, readout = find_readout_of(wb, inputs, with_gradients=True)
        writers = writers_in(wb, seen, sites, blocks, readout)
        own = [heads for heads in writers.heads if heads.site.kind != "cross"]
        for heads in own:
            if not heads.plain:
                raise AttachError(
                    f"what its heads mix enters {heads.out} behind a gate, norm or skip, which depend on the input, so "
                    "that weights alone do not tell what is written",
                    site=heads.site.name, hint="logit_attribution has what heads write on given prompts",
                )  # fmt: skip
        found = tuple(
            _of_site(wb.model, seen, heads, writers.blocks.index(heads.block), distance if qk else None)
            for heads in own
        )
    with torch.inference_mode(mode=False), torch.no_grad():
        if not vocabulary:
            none = torch.zeros(0, found[0].o.shape[-1], dtype=torch.float64)
            return ModelWeights(found, none, none)
        embedding = _embedding(wb.model, seen, ids, writers.blocks[0], writers.tables)
        unembedding = _unembedding(readout, embedding)
    n = min(len(embedding), len(unembedding))
    return ModelWeights(found, embedding[:n], unembedding[:n])


def _ids(wb: Workbench, length: int) -> Tensor:
    """Ids that every vocabulary has, and that are no positions."""
    return (3 + (5 * torch.arange(length)) % 8)[None].to(device_for_inputs(wb.model))


def _of_site(model: nn.Module, seen: Recording, heads: Heads, order: int, distance: int | None) -> SiteWeights:
    site, stream = heads.site, seen.given[heads.block]

    def part(name: str, position: int) -> Tensor:
        projection = find_projection(model, seen, site, name, stream, f"{heads.block}.", "the block's input")
        norm = None
        if projection.norm is not None:
            given, gave = seen.given[projection.norm], seen.gave[projection.norm]
            norm = find_norm(projection.norm, model.get_submodule(projection.norm), given, gave, seen.eps)
        weight = projection.weight.to(stream.device, torch.float64)
        return _into_kernel(seen, site, name, projection, _read(norm, weight), position)

    written = heads.w_o.to(stream.device)
    if heads.norm is not None:
        written = heads.norm.centre(written) * heads.norm.gain
    written = written * heads.factor
    at = 0 if distance is None else distance
    return SiteWeights(
        site, order, part("v", 0), written,
        None if distance is None else part("q", at), None if distance is None else part("k", 0),
    )  # fmt: skip


def _read(norm: Norm | None, weight: Tensor) -> Tensor:
    """Directions [..., d_model] in what a norm gives, as directions in what it is given, up to its scale."""
    return weight if norm is None else norm.centre(weight * norm.gain)


def _into_kernel(
    seen: Recording, site: Site, part: str, projection: Projection, weight: Tensor, position: int
) -> Tensor:
    """[head or group, d_model, width] for the kernel's own channels at a position: turned, where positions are rotary.

    Raises:
        AttachError: what the kernel gets is no linear function of what the projection gives.
    """
    call = seen.calls[site.name][0]
    shown = {"q": call.q, "k": call.k, "v": call.v}[part]
    if shown is None:
        raise AttachError(f"the {_SPELLED[part]} of this site are not seen, hence no weights of them", site=site.name,
                          hint="attention that is written out shows its weights only; load it with sdpa")  # fmt: skip
    live = seen.live[projection.name]
    repeated = shown.shape[1] // len(projection.columns)
    kernel, columns = shown[0, ::repeated, position], projection.columns.to(live.device)
    given = live.flatten(0, -2)[position][columns]
    if torch.equal(kernel, given):
        return weight.mT
    turned = torch.zeros(*kernel.shape, columns.shape[1], dtype=torch.float64, device=live.device)
    for channel in range(kernel.shape[1]):
        (gradient,) = torch.autograd.grad(kernel[:, channel].sum(), live, retain_graph=True)
        turned[:, channel] = gradient.flatten(0, -2)[position][columns].double()
    again = torch.einsum("hcw,hw->hc", turned, given.double())
    if not same_product(kernel, again, seen.eps):
        raise AttachError(
            f"the {_SPELLED[part]} of this site are no linear function of what {projection.name} gives",
            site=site.name, hint="a norm on queries or keys (Qwen3) has no weights alone; the OV circuit has",
        )  # fmt: skip
    return torch.einsum("hcw,hwd->hdc", turned, weight)


def _embedding(model: nn.Module, seen: Recording, ids: Tensor, block: str, tables: tuple[str, ...]) -> Tensor:
    """[vocab, d_model] of the tokens' table, up to a positive number by which the model multiplies it.

    Raises:
        AttachError: no table of tokens makes the stream.
    """
    stream = seen.given[block].double()
    for name in seen.order:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding) or name not in seen.gave or int(ids.max()) >= module.num_embeddings:
            continue
        gave = seen.gave[name].double()
        if gave.shape != stream.shape or not torch.equal(module(ids).double(), gave):
            continue
        factor = float((stream * gave).sum() / gave.square().sum())
        if name in tables or (factor > 0 and same_product(stream, factor * gave, seen.eps)):
            rows = torch.arange(module.num_embeddings, device=ids.device)
            return torch.cat([module(part).double() for part in rows.split(_PART)])
    raise AttachError("the table of tokens cannot be found: none gives what the first block reads",
                      hint="something lies between the embedding and the first block")  # fmt: skip


def _unembedding(readout: Readout, like: Tensor) -> Tensor:
    """[vocab, d_model]: directions of the stream whose products with it are logits, up to the final norm's scale."""
    dtype = next(readout.model.get_submodule(readout.steps[0][0]).parameters()).dtype
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    eye = torch.eye(like.shape[1], dtype=dtype, device=like.device)
    logits = readout.uncapped(eye).double() - readout.uncapped(torch.zeros_like(eye[:1])).double()
    return _read(readout.norm, logits.T)
