"""The rule of runs that are undone: what was begun is undone once, the last step first."""

from collections.abc import Callable, Iterator

from tests.faults.history import ENDED, History, Violation, of_type

UNDOES = "#undo:"
"""In the name of a step that undoes another one."""


def steps_are_undone(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        begun = dict.fromkeys(
            f"{event['data']['undo']}{UNDOES}{event['step']}"
            for event in of_type(events, "StepStarted")
            if (event["data"] or {}).get("undo")
        )
        expected = [*reversed(begun)]
        ended = [
            event["step"]
            for event in events
            if UNDOES in (event["step"] or "")
            and (
                event["type"] == "StepFinished"
                or (event["type"] == "StepFailed" and (event["data"] or {}).get("final"))
            )
        ]
        if run["state"] == "completed":
            expected = []
        if ended != expected[: len(ended)]:
            yield Violation("undo", run_id, f"undid {ended}, and not {expected}")
        elif run["state"] in ENDED and ended != expected:
            yield Violation("undo", run_id, f"ended after {ended}, and not {expected}")


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (steps_are_undone,)
