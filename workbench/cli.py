"""The command line: `workbench demo`, `gallery`, `report`, `verify`, `investigate`, `check` and `--version`."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench import __version__
from workbench.counting import count
from workbench.errors import CaptureError, ReportError, TaskError, WorkbenchError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.report import Report
    from workbench.report.example import Example
    from workbench.tasks import Task

_TASKS = ("colored_objects", "docstring", "greater_than", "induction", "ioi")
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Look at every attention head of a PyTorch model that stays on its fast kernel.",
    epilog="workbench report --model demo-lm --text 'Then, Mary and John went to the park.'",
)


def main() -> None:
    """Run the command line; an error of ours ends it with one message and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # which transformers reads when it is imported
    try:
        app()
    except WorkbenchError as error:
        typer.secho(f"{type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attention-workbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _free(out: Path) -> Path:
    """Where a page can be written, known before minutes go by that would be lost."""
    from workbench.storage.disk import tried

    tried(out)
    return out


_Out = Annotated[Path, typer.Option(help="The page to write.", callback=_free)]


@app.command(epilog="workbench demo --out demo.html")
def demo(out: _Out = Path("demo.html")) -> None:
    """Show on the small models that ship with the package what the workbench finds, and write a page."""
    from workbench.demo import build

    _write(build(progress=True), out)


@app.command(epilog="workbench gallery --only sqa:mha,moh --out gallery.html")
def gallery(
    out: _Out = Path("gallery.html"),
    only: Annotated[str, typer.Option(help="Names of mechanisms apart by commas; all by default.")] = "",
) -> None:
    """Show the mechanisms of papers side by side, each with the heads of the small model that ships of it."""
    from workbench.gallery import GalleryInterrupted, build

    try:
        report = build(_names(only) or None, progress=True)
    except GalleryInterrupted as error:
        _say(str(error))
        if error.partial is not None:
            _write(error.partial, out)
        raise typer.Exit(130) from None
    _write(report, out)


_Model = Annotated[str, typer.Option(help="A shipped model, a Hugging Face folder, or a Hugging Face name.")]
_Text = Annotated[str | None, typer.Option(help="A prompt; @FILE reads it from a file.")]
_Image = Annotated[Path | None, typer.Option(help="An image file, for a model that reads images.")]
_Audio = Annotated[Path | None, typer.Option(help="An audio file, for a model that listens.")]
_Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")]
_Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64; as it is stored by default.")]


@app.command(
    epilog="workbench report --model demo-lm --text 'Then, Mary and John went to the park.'\n\n"
    "workbench report --model ./my-vit --image cat.png --layers 0,1 --statistics entropy,distance --out cat.html"
)
def report(
    model: _Model,
    text: _Text = None,
    image: _Image = None,
    audio: _Audio = None,
    out: _Out = Path("report.html"),
    statistics: Annotated[str, typer.Option(help="Names apart by commas; the usual ones by default.")] = "",
    layers: Annotated[str, typer.Option(help="Numbers apart by commas; all by default.")] = "",
    device: _Device = None,
    dtype: _Dtype = None,
    allow_large: Annotated[bool, typer.Option("--allow-large", help="Write it even above 50 MB.")] = False,
) -> None:
    """Attach to a model, verify it, capture it on a text, an image or a sound, and write one self-contained page."""
    from workbench import attach
    from workbench.kernels.statistics import check_names
    from workbench.report import Report
    from workbench.report.example import add_example

    example, chosen, names = _example(model, text, image, audio), _numbers(layers), check_names(_names(statistics))
    loaded, tokenizer = _load(model, device, dtype)
    page = Report(f"The heads of {Path(model).name}")
    with attach(loaded, tokenizer) as wb:
        _say(f"verifying and capturing {count(len(wb.sites), 'site')} …")
        add_example(page, wb, example, statistics=names, layers=chosen)
    _write(page, out, allow_large=allow_large)


@app.command(epilog="workbench verify --model demo-lm\n\nworkbench verify --model ./my-whisper --audio voice.wav")
def verify(
    model: _Model,
    text: _Text = None,
    image: _Image = None,
    audio: _Audio = None,
    device: _Device = None,
    dtype: _Dtype = None,
) -> None:
    """Check on an example that every site fires, outputs stay the same to the bit, and A·V is the kernel's output."""
    import torch

    from workbench import attach
    from workbench.report.example import inputs

    if text is None and image is None and audio is None:
        text = "The cat sat on the mat ."
    example = _example(model, text, image, audio)
    loaded, tokenizer = _load(model, device, dtype)
    with attach(loaded, tokenizer) as wb, torch.inference_mode():
        _say(f"verifying {count(len(wb.sites), 'site')} …")
        found = wb.verify(**inputs(wb, example))
    typer.echo(found.table.to_string(index=False))
    typer.echo(repr(found))
    found.raise_if_failed()


@app.command(
    epilog="workbench investigate --model demo-lm --task ioi --out ioi.html\n\n"
    "workbench investigate --model ./my-gpt2 --task induction --known ioi,greater_than --resume induction-run"
)
def investigate(
    model: _Model,
    task: Annotated[str, typer.Option(help="A task that ships, such as ioi or induction.")] = "ioi",
    out: _Out = Path("investigation.html"),
    prompts: Annotated[int, typer.Option(help="Half of them find, the other half confirms.")] = 32,
    known: Annotated[str, typer.Option(help="Tasks to compare with, apart by commas.")] = "",
    forwards: Annotated[int, typer.Option(help="Examples that may run through the model.")] = 20_000,
    minutes: Annotated[float, typer.Option(help="How long it may take.")] = 15.0,
    memory: Annotated[Path | None, typer.Option(help="A folder of past investigations.")] = None,
    resume: Annotated[Path | None, typer.Option(help="A folder to go on from, and to keep what is found.")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, and of what is drawn at random.")] = 0,
    device: _Device = None,
    dtype: _Dtype = None,
) -> None:
    """Find out how a model does a task: plan analyses, run them, plan anew after each finding, and write a page."""
    from workbench import attach
    from workbench.investigator import investigate as run
    from workbench.investigator.subject import check_tasks

    tasks = [_task(name, prompts, seed) for name in (task, *_names(known))]
    check_tasks(tasks[0], tasks[1:])  # an error, before the model is loaded
    loaded, tokenizer = _load(model, device, dtype)
    with attach(loaded, tokenizer) as wb:
        _say(f"investigating {task} with at most {forwards:,} forwards and {minutes:g} minutes …")
        found = run(
            wb, tasks[0], known=tasks[1:], forwards=forwards, minutes=minutes, memory=memory, resume=resume, seed=seed
        )
    typer.echo(repr(found))
    for sentence in found.answer:
        typer.echo(sentence.text)
    _write(found.report(), out)


@app.command(epilog="workbench check demo.html")
def check(file: Annotated[Path, typer.Argument(help="A page that was written by a report.")]) -> None:
    """Check an exported page: it is, to the byte, what this version of the package makes of the data in it."""
    from workbench.report.check import PROVES, PROVES_NOT
    from workbench.report.check import check as check_page

    problems = check_page(file)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise ReportError(f"{file} has {len(problems)} problem(s): it is not a page of this version as it was written")
    typer.echo(f"{file}: sound, {file.stat().st_size / 1e6:.2f} MB")
    typer.echo(f"Shown: {PROVES}.\nNot shown: {PROVES_NOT}.")


def _example(model: str, text: str | None, image: Path | None, audio: Path | None) -> Example:
    from workbench.report.example import Example

    if text is not None and text.startswith("@"):
        text = _read(text[1:])
    return Example(text, image, audio, model).check()  # an error, before the model is loaded


def _read(name: str) -> str:
    path = Path(name)
    try:
        if not path.is_file():
            raise CaptureError(f"there is no file {path}", hint="--text @FILE reads the prompt from a file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CaptureError(f"{path} is no text in UTF-8: byte {error.start}", hint="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise CaptureError(f"{name[:100]!r} cannot be read: {error}"[:300], hint="check the path") from None


def _task(name: str, prompts: int, seed: int) -> Task:
    from workbench import tasks

    if name not in _TASKS:
        raise TaskError(f"there is no task {name!r}", hint=nearest(name, _TASKS, "task"))
    made: Task = getattr(tasks, name)(prompts, seed)
    return made


def _load(model: str, device: str | None, dtype: str | None) -> tuple[PreTrainedModel, Any]:
    from transformers.utils.logging import disable_progress_bar

    from workbench.models.loading import check_place, load, place

    check_place(device, dtype)
    _say(f"loading {model} …")
    disable_progress_bar()  # of reading weights; downloads keep theirs
    loaded, tokenizer = load(model)
    return place(loaded, device, dtype), tokenizer


def _say(what: str) -> None:
    """What is under way: on the error stream, so that the output is the command's answer alone."""
    typer.secho(what, fg=typer.colors.BRIGHT_BLACK, err=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int] | None:
    names = _names(text)
    if not all(name.isdecimal() and len(name) < 100 for name in names):
        raise CaptureError(f"{text[:100]!r} are no layers", hint="--layers 0,1,2")
    return [int(name) for name in names] or None


def _write(report: Report, out: Path, *, allow_large: bool = False) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = report.write(out, allow_large=allow_large)
    for warning in said:
        typer.secho(str(warning.message), fg=typer.colors.YELLOW, err=True)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
