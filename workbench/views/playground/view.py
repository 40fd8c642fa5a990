"""Playground: the view of a prompt that is run again and again, live with a kernel, still on a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from workbench.capture.capture import Capture
from workbench.errors import ReportError, WorkbenchError, expect
from workbench.hooks.heads import parse_heads
from workbench.session.workbench import Workbench
from workbench.storage.weights import weights_now
from workbench.tokens import visible_text
from workbench.views.base.selection import Selection, SharedSelection, inputs_of
from workbench.views.base.spec import ViewSpec
from workbench.views.base.view import View
from workbench.views.playground import facts
from workbench.views.playground.edits import Ablated, asked_edits
from workbench.views.playground.picture import draw
from workbench.views.playground.running import Ran, run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHANGED = (
    "The model's weights have changed since the playground was made: both runs are of the weights as they are now."
)
STATISTICS = ("entropy", "effective_keys", "distance", "sink", "current", "previous", "peak", "induction")


class Playground(View):
    """See `playground`."""

    size = (13.0, 4.8)

    def __init__(
        self,
        wb: Workbench,
        prompt: str,
        *,
        written: str = "",
        statistics: Sequence[str] = STATISTICS,
        title: str = "Playground",
        selection: SharedSelection | None = None,
    ) -> None:
        self._wb, self._statistics, self._title = wb, tuple(statistics), title
        self._ran = run(wb, prompt, written, statistics=self._statistics)
        self._provenance, self._weights = wb.provenance(), weights_now(wb.model)
        self._changed = False
        self._dropped: tuple[Ablated, ...] = ()
        self._inputs = inputs_of(["playground", *facts.tokens_of(self._ran)])
        first = facts.spec_of(
            self._ran, Selection(), (), title=title, provenance=self._provenance, inputs=self._inputs
        )  # fmt: skip
        super().__init__(first, selection)

    @property
    def prompt(self) -> str:
        """The prompt that was run last."""
        return self._ran.prompt

    @property
    def edits(self) -> tuple[Ablated, ...]:
        """What is ablated."""
        return self._ran.edits

    def run(self, prompt: str | None = None, *, written: str | None = None, renormalise: bool | None = None) -> Self:
        """Run another prompt, or the same one again; what is ablated stays, where the prompt has such positions.

        Args:
            written: what the decoder of an encoder-decoder has written so far.
            renormalise: whether what an edge had goes to the other keys of its row.

        Raises:
            WorkbenchError: as `playground`; what is shown stays what it was.
        """
        ran = self._ran
        self._show(
            ran.prompt if prompt is None else prompt,
            ran.written if written is None else written,
            ran.edits,
            ran.renormalise if renormalise is None else renormalise,
        )
        return self

    def ablate(self, heads: Any, query: int | None = None, key: int | None = None) -> Self:
        """Take heads out of the model, or a row of them, or an edge, beside what is ablated already.

        Args:
            heads: one or several, as `wb.ablate` takes them: "L1H6", (1, 6), (site, 6).
            query: whose row; the whole head if None. key: to which its edge leads; the whole row if None.
                Negative positions count from the end.

        Raises:
            InterventionError: no such head. ReportError: no such position, or a key that the query does not see.
        """
        if query is None and key is not None:
            raise ReportError("an edge begins at a query", hint="give query= as well as key=")
        chosen = parse_heads(self._wb.sites, heads)
        new = []
        for site, found in chosen.items():
            _, _, queries, keys = self._ran.before[site].shape
            where = _from_the_start(query, queries), _from_the_start(key, keys)
            new += [Ablated(site, head, *where) for head in found]
        ran = self._ran
        self._show(ran.prompt, ran.written, tuple(dict.fromkeys((*ran.edits, *new))), ran.renormalise)
        return self

    def clear(self, *edits: Ablated) -> Self:
        """Put back some of `edits`, or all of them if none is given."""
        ran = self._ran
        kept = tuple(edit for edit in ran.edits if edits and edit not in edits)
        self._show(ran.prompt, ran.written, kept, ran.renormalise)
        return self

    @property
    def current(self) -> ViewSpec:
        """The spec with the pattern of the head that is chosen now, which is the one that a page keeps."""
        if facts.head_at(self._ran, self.chosen) != self.spec.facts["kept"]:
            self.spec = self._made(self._ran, self._dropped)
        return super().current

    def answer(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
        """Run what the browser asks for, or give the pattern of a head in bytes (see `attention_pattern.pyramid`)."""
        with _told():
            if question.get("ask") == "run":
                edits = asked_edits(question.get("edits"), [site.path for site in facts.sites_of(self._ran.before)])
                prompt, written = question.get("prompt"), question.get("written") or ""
                self._show(prompt, written, tuple(edits), question.get("renormalise") is True)
                return {}, []
            if question.get("ask") == "pattern":
                cells = facts.cells_of(self._ran, question.get("at"), after=question.get("after") is True)
                return {"shape": list(cells.shape)}, [cells.tobytes()]
        return super().answer(question)

    def picture(self, figure: Figure) -> None:
        draw(figure, self.current, self.chosen)

    def _show(self, prompt: Any, written: Any, edits: tuple[Ablated, ...], renormalise: bool) -> None:
        """Run, and show it everywhere; where something is wrong all stays as it was."""
        same = (prompt, written) == (self._ran.prompt, self._ran.written)
        dropped: list[Ablated] = []

        def fits(capture: Capture, edit: Ablated) -> bool:
            try:
                facts.check_there(edit, capture)
            except WorkbenchError:
                if same:
                    raise
                dropped.append(edit)
            return edit not in dropped

        ran = run(
            self._wb, prompt, written, edits, renormalise=renormalise, statistics=self._statistics, fits=fits
        )  # fmt: skip
        now = weights_now(self._wb.model)
        if now != self._weights:
            self._changed, self._weights, self._provenance = True, now, self._wb.provenance()
        made = self._made(ran, dropped)
        others = facts.tokens_of(ran) != facts.tokens_of(self._ran)
        self._ran, self._dropped = ran, tuple(dropped)
        self._renew(made)
        if others:  # positions that are chosen were those of another prompt
            self.select(query=None, key=None, token=None)

    def _made(self, ran: Ran, dropped: Sequence[Ablated]) -> ViewSpec:
        """The spec of a run, with the pattern of the head that is chosen."""
        made = facts.spec_of(
            ran, self.chosen, dropped, title=self._title, provenance=self._provenance, inputs=self._inputs
        )
        notes = (*made.notes, *([_CHANGED] if self._changed else []))
        return replace(made, notes=notes, state=self.spec.state)


def _from_the_start(at: int | None, n: int) -> int | None:
    return at + n if at is not None and -n <= at < 0 else at


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong while the browser waits is told to it, also an interrupt of the kernel."""
    try:
        yield
    except WorkbenchError:
        raise
    except KeyboardInterrupt:
        raise ReportError("the run was interrupted", hint="shown is the last run that was whole") from None
    except Exception as error:
        said = visible_text(f"{type(error).__name__}: {error}", 400)
        raise ReportError(f"the model could not run: {said}", hint="shown is the last run that was whole") from error


def playground(
    wb: Workbench,
    prompt: str,
    *,
    written: str = "",
    statistics: Sequence[str] = STATISTICS,
    title: str = "Playground",
    selection: SharedSelection | None = None,
) -> Playground:
    """A prompt to edit and run: heads, a head's pattern, and what the model says next, before and after ablations.

    In a notebook a head, a row (what one query reads) or an edge (from a query to a key) is pressed to take it out, and
    the distribution over the next token is shown beside the one without edits. From Python `run`, `ablate` and `clear`
    do the same. The model stays on its kernel: a change costs two forwards. On a page the last state is a still view.

    Args:
        wb: a language model, attached with its tokenizer. A masked one predicts the tokens at the masks of the prompt,
            an encoder-decoder the one after what it has written.
        prompt: a text; one that a model's chat template made is taken as it is.
        written: what the decoder of an encoder-decoder has written so far.
        statistics: that heads can be coloured by, as `wb.capture` takes them.

    Raises:
        CaptureError: no tokenizer, a prompt that is too long for the model, an unknown statistic.
        ReportError: an empty prompt, one without a mask where one is needed, a model that reads or predicts no text.
        AttachError: the workbench is detached. InterventionError: the model drops out, or an intervention is open.

    >>> import workbench
    >>> model, tokenizer = workbench.models.load("demo-lm")
    >>> with workbench.attach(model, tokenizer) as wb:
    ...     play = playground(wb, "When Mary and John went to the store, John gave a drink to").ablate("L4H1")
    >>> play.edits
    (transformer.h.4.attn head 1,)
    """
    expect(Workbench, wb=wb)
    return Playground(wb, prompt, written=written, statistics=statistics, title=title, selection=selection)
