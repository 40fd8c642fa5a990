"""The planner that needs no language model: rules over what has been found.

What comes next follows from the findings alone, so that the same findings give the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.investigator.plan import MOST_STEPS

THRESHOLD = 0.03
"""Share of prompts minus twins that an edge has to carry at first; a quarter of it where that was not enough."""
_LOWEST = THRESHOLD / 16 - 1e-12
FAITHFUL = 0.8
_EXACT_EDGES = 400  # more edges than that are scored by gradients, fewer are cut one by one
_ACCURATE = 0.95
_MOST_OTHERS = MOST_STEPS - 7  # beside all else that a plan may hold; the rest comes with later plans
_NEEDED = ("all_heads", "circuit", "faithfulness")


def plan_by_rules(state: Mapping[str, Any]) -> dict[str, Any]:
    """The next plan, as any planner answers it.

    Args:
        state: what a planner is told, as `manager` makes it: "task", "model", "budget", "findings", "known", "memory".
    """
    known = _Known(state)
    done = known.number
    last = known.findings[-1]
    if last["status"] != "done" and last["analysis"] in _NEEDED:
        why = f"What comes next rests on {last['analysis']}, which could not be done."
        return _end(why, [last["number"]])
    if "all_heads" not in done:
        if not known.baseline["does"] and known.baseline["sure"]:
            return _end("The model does not tell the prompts from their twins, so there is nothing to explain.", [0])
        if not known.baseline["does"]:
            return _end("Whether the model tells the prompts from their twins is not sure; more prompts may tell.", [0])
        return _plan("Ask first whether heads carry the difference at all, then which, then how.", [0], _whole(known))
    heads = known.of("all_heads")
    if not heads["carry"]:
        why = "The answer stays with every head taken from the twin: no circuit of heads can be there."
        unsure = "Whether heads carry the difference is not sure; more prompts may tell."
        return _end(why if heads["sure"] else unsure, [done["all_heads"]])
    if "importance" not in known.tried:
        return _plan("Heads carry the difference; find which.", [done["all_heads"]], _whole(known)[1:])
    if "circuit" not in done:
        found = known.of("importance") if "importance" in done else None
        if found is None:
            why = "Which heads matter could not be measured; the edges between them may still be."
        elif found["heads"]:
            why = "Some heads matter; find the edges between them."
        else:
            why = "No head matters alone although all do together: they may stand in for each other, so look at edges."
        return _plan(why, [known.tried["importance"]], _whole(known)[2:])
    return _after_circuit(known)


class _Known:
    """The findings, the last of each analysis."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state
        self.findings: Sequence[Mapping[str, Any]] = state["findings"]
        self.baseline: Mapping[str, Any] = self.findings[0]["numbers"]
        self.number: dict[str, int] = {}
        self.tried: dict[str, int] = {}
        for finding in self.findings[1:]:
            self.tried[finding["analysis"]] = finding["number"]
            if finding["status"] == "done":
                self.number[finding["analysis"]] = finding["number"]

    def of(self, analysis: str) -> Mapping[str, Any]:
        """Numbers of the last finding of an analysis."""
        numbers: Mapping[str, Any] = self.findings[self.number[analysis]]["numbers"]
        return numbers

    @property
    def others(self) -> list[str]:
        """Known tasks whose overlap has not been asked for."""
        asked = {f["arguments"].get("with") for f in self.findings if f["analysis"] == "overlap"}
        return [name for name in self.state["known"] if name not in asked]


def _after_circuit(known: _Known) -> dict[str, Any]:
    done, circuit = known.number, known.of("circuit")
    threshold = float(circuit["threshold"])
    checked = done.get("faithfulness", -1) > done["circuit"]
    if not circuit["heads"] and threshold > _LOWEST:
        why = f"No edges carry {threshold:.1%} of the difference each; look for smaller ones."
        return _plan(why, [done["circuit"]], [_circuit(known, threshold / 4), _step("faithfulness"), _step("roles")])
    if not circuit["heads"]:
        return _end("No circuit of heads was found, down to small edges.", [done["circuit"]])
    if not checked:
        why = "A circuit is a guess until it does the task alone, on prompts that it was not found with."
        return _plan(why, [done["circuit"]], [_step("faithfulness"), *_rest(known)])
    faithful = known.of("faithfulness")
    if not faithful["confirmed"] and done.get("minimality", -1) > done["circuit"]:
        return _explain(known, "Without what was dropped it is no longer faithful, so the circuit before stands.")
    if not faithful["confirmed"] and threshold > _LOWEST:
        why = "The circuit alone does not do the task, so parts are missing; take in smaller edges."
        return _plan(
            why, [done["faithfulness"]], [_circuit(known, threshold / 4), _step("faithfulness"), *_rest(known)]
        )
    if not faithful["confirmed"]:
        return _end("Even with small edges no circuit does the task alone.", [done["faithfulness"]])
    if known.tried.get("minimality", -1) < done["circuit"]:
        why = "The circuit is faithful; see which of its nodes it does not need."
        return _plan(why, [done["faithfulness"]], [_step("minimality"), _step("faithfulness"), *_rest(known)])
    dropped = known.of("minimality")["dropped"] if "minimality" in done else ()
    if dropped and done["faithfulness"] < done["minimality"]:
        why = f"{len(dropped)} nodes were dropped, so ask again whether the rest does the task."
        return _plan(why, [done["minimality"]], [_step("faithfulness"), *_rest(known)])
    return _explain(known, "The circuit does the task and has little to spare; say what its heads do.")


def _explain(known: _Known, why: str) -> dict[str, Any]:
    done, rest = known.number, _rest(known)
    because = [done[name] for name in ("faithfulness", "minimality", "roles") if name in done]
    return _plan(why, because, rest) if rest else _end("Everything that was planned has been answered.", because)


def _rest(known: _Known) -> list[dict[str, Any]]:
    """What is asked of a circuit that stands, as far as it has not been."""
    steps = [] if "roles" in known.tried else [_step("roles")]
    steps += [_step("overlap", {"with": name}) for name in known.others[:_MOST_OTHERS]]
    repairable = known.baseline["accuracy"] < _ACCURATE and known.state["task"]["answer_place"]
    return steps + ([_step("repair")] if repairable and "repair" not in known.tried else [])


def _whole(known: _Known) -> list[dict[str, Any]]:
    first = [_step("all_heads"), _step("importance", {"how": "mean"}), _circuit(known, THRESHOLD)]
    return [*first, _step("faithfulness"), _step("minimality", {"threshold": 0.02}), *_rest(known)]


def _circuit(known: _Known, threshold: float) -> dict[str, Any]:
    model, left = known.state["model"], known.state["budget"]["forwards"]
    n = known.state["task"]["examples"] // 2
    exact = model["edges"] <= _EXACT_EDGES and model["edges"] * n <= 0.5 * left
    why = "few enough edges to cut each of them" if exact else "too many edges to cut each; gradients estimate them"
    return _step("circuit", {"method": "acdc" if exact else "eap_ig", "threshold": threshold}, why)


def _step(analysis: str, arguments: Mapping[str, Any] | None = None, why: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"analysis": analysis, "arguments": dict(arguments or {})}
    return found | ({"why": why} if why else {})


def _plan(why: str, because: Sequence[int], steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"why": why, "because": sorted(set(because)), "steps": list(steps)}


def _end(why: str, because: Sequence[int]) -> dict[str, Any]:
    return _plan(why, because, [])
