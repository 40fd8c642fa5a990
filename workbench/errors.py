"""The errors a user can meet: one root, few children, each with a hint on what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class WorkbenchError(Exception):
    """Root of every error this package raises on purpose.

    Attributes:
        site: name of the attention site concerned, or None.
        shape: shape of the tensor concerned, or None.
        hint: one sentence that says what to do, or None.

    >>> print(WorkbenchError("the mask has 3 keys, the site 5", site="blocks.0.attn", hint="pass a mask of 5 keys"))
    the mask has 3 keys, the site 5 (site blocks.0.attn)
    Hint: pass a mask of 5 keys
    """

    def __init__(
        self,
        message: str,
        *,
        site: str | None = None,
        shape: Sequence[int] | None = None,
        hint: str | None = None,
    ) -> None:
        self.message, self.site, self.hint = message, site, hint
        self.shape = None if shape is None else tuple(shape)
        where = [] if site is None else [f"site {site}"]
        where += [] if self.shape is None else [f"shape {list(self.shape)}"]
        text = message + (f" ({', '.join(where)})" if where else "")
        super().__init__(text + (f"\nHint: {hint}" if hint else ""))


class AttachError(WorkbenchError):
    """Nothing to attach to, attached twice, or a site that never fired."""


class CaptureError(WorkbenchError):
    """A capture that cannot be made or used: too large, wrong place, wrong input, unknown statistic."""


class InterventionError(WorkbenchError):
    """An edit of the model that cannot be made as asked."""


class TaskError(WorkbenchError):
    """A task that cannot be built for this tokenizer or these arguments."""


class ReportError(WorkbenchError):
    """A report that cannot be written."""


class FileError(WorkbenchError):
    """A file that cannot be written: no such folder, no room, no right to."""


class FormatError(WorkbenchError):
    """A file that is not ours, is truncated, or was changed after it was written."""


def nearest(name: object, known: Sequence[str], what: str = "one") -> str:
    """A hint that names the entry of `known` closest to `name`, or lists the first few, as for what is no name at all.

    >>> nearest("entropi", ["entropy", "peak"])
    'did you mean "entropy"?'
    """
    close = get_close_matches(name, known, n=1, cutoff=0.5) if isinstance(name, str) else []
    if close:
        return f'did you mean "{close[0]}"?'
    listed = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return f"there is {listed}" if known else f"there is no {what} to choose from"


_MADE_BY = {
    "Workbench": "workbench.attach(model, tokenizer) makes one",
    "Capture": "with wb.capture() as cap: model(**inputs)",
    "Circuit": "workbench.find_circuit(wb, task) finds one",
    "Task": "workbench.tasks has some, and workbench.tasks.from_prompts makes one of your own prompts",
    "Module": "of a workbench it is wb.model",
    "Mapping": "wb.tokenize(text) makes inputs of a text, the model's processor those of pictures and sound",
    "Iterable": "a text, or several",
}


def expect(kind: type, /, **given: object) -> None:
    """Refuse what is of another kind, as a model where its workbench is asked for.

    Raises:
        WorkbenchError: names the argument, what it is, and how to come by what it should be. TaskError: for a Task.

    >>> expect(int, n=3)
    >>> expect(int, n="3")
    Traceback (most recent call last):
    workbench.errors.WorkbenchError: `n` is a str, and no int
    """
    for name, value in given.items():
        if not isinstance(value, kind):
            what = "None" if value is None else f"a {type(value).__name__}"
            error = TaskError if kind.__name__ == "Task" else WorkbenchError
            raise error(f"`{name}` is {what}, and no {kind.__name__}", hint=_MADE_BY.get(kind.__name__))
