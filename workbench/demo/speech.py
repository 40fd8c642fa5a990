"""Section of the demo: does the cross-attention of demo-s2t explain what it writes?"""

from __future__ import annotations

from workbench import attach, cross_attention_saliency, models, views
from workbench.report import Report
from workbench.tasks import speech
from workbench.tasks.spoken_digits import SECONDS

_CLIPS = 2


def add(report: Report, seed: int) -> None:
    """Add the maps of a clip, the correlation of each head, and the deletion curves."""
    model, tokenizer = models.load("demo-s2t")
    features, spoken = models.clips("demo-s2t")
    inputs = [
        speech.from_features(one, seconds=SECONDS, audio=clip.waveform, name=clip.text, reference=clip.text)
        for one, clip in zip(features[:_CLIPS], spoken[:_CLIPS], strict=True)
    ]
    with attach(model, tokenizer) as wb:
        found = cross_attention_saliency(
            wb, inputs, n_masks=600, granularities=(60, 80, 100), batch_size=25, decode_again=False, seed=seed,
            fractions=[i / 10 for i in range(11)], progress=False,
        )  # fmt: skip
    said = speech.spans_of(spoken[0].spans, found.maps[0]["special"])
    shown = views.cross_attention(found, spans=None if said is None else {"said": said})
    attention, both = (float(found.of(saliency)[found.aggregates.index("all")]) for saliency in found.saliencies)
    notes = (
        "A small Whisper writes down spoken digits, which a formula speaks. Does it look at what its output depends "
        "on? Saliency: how far the prediction moves when a part of the spectrogram is hidden.",
        f"Over {found.n_utterances} clips, attention averaged over all heads correlates with input saliency by "
        f"{attention:.2f}, with saliency of the encoder's output by {both:.2f}. So few clips show the method, no more.",
    )
    titles = ("A small Whisper: does cross-attention explain?", "A small Whisper: which heads agree with saliency")
    for view, title, note in zip(shown, (*titles, None, None), (*notes, None, None), strict=True):
        report.add(view, title=title, note=note)
