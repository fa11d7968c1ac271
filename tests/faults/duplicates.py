"""Runs with a dedupe key: what the load wishes, and the rules of the checker about them.

Each input of theirs has a number of its own.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults.history import NEVER, History, Record, Violation, of_type

KEYS = 3
"""So few that starts of one key meet."""

NUMBERS = itertools.count(1)

STORES = ("started", "input_replaced")
"""Outcomes of starts whose input a run has."""

CLOCK_S = 0.002
"""Stored times are of milliseconds."""


def wish(chance: random.Random, key: int | None = None) -> dict[str, Any]:
    """A start that meets others."""
    key = chance.randrange(KEYS) if key is None else key
    mode = chance.choice(["debounce", "debounce", "debounce", "replace", "join", "skip"])
    found: dict[str, Any] = {
        "plan": "synced",
        "dedupe_key": f"customer-{key}",
        "input": {"number": next(NUMBERS), "seconds": chance.choice([0, 0.05, 0.5, 1.5])},
    }
    if mode != "debounce":
        return found | {"while_unfinished": mode}
    found["debounce"] = chance.choice([0.05, 0.3, 1])
    return found | ({"max_wait": 2} if chance.random() < 0.7 else {})


def batch(chance: random.Random) -> list[dict[str, Any]]:
    """Several in one call, of one key."""
    key = chance.randrange(KEYS)
    return [wish(chance, key) for _ in range(4)]


def replaces(cancel: Record) -> bool:
    """Whether a start has asked for this cancel: one that replaces the run."""
    return str((cancel["data"] or {}).get("reason")).endswith(" replaces it")


def one_at_a_time(history: History) -> Iterator[Violation]:
    """By the clock of Postgres: the end of a run is committed before another one begins."""
    for key, runs in _by_key(history).items():
        begun = sorted(
            (of_type(events, "StepStarted")[0]["ts"], history.end(run_id), run_id)
            for run_id, events in runs
            if of_type(events, "StepStarted")
        )
        for (_, end, before), (begin, _, run_id) in itertools.pairwise(begun):
            if begin < end:
                yield Violation("I13", run_id, f"began while {before} had {key}, too")


def the_last_input_is_stored(history: History) -> Iterator[Violation]:
    """Of the inputs that a run was given none was given wholly before another one that is gone."""
    given: dict[str, list[Record]] = defaultdict(list)
    numbers: dict[int, Record] = {}
    for call in history.calls:
        if call["op"] == "start" and call.get("number") is not None:
            numbers[call["number"]] = call
            if call["outcome"] == "ok" and call["start"] in STORES:
                given[call["run_id"]].append(call)
    for run_id, run, events in history.each_run():
        if not run.get("dedupe_key") or run["retry_of"]:
            continue
        stored = numbers.get(run["number"])
        if stored is None or stored["outcome"] == "rolled_back":
            yield Violation("input", run_id, f"has the input {run['number']}, which nobody gave")
            continue
        end = stored["end"] if stored["outcome"] == "ok" else NEVER
        for call in given[run_id]:
            if end < call["begin"]:
                lost = f"has the input {run['number']}, and {call['number']} came later"
                yield Violation("input", run_id, lost)
        for event in of_type(events, "StepFinished"):
            if event["data"]["result"].get("number") != run["number"]:
                yield Violation("input", run_id, "was executed with another input than it has")


def inputs_are_waited_for(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        replaced = of_type(events, "InputReplaced")
        begun = of_type(events, "StepStarted")
        if not run.get("dedupe_key") or not replaced or not begun:
            continue
        if replaced[-1]["seq"] > begun[0]["seq"]:
            yield Violation("input", run_id, "got another input after it had begun")
        elif begun[0]["ts"] < replaced[-1]["data"]["not_before"] / 1000 - CLOCK_S:
            yield Violation("delay", run_id, "began before its last input was old enough")


def aside_of_an_unfinished_run(history: History) -> Iterator[Violation]:
    """An end that somebody has heard of was committed, which may be long after its time."""
    for call in history.called("start"):
        aside = call.get("start") in ("joined", "skipped")
        if aside and history.end_heard(call["run_id"]) < call["begin"]:
            yield Violation("I13", call["run_id"], f"had ended, and a start has {call['start']} it")


def _by_key(history: History) -> dict[str, list[tuple[str, list[Record]]]]:
    found: dict[str, list[tuple[str, list[Record]]]] = defaultdict(list)
    for run_id, run, events in history.each_run():
        if run.get("dedupe_key"):
            found[run["dedupe_key"]].append((run_id, events))
    return found


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    one_at_a_time,
    the_last_input_is_stored,
    inputs_are_waited_for,
    aside_of_an_unfinished_run,
)
