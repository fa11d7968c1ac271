"""Checks of runs and events that wait: for a plan, a worker, a relay, or for ever."""

from collections.abc import Iterator

from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, counted, ok, problem, warn
from beatless.doctor.probe import Need, Probe
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.long_history import MANY_EVENTS, MAX_EVENTS, READ_TYPES
from beatless.orchestrator.progress import CHANGED_CALL, SNOOZED, UNKNOWN_STEP
from beatless.orchestrator.queues import QueueStatements
from beatless.outbox.letters import LetterStatements
from beatless.outbox.message import SHARDS
from beatless.places import places
from beatless.unfit_rows import unfit_rows
from beatless.worker import canary

MAX_WAIT_S = 60.0
"""A queue whose oldest run has been due for longer is reported."""

LAG_WARNING_S, LAG_PROBLEM_S = 10.0, 60.0
"""Ages of the oldest event that is not published."""

OLDEST_RUNS = 10_000
"""Unfinished runs whose histories are looked at."""

MAX_QUEUES, MAX_PLACES, MAX_ROWS = 3, 5, 3
"""Reported at once."""


@check("plans", needs={Need.SCHEMA})
def plans(probe: Probe) -> Iterator[Verdict]:
    """Unfinished runs that this app, or the workers' version of a plan, cannot go on with."""
    sql = _sql(probe)
    known = [*probe.app.plans, canary.NAME]
    unknown = probe.rows(sql["unknown_plans"], {"known": known})
    if unknown:
        names = ", ".join(f"{plan} ({runs})" for plan, _, runs in unknown[:MAX_PLACES])
        yield warn(
            f"runs wait whose plan this app does not have: {names}",
            "if no other app has it, deploy the plan again or cancel the runs",
        )
    app = probe.app
    waiting = places(app.engine, app.journal, app.plans, reasons=[UNKNOWN_STEP, CHANGED_CALL])
    if waiting:
        names = ", ".join(
            f"{place.plan}.{place.step} ({place.runs}: {place.run_ids[0]})"
            for place in waiting[:MAX_PLACES]
        )
        lists = "deploy a version that has it, or say what it is called now: "
        lists += 'Plan(…, renamed={"before": "now"}); `beatless plan check` names all'
        functions = "`beatless plan check` with the workers' code tells what a function does "
        functions += "instead, and what helps"
        called = {
            place.plan for place in waiting if isinstance(app.plans.get(place.plan), FunctionPlan)
        }
        advice = [functions] * bool(called)
        advice += dict.fromkeys(each.advice or lists for each in waiting if each.plan not in called)
        yield warn(
            f"runs wait in a step that the workers' version of the plan lacks, or calls "
            f"differently, or that has another before it: {names}",
            "; ".join(advice),
        )
    if not unknown and not waiting:
        yield ok(f"all unfinished runs are of the {len(app.plans)} plans of this app")


@check("histories", needs={Need.SCHEMA})
def histories(probe: Probe) -> Verdict:
    """Unfinished runs with histories of so many events that they may fail."""
    sql = _sql(probe)
    found = probe.rows(
        sql["long_histories"],
        {"types": list(READ_TYPES), "snoozed": SNOOZED, "many": MANY_EVENTS},
    )
    if not found:
        return ok(f"none of the oldest {OLDEST_RUNS:,} has {MANY_EVENTS:,} events")
    named = ", ".join(f"{run_id} of {plan} ({events:,})" for run_id, plan, events in found)
    return warn(
        f"runs have long histories, and fail with {MAX_EVENTS:,} events: {named}",
        "have the function of the plan return run.again(…) now and then; make a list with a loop "
        "a function",
    )


@check("outbox", needs={Need.SCHEMA})
def outbox(probe: Probe) -> Iterator[Verdict]:
    """Events that are not published, and those that were given up on."""
    sql = _sql(probe)
    pending, age_s, letters = probe.rows(sql["unpublished"])[0]
    late = (age_s or 0) > LAG_WARNING_S
    if late:
        verdict = problem if age_s > LAG_PROBLEM_S else warn
        yield verdict(
            f"{pending:,} appends are not published, the oldest for {age_s:.0f} s",
            "look at relays and redis above, then at a relay's log",
        )
    if letters:
        found = LetterStatements(probe.schema).list(probe.postgres, limit=MAX_ROWS)
        named = "; ".join(
            f"events {letter.from_seq} to {letter.to_seq} of {letter.run_id}: {letter.reason}"
            for letter in found
        )
        yield warn(
            f"{counted(letters, 'dead letter')}: {named}",
            "beatless dead-letters, then requeue or discard",
        )
    if not late and not letters:
        yield ok("everything is published")


@check("queues", needs={Need.SCHEMA})
def queues(probe: Probe) -> Iterator[Verdict]:
    """Queues whose runs wait for long, and those that are paused."""
    sql = _sql(probe)
    states = QueueStatements(probe.schema).states(probe.postgres, ended=False)
    now = probe.rows(sql["now"])[0][0]
    ages = [
        ((now - state.oldest).total_seconds(), state)
        for state in states
        if state.oldest is not None and state.paused_at is None
    ]
    late = [(age_s, state) for age_s, state in ages if age_s > MAX_WAIT_S]
    paused = [state.name for state in states if state.paused_at is not None]
    for age_s, state in sorted(late, key=lambda each: each[0], reverse=True)[:MAX_QUEUES]:
        yield warn(
            f"{counted(state.queued, 'run')} of queue {state.name} "
            f"{'waits' if state.queued == 1 else 'wait'}, the oldest for "
            f"{age_s:.0f} s",
            missing_for(probe, state.name),
        )
    if paused:
        yield warn(
            f"paused: {', '.join(paused)}", "beatless resume Q, if that is not wanted any more"
        )
    if not late and not paused:
        yield ok(f"no queue older than {MAX_WAIT_S:.0f} s")


def missing_for(probe: Probe, queue: str) -> str:
    """The advice for a queue whose runs wait."""
    if probe.broker_error is not None:
        return "the broker cannot be reached: mend that first"
    if not probe.consumed_queues:
        return f"no worker answers: beatless worker --queues {queue}"
    if probe.is_unconsumed(queue):
        return f"nobody consumes it: beatless worker --queues {queue}"
    return "more workers, or more concurrency"


@check("rows", needs={Need.SCHEMA})
def rows(probe: Probe) -> Iterator[Verdict]:
    """Rows of unfinished runs that no relay can act on."""
    found = unfit_rows(probe.postgres, probe.schema, limit=MAX_ROWS)
    for violation in found:
        yield problem(
            f"run {violation.run_id}: {violation.problem}",
            "beatless did not write that: mend the row, or beatless remove RUN",
        )
    if not found:
        yield ok("a relay can act on all of them")


def _sql(probe: Probe) -> dict[str, str]:
    return probe.sql(__file__, last_shard=SHARDS - 1, oldest_runs=OLDEST_RUNS)
