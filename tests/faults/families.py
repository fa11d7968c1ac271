"""Rules of the checker about children and output: each once, in order, and none is left behind."""

from collections import Counter
from collections.abc import Callable, Iterator

from tests.faults.history import ENDED, NEVER, History, Record, Violation, of_type

MOST_WIDTH = 1e9

QUIET_S = 6.0
"""Seconds of quiet, drained and calm, in which a cancel has gone down."""


def children_are_started_once(history: History) -> Iterator[Violation]:
    """Each by its number, which belongs to one call of its parent."""
    for run_id, _, events in history.each_run():
        children = history.children(run_id)
        numbers = Counter(child["child_no"] for child in children)
        for number, count in numbers.items():
            if count > 1:
                yield Violation("child", run_id, f"has {count} children of number {number}")
        owned: Counter[int] = Counter()
        for started in of_type(events, "ChildrenStarted"):
            first = started["data"]["first"]
            owned.update(range(first, first + started["data"]["count"]))
        for number, count in owned.items():
            if count > 1:
                yield Violation("child", run_id, f"number {number} was given {count} times")
        for number in numbers.keys() - owned.keys():
            yield Violation("child", run_id, f"child {number} is of no call")
        calls = Counter(event["step"] for event in of_type(events, "ChildrenStarted"))
        for call, count in calls.items():
            if count > 1:
                yield Violation("child", run_id, f"{call} has started its children {count} times")


def at_once_is_kept(history: History) -> Iterator[Violation]:
    """By the clock of Postgres: an end that was seen is before the start that it has allowed."""
    for run_id, _, events in history.each_run():
        for started in of_type(events, "ChildrenStarted"):
            data = started["data"]
            most = data.get("at_once") or MOST_WIDTH
            numbers = range(data["first"], data["first"] + data["count"])
            mine = [c["run_id"] for c in history.children(run_id) if c["child_no"] in numbers]
            changes = [
                (history.events[child][0]["ts"], 1) for child in mine if child in history.events
            ]
            changes += [(history.end(child), -1) for child in mine]
            unfinished = 0
            for _, change in sorted(changes):
                unfinished += change
                if unfinished > most:
                    yield Violation("child", run_id, f"{unfinished} children at once, not {most}")
                    break


def results_are_in_order(history: History) -> Iterator[Violation]:
    """A parent is given what its children have given, in the order of their numbers."""
    for run_id, run, events in history.each_run():
        result = (events[-1]["data"] or {}).get("result") if events else None
        if run["state"] != "completed" or not isinstance(result, dict) or "ends" not in result:
            continue
        starts = of_type(events, "ChildrenStarted")
        maps = [each for each in starts if "run_id" not in each["data"]]
        if run["retry_of"] or not maps:  # which was given those of the other run, too
            continue
        first, count = maps[0]["data"]["first"], maps[0]["data"]["count"]
        by_number = {child["child_no"]: child["run_id"] for child in history.children(run_id)}
        ends = [call_of(history, by_number.get(n, "")) for n in range(first, first + count)]
        for told in (result["ends"], result["counted"]):
            if told != ends:
                yield Violation("child", run_id, f"was given {told}, its children gave {ends}")
        if result["alone"] != (alone := call_of(history, by_number.get(1, ""))):
            yield Violation("child", run_id, f"was given {result['alone']}, its child gave {alone}")


def call_of(history: History, run_id: str) -> str | None:
    """The call that a completed child names."""
    events = history.events.get(run_id, [])
    data = (events[-1]["data"] or {}) if events else {}
    return (data.get("result") or {}).get("call") if data.get("outcome") == "completed" else None


def ends_go_down(history: History) -> Iterator[Violation]:
    """In a quiet that has drained, no child goes on whose parent had ended, or was cancelled."""
    for run_id, run, _ in history.each_run():
        ended = min([history.end(run_id), run.get("cancel_requested_at") or NEVER])
        for quiet in history.quiets:
            bound_s = QUIET_S + quiet.get("slack_s", 0.0)
            if quiet["drained"] is None or max(ended, quiet["begin"]) > quiet["end"] - bound_s:
                continue
            for child in history.children(run_id):
                asked = child.get("cancel_requested_at") or NEVER
                left = min(asked, history.end(child["run_id"])) > quiet["end"]
                if left and not child["detached"]:
                    yield Violation("child", child["run_id"], f"outlives its parent {run_id}")
    for run_id, run, _ in history.each_run():
        if history.over and run.get("parent_id") and run["state"] not in ENDED:
            yield Violation("child", run_id, f"is {run['state']} after all is over")


def output_is_dense(history: History) -> Iterator[Violation]:
    """Each attempt's output begins at 0 and has every piece; a result has all of its attempt's."""
    for run_id, _, events in history.each_run():
        pieces: list[int] = []
        for event in events:
            if event["type"] == "StepStarted":
                pieces = []
            elif event["type"] == "StepOutput":
                if event["data"]["first"] != len(pieces):
                    first = event["data"]["first"]
                    yield Violation("output", run_id, f"{first} follows {len(pieces)} pieces")
                    break
                pieces += event["data"]["pieces"]
                if pieces != list(range(len(pieces))):
                    yield Violation("output", run_id, f"is {pieces}")
                    break
            elif event["type"] == "StepFinished":
                if (missing := lacks(event, pieces)) is not None:
                    yield Violation("output", run_id, missing)
                pieces = []


def lacks(finished: Record, pieces: list[int]) -> str | None:
    result = (finished["data"] or {}).get("result")
    emitted = result.get("pieces", 0) if isinstance(result, dict) else 0
    return None if emitted == len(pieces) else f"{len(pieces)} of {emitted} pieces are stored"


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    children_are_started_once,
    at_once_is_kept,
    results_are_in_order,
    ends_go_down,
    output_is_dense,
)
