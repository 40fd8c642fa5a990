"""One example, a text, an image file or an audio file, as a model's inputs and as a section of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import CaptureError, WorkbenchError
from workbench.hooks.configs import read
from workbench.kernels.statistics import check_names

if TYPE_CHECKING:
    from PIL.Image import Image as PictureImage

    from workbench.capture.capture import Capture
    from workbench.report.report import Report
    from workbench.session.workbench import Workbench
    from workbench.views.base.view import View

_STATISTICS = ("entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "received")
_NEW_TOKENS = 32
_READS = {"input_ids": "text", "pixel_values": "image", "input_features": "audio", "input_values": "audio"}
_NAMED = {"image": "an image", "audio": "a sound"}


@dataclass(frozen=True)
class Example:
    """What a model is run on: one of these.

    Attributes:
        text: a prompt. image, audio: files.
        source: name or folder of the model, whose processor reads images and audio.
    """

    text: str | None = None
    image: Path | None = None
    audio: Path | None = None
    source: str = ""

    def check(self) -> Example:
        """Itself, if there is one of them, and what is a file can be read: known before a model is loaded.

        Raises:
            CaptureError: there is none, or several; no such file, none that this process may read, no image.
            TaskError: no audio.
        """
        if self.kind == "text":
            return self
        file = Path(getattr(self, self.kind))
        try:
            if not file.is_file():
                raise CaptureError(f"there is no file {file}", hint=f"--{self.kind} takes the path of a file")
            file.open("rb").close()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise CaptureError(f"{str(file)[:100]!r} cannot be read: {why}", hint="check the path") from None
        if self.kind == "image":
            _picture(file)
        else:
            from workbench.tasks.speech import load_audio

            load_audio(file)
        return self

    @property
    def kind(self) -> str:
        """ "text", "image" or "audio".

        Raises:
            CaptureError: there is none of them, or several.
        """
        given = [kind for kind in ("text", "image", "audio") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise CaptureError(
                f"one example is needed, there is {' and '.join(given) or 'none'}",
                hint="a text, an image file, or an audio file",
            )
        return given[0]


def inputs(wb: Workbench, example: Example) -> dict[str, Any]:
    """Model inputs for an example; an encoder-decoder also gets the tokens that it generates itself.

    Raises:
        CaptureError: the model does not take what the example is, or needs more beside it, or the file is no image.
        ModelError: no processor comes with the model. TaskError: the file is no audio, or too long.
    """
    model: Any = wb.model
    takes = getattr(model, "main_input_name", "input_ids")
    wanted = _READS.get(takes)
    if wanted is None:
        raise CaptureError(f"the model takes {takes}", hint="attach and capture it from Python")
    if example.kind != wanted:
        raise CaptureError(f"the model takes {takes}, not {example.kind}", hint=f"give it --{wanted}")
    _check_towers(wb, example)
    found = _READERS[wanted](wb, example, takes)
    if read(read(model, "config"), "is_encoder_decoder", False):
        found["decoder_input_ids"] = model.generate(**found, max_new_tokens=_NEW_TOKENS, do_sample=False)
    return found


def _check_towers(wb: Workbench, example: Example) -> None:
    """Refuse an example that leaves a part of the model without input, whose sites would then never fire."""
    for name, part in wb.model.named_modules():
        other = _READS.get(str(getattr(part, "main_input_name", "input_ids")), "text")
        if name and other not in ("text", example.kind) and any(s.name.startswith(f"{name}.") for s in wb.sites):
            raise CaptureError(
                f"the model reads {_NAMED[other]} beside its {example.kind}, in {name}, which never runs without one",
                hint="from Python, give all that its processor makes: inputs = processor(images=…, text=…), then "
                "wb.verify(**inputs) and Report.add(capture); docs/how-to.md has it for demo-vlm",
            )


def _text(wb: Workbench, example: Example, takes: str) -> dict[str, Any]:
    return dict(wb.tokenize(example.text or ""))


def _image(wb: Workbench, example: Example, takes: str) -> dict[str, Any]:
    from workbench.models.loading import processor

    reads = processor(example.source, "image")
    file = Path(example.image or "")
    try:
        pixels = reads(images=_picture(file), return_tensors="pt")[takes]
    except (OSError, ValueError) as error:
        raise CaptureError(f"{file.name} is no image that the model's processor takes: {error}") from error
    return {takes: _placed(wb, pixels)}


def _picture(file: Path) -> PictureImage:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise CaptureError(f"{file.name} is no image that can be read: {error}", hint="a PNG or JPEG file") from error


def _audio(wb: Workbench, example: Example, takes: str) -> dict[str, Any]:
    from workbench.models.loading import processor
    from workbench.tasks.speech import load_audio, utterance

    reads = processor(example.source, "audio")
    rate, file = int(reads.sampling_rate), Path(example.audio or "")
    wave = load_audio(file, rate=rate)
    if takes == "input_features":  # whose extractor would cut off what is too long
        features = utterance(wave, reads, rate=rate, name=file.name)
    else:
        features = reads(wave.numpy(), sampling_rate=rate, return_tensors="pt")
    return {takes: _placed(wb, features[takes])}


def _placed(wb: Workbench, tensor: torch.Tensor) -> torch.Tensor:
    """On the model's device, in its dtype."""
    weight = next(p for p in wb.model.parameters() if p.is_floating_point())
    return tensor.to(weight.device, weight.dtype)


def _in_layers(wb: Workbench, layers: Sequence[int]) -> list[str]:
    known = {site.layer for site in wb.sites}
    lost = [layer for layer in layers if layer not in known]
    if lost:
        raise CaptureError(f"there is no layer {lost[0]}", hint=f"the model has {min(known)} to {max(known)}")
    return [site.name for site in wb.sites if site.layer in layers]


_READERS = {"text": _text, "image": _image, "audio": _audio}


def add_example(
    report: Report,
    wb: Workbench,
    example: Example,
    *,
    statistics: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    title: str | None = None,
    note: str | None = None,
) -> None:
    """Verify the model on an example, capture it there, and add the capture to the report.

    Attention over an image is laid over it as well, or the report says why it is not.

    Args:
        statistics: which to capture; the usual ones by default. layers: which; all by default.

    Raises:
        CaptureError: there is no such statistic, layer or file, the model does not take such an example, or a check
            failed.
    """
    names, sites = check_names(statistics), None if layers is None else _in_layers(wb, layers)
    example.check()
    with torch.inference_mode():
        given = inputs(wb, example)
        verification = wb.verify(**given).raise_if_failed()
        usual = (*_STATISTICS, "induction") if set(given) <= {"input_ids", "attention_mask"} else _STATISTICS
        with wb.capture(list(names or usual), sites=sites) as capture:
            wb.model(**given)
    report.add(capture, title=title, text=example.text, verification=verification, note=note)
    if example.image is not None:
        report.add(_over_the_image(capture, given, Path(example.image).name))


def _over_the_image(capture: Capture, given: dict[str, Any], name: str) -> View | str:
    """What heads look at on the image itself; a sentence where its patches are not known."""
    from workbench.views.image_attention.view import image_attention

    try:
        return image_attention(capture, given["pixel_values"], labels=[name], title="On the image")
    except WorkbenchError as error:
        return f"The maps are not laid over the image: {error.message}."
