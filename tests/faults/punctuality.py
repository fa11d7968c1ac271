"""Rules of the checker about time: what is too early, too late, forgotten, or was to pause."""

from collections.abc import Callable, Iterator
from statistics import median

from tests.faults.history import ENDED, NEVER, History, Violation, of_type

SLOW_FACTOR = 30
"""In a calm nothing takes so many times as long as half of all."""

ENOUGH_WAITS = 10
"""Fewer show nothing about the others."""

DEADLINE_SLACK_S = 8.0
"""A start may be on its way to Postgres for so long when its deadline comes, of a process that is
held up."""

DEADLINE_BOUND_S = 180.0
"""A run whose deadline has passed has ended within this time, whatever else happens: on a slow
machine it takes a minute or two until all processes are there again."""


def quiet_runs_go_on(history: History) -> Iterator[Violation]:
    for quiet in history.quiets:
        if quiet["drained"] is not None:
            continue
        if quiet["rows"]:
            yield Violation("I8", "-", f"{quiet['rows']} rows are left in the outbox in quiet")
        for run_id, run, events in history.each_run():
            due = history.due(run_id, events) if events else NEVER
            if run["state"] not in ENDED and due < quiet["begin"]:
                yield Violation("I7", run_id, f"is {run['state']}, and has not moved in quiet")


def calm_is_prompt(history: History) -> Iterator[Violation]:
    waits = list(history.waits())
    for calm in history.calms:
        # Where all are slow, one is not forgotten that is a little slower.
        took_s = [
            until - since
            for *_, since, until in waits
            if calm["begin"] < since and until <= calm["end"]
        ]
        half_s = median(took_s) if len(took_s) >= ENOUGH_WAITS else 0.0
        bound_s = max(calm["bound_s"], SLOW_FACTOR * half_s)
        for what, run_id, since, until in waits:
            waited_s = min(until, calm["end"]) - max(since, calm["begin"])
            if waited_s > bound_s:
                yield Violation("prompt", run_id, f"{what} took {waited_s:.1f} s of calm")


def times_are_kept(history: History) -> Iterator[Violation]:
    delays = {c["run_id"]: c["delay_s"] for c in history.called("start") if c.get("delay_s")}
    for run_id, run, events in history.each_run():
        begins = of_type(events, "StepStarted")
        if begins and begins[0]["ts"] < run["created_at"] + delays.get(run_id, 0) - 0.01:
            yield Violation("delay", run_id, "began before its time")
        deadline = run["deadline_at"]
        if deadline and events and events[-1]["ts"] > deadline + DEADLINE_BOUND_S:
            yield Violation("deadline", run_id, "ended long after its deadline")
        # A connection that is held carries a start late.
        slack_s = (
            DEADLINE_SLACK_S + 5 * (history.faults_during(deadline - 5, deadline + 5) > 0)
            if deadline
            else 0
        )
        if deadline and any(event["ts"] > deadline + slack_s for event in begins):
            yield Violation("deadline", run_id, "a step began after its deadline")


def pauses_are_kept(history: History) -> Iterator[Violation]:
    changes = sorted(
        (c for c in history.calls if c["op"] in ("pause", "resume")), key=lambda c: c["begin"]
    )
    for n, pause in enumerate(changes):
        if pause["op"] != "pause" or pause["outcome"] != "ok":
            continue
        until = next((c["begin"] for c in changes[n + 1 :] if c["queue"] == pause["queue"]), 1e18)
        for run_id, log in history.log.items():
            for claim in (record["claim"] for record in log if record["claim"]):
                # A run that had begun goes on: a pause keeps runs from beginning.
                begun = claim["was_running"] or claim["queue"] != pause["queue"]
                if not begun and pause["end"] < claim["statement_at"] < until:
                    yield Violation("pause", run_id, f"claimed while {pause['queue']} is paused")


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    quiet_runs_go_on,
    calm_is_prompt,
    times_are_kept,
    pauses_are_kept,
)
