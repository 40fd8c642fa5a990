"""`cross_attention`: the rows of cross-attention that lead to each output token, head by head, from the fast kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from workbench.analysis.cross_attention.maps_result import WEIGHTINGS, CrossAttention
from workbench.analysis.saliency.audio import with_features
from workbench.analysis.saliency.describing import describe_reading
from workbench.analysis.saliency.encoder_decoder import EncoderDecoderInput
from workbench.analysis.saliency.explained_input import grid_of
from workbench.analysis.saliency.preparing import prepare_encoder_decoder
from workbench.analysis.saliency.token_names import special_ids
from workbench.capture.capture import Capture
from workbench.errors import WorkbenchError, expect
from workbench.hooks.sites import Site
from workbench.kernels import streaming
from workbench.kernels.patterns import Pattern
from workbench.session.choosing import SiteChoice, choose
from workbench.session.workbench import Workbench


def cross_attention(
    wb: Workbench,
    inputs: Mapping[str, Any],
    *,
    sites: SiteChoice = None,
    weighting: str = "raw",
    rollout: bool = False,
    special_positions: bool = True,
    renormalise: bool = False,
    alignment_heads: Sequence[tuple[int, int]] | None = None,
    hypothesis: Tensor | None = None,
    prompt: Tensor | Sequence[int] | None = None,
    frames: int | None = None,
    time_axis: int | None = None,
    decoding: Mapping[str, Any] | None = None,
) -> CrossAttention:
    """Cross-attention of every head, one row per output token, while the model stays on its fast kernel.

    The row of output token k is that of the decoder position that predicts it. Positions of the encoder's output that
    stand for padding are left out, and special ones (tokens such as </s>, the class token of an image) if asked for;
    what weight they had, `mass` tells.

    Args:
        inputs: one example, as in `workbench.saliency`; so are hypothesis, prompt, frames, time_axis and decoding.
        sites: cross-attention sites to take; all if None.
        weighting: "raw", "value_weighted" (p·‖v‖, normalised per row; Kobayashi et al. 2020, arXiv 2004.10102), or
            "gradient" (A∘∂L/∂A with L the sum of the tokens' log-probabilities).
        rollout: carry the rows through the encoder's self-attention to its input (Abnar & Zuidema 2020,
            arXiv 2005.00928): times (Ā + 1)/2 of each layer from the last to the first, with Ā the mean over heads.
        special_positions: keep special encoder positions. renormalise: scale each row to sum 1 after leaving some out.
        alignment_heads: (layer, head) pairs to mark; those of the model's generation config if None.

    Raises:
        WorkbenchError: no cross-attention, an unknown weighting, or whatever `workbench.saliency` refuses.
    """
    expect(Workbench, wb=wb)
    expect(Mapping, inputs=inputs)
    inputs = with_features(wb.tokenizer, inputs)
    subject = prepare_encoder_decoder(
        wb.model,
        inputs, hypothesis=hypothesis, prompt=None if prompt is None else torch.as_tensor(prompt),
        frames=frames, time_axis=time_axis, tokenizer=wb.tokenizer, **dict(decoding or {}),
    )  # fmt: skip
    return maps_of(
        wb, subject, inputs, sites=sites, weighting=weighting, rollout=rollout, special_positions=special_positions,
        renormalise=renormalise, alignment_heads=alignment_heads,
    )  # fmt: skip


def maps_of(
    wb: Workbench,
    subject: EncoderDecoderInput,
    inputs: Mapping[str, Any],
    *,
    sites: SiteChoice = None,
    weighting: str = "raw",
    rollout: bool = False,
    special_positions: bool = True,
    renormalise: bool = False,
    alignment_heads: Sequence[tuple[int, int]] | None = None,
) -> CrossAttention:
    """`cross_attention` of an example that has been read."""
    if weighting not in WEIGHTINGS:
        raise WorkbenchError(f"weighting is one of {', '.join(WEIGHTINGS)}, not {weighting!r}")
    if weighting == "gradient" and (rollout or renormalise):
        raise WorkbenchError("attention times gradient is signed: it has neither rollout nor rows that sum to 1")
    wanted = [site for site in wb.sites if site.kind == "cross"]
    if not wanted:
        raise WorkbenchError(f"{type(wb.model).__name__} has no cross-attention")
    if sites is not None:
        names = choose(wb.sites, sites) or frozenset()
        wanted = [site for site in wanted if site.name in names]
        if len(wanted) != len(names):
            odd = sorted(names - {site.name for site in wanted})
            raise WorkbenchError("the site is no cross-attention", site=odd[0])
    encoder = _encoder_sites(wb) if rollout else []
    cap, gradients = _capture(wb, subject, [*wanted, *encoder], weighting)
    rows = slice(len(subject.prompt) - 1, subject.decoder_ids.shape[1])
    maps = torch.stack([_rows(cap, site, rows, weighting, gradients) for site in wanted])
    if rollout:
        maps = carried(maps, [cap[site].pattern for site in encoder])
    kept = _kept(wb, subject, inputs, special_positions)
    held = maps[..., list(kept)]
    mass = held.sum(-1)
    if renormalise:
        held = torch.where(mass[..., None] > 0, held / mass[..., None].where(mass[..., None] > 0, 1.0), 0.0)
    facts = describe_reading(wb, subject, inputs, "encoder")
    texts = facts["position_texts"]
    return CrossAttention(
        maps=held.float().cpu(),
        mass=mass.float().cpu(),
        sites=tuple(site.name for site in wanted),
        layers=tuple(site.layer for site in wanted),
        weighting=weighting,
        rollout=rollout,
        renormalised=renormalise,
        target_ids=facts["target_ids"],
        target_texts=facts["target_texts"],
        special=facts["special"],
        position_texts=tuple(texts[i] for i in kept) if texts else (),
        kept_positions=kept,
        length=subject.states.shape[1],
        seconds_per_position=facts["seconds_per_position"],
        alignment_heads=_alignment(wb, wanted, alignment_heads),
        provenance=dict(cap.provenance) | {"input_sha256": facts["provenance"]["input_sha256"]},
    )


def carried(rows: Tensor, patterns: Sequence[Pattern]) -> Tensor:
    """Rows [..., key] over the encoder's output carried to its input: times (Ā + 1)/2 of each layer, the last first.

    Each product is made tile by tile; no map of the encoder is ever held.

    >>> from workbench.kernels.patterns import DensePattern
    >>> swap = DensePattern(torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None])
    >>> carried(torch.tensor([[1.0, 0.0]]), [swap]).tolist()
    [[0.5, 0.5]]
    """
    flat = rows.flatten(0, -2).float()
    for pattern in reversed(patterns):
        if pattern.shape[0] != 1 or pattern.n_queries != flat.shape[1]:
            raise WorkbenchError(
                "the encoder's attention does not run over the positions that the decoder sees",
                shape=pattern.shape,
                hint="rollout needs an encoder without pooling between its layers",
            )
        through = torch.zeros_like(flat)
        for tile in streaming.tiles(pattern):
            through[:, tile.keys] += flat[:, tile.queries] @ tile.p[0].sum(0).float()
        flat = (flat + through / pattern.n_heads) / 2
    return flat.view(rows.shape)


def _capture(
    wb: Workbench, subject: EncoderDecoderInput, sites: Sequence[Site], weighting: str
) -> tuple[Capture, dict[str, Tensor]]:
    """A capture of one teacher-forced forward, and ∂L/∂z [head, query, width] by site where gradients are asked for."""
    name = "inputs_embeds" if subject.kind == "tokens" else subject.name
    with_gradients = weighting == "gradient"
    main = subject.main.detach().clone().requires_grad_(with_gradients)
    given = {name: main, **subject.rest, "decoder_input_ids": subject.decoder_ids, "use_cache": False}
    wants = weighting != "raw"
    context = torch.enable_grad() if with_gradients else torch.no_grad()
    before = {p: p.requires_grad for p in wb.model.parameters()} if with_gradients else {}
    for parameter in before:
        parameter.requires_grad_(False)  # nothing may be added to the weights' gradients
    try:
        with (
            context,
            torch.inference_mode(False) if with_gradients else nullcontext(),
            wb.capture((), [site.name for site in sites], values=wants, gradients=with_gradients) as cap,
        ):
            log_probs = subject.scored(wb.model(**given).logits)[0]
            if with_gradients:
                log_probs.gather(1, subject.targets[:, None]).sum().backward()
    finally:
        for parameter, had in before.items():
            parameter.requires_grad_(had)
    found: dict[str, Tensor] = {}
    if with_gradients:
        for site in sites:
            gradient = cap[site].z_gradient
            assert gradient is not None
            found[site.name] = gradient[0].transpose(0, 1)
    return cap, found


def _rows(cap: Capture, site: Site, rows: slice, weighting: str, gradients: Mapping[str, Tensor]) -> Tensor:
    """[head, output token, encoder position] of one site."""
    pattern = cap[site].pattern
    keys = slice(0, pattern.n_keys)
    if weighting == "value_weighted":
        return pattern.value_weighted().tile(rows, keys)[0]
    found = pattern.tile(rows, keys)[0]
    if weighting == "raw":
        return found
    assert pattern.values is not None
    values = pattern.values[0].repeat_interleave(pattern.n_heads // pattern.values.shape[1], 0)
    return found * (gradients[site.name][:, rows].to(found) @ values.to(found).transpose(1, 2))


def _encoder_sites(wb: Workbench) -> list[Site]:
    """The encoder's self-attention, first layer first."""
    encoder = wb.model.get_encoder()  # type: ignore[operator]
    path = next(name for name, module in wb.model.named_modules() if module is encoder)
    found = [site for site in wb.sites if site.name.startswith(f"{path}.") and site.kind == "self"]
    if not found:
        raise WorkbenchError("the encoder has no self-attention to roll out", hint="leave out rollout=True")
    return found


def _kept(wb: Workbench, subject: EncoderDecoderInput, inputs: Mapping[str, Any], special: bool) -> tuple[int, ...]:
    """Encoder positions that count."""
    positions = range(subject.encoder_extent)
    if special or subject.kind == "spectrogram":
        return tuple(positions)
    if subject.kind == "image":
        return tuple(positions)[grid_of(subject)[2] :]
    ids = torch.as_tensor(inputs["input_ids"]).flatten().tolist()
    odd = special_ids(wb.model, wb.tokenizer)
    kept = tuple(i for i in positions if ids[i] not in odd)
    if not kept:
        raise WorkbenchError("every input token is special", hint="keep them with special_positions=True")
    return kept


def _alignment(
    wb: Workbench, sites: Sequence[Site], given: Sequence[tuple[int, int]] | None
) -> tuple[tuple[int, int], ...]:
    """(layer, head) pairs among these sites; given ones must be there."""
    named = getattr(getattr(wb.model, "generation_config", None), "alignment_heads", None) if given is None else given
    pairs = [(int(layer), int(head)) for layer, head in named or ()]
    layers = {site.layer: site.n_heads or 0 for site in wb.sites if site.kind == "cross"}
    bad = [pair for pair in pairs if not 0 <= pair[1] < layers.get(pair[0], 0)]
    if bad:
        raise WorkbenchError(f"there is no cross-attention head {bad[0]}", hint="alignment heads are (layer, head)")
    taken = {site.layer for site in sites}
    return tuple(pair for pair in pairs if pair[0] in taken)
