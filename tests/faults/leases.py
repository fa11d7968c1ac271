"""Rules of the checker about leases: who holds one, how long, and the attempts that follow.

None of them depends on how fast the machine is: a lease that has run out, or was ended, is known
from the log, and explains one new attempt.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from tests.faults.history import History, Record, Violation, of_type

UNCOUNTED = ("beatless.snoozed", "beatless.given_back", "beatless.connection_lost")
"""Names of the traces after which an attempt is made again with the same number."""

OF_SESSIONS = (
    *("every_session", "one_session", "postgres_", "too_many", "settings_made", "disk_"),
    *("connections_to_postgres", "all connections", "answer_to", "worker_behind"),
    "another_history",
)
"""Begins of the names of faults that take its sessions from a worker: then it may be taken for dead
while it lives, as a frozen one is taken for gone when its lease runs out."""

PROOF_S = 10.0
"""So long after such a fault."""

LATE_S = 2.0
"""So long after it such a fault may be noted."""

FLIGHT_S = 10.0
"""So long after its death what a process has sent may still arrive, where Postgres is slow."""

LONG_AFTER_S = 20.0
"""So long after its grace a process has ended, also on a slow machine, and if it was frozen."""

BESIDE = 2**30
"""Versions from here on are of steps that were begun beside others."""

MANY_LAPSES = 6
"""So many leases do not run out where workers renew them, however rarely they come to it."""


def leases_exclude(history: History) -> Iterator[Violation]:
    for run_id, log in history.log.items():
        tokens: set[int] = set()
        stored = {event["seq"]: event["data"] or {} for event in history.events.get(run_id, ())}
        started: set[tuple[str, int]] = set()
        # In one transaction the claim comes first, in whichever order the triggers fired.
        first = {record["txid"]: n for n, record in reversed(list(enumerate(log)))}
        for record in sorted(log, key=lambda r: (first[r["txid"]], r["event"] is not None)):
            if (claim := record["claim"]) is not None:
                if not claim["token"] or claim["token"] in tokens:
                    yield Violation("I11", run_id, f"token {claim['token']} is no new one")
                if claim["was_running"] and claim["lease_until"] > claim["at"]:
                    yield Violation("I11", run_id, "a lease was taken from a worker that holds it")
                tokens.add(claim["token"])
                started = set()
            elif (event := record["event"]) is not None:
                step, data = (event["step"], event["attempt"]), stored.get(event.get("seq"), {})
                if event["type"] == "StepStarted":
                    started = {step} | (started if data.get("version", 0) >= BESIDE else set())
                # The relay fails a run whose worker has ended too often, outside of any lease.
                elif (
                    event["type"] in ("StepFinished", "StepFailed", "DebugTrace", "StepOutput")
                    and event["source"] == "worker"
                    and event["step"] is not None
                    and step not in started
                    and not of_another_lease(data)
                ):
                    yield Violation("I11", run_id, f"{event['type']} {step} in {started}'s lease")


def of_another_lease(data: Record) -> bool:
    """Whether this event of a step is about its attempt in a lease before, beside others."""
    error = data.get("error") or {}
    return lost_attempt(data) or error.get("type") == "StepAbandoned"


def lost_attempt(data: Record) -> bool:
    """Of a process that died beside others, or whose lease ran out: it is made again under its
    number."""
    return "process_died" in data or "lease_ran_out" in data


def leases_last(history: History) -> Iterator[Violation]:
    """A lease that is renewed lasts as long as a new one, and leases are renewed."""
    renewals, lapsed = 0, []
    for run_id, log in history.log.items():
        for lease in (record["lease"] for record in log if record.get("lease")):
            renewed = lease["until"] > lease["at"]
            renewals += renewed
            if renewed and lease["until"] < lease["statement_at"] + lease["seconds"] - 0.001:
                kept_s = lease["until"] - lease["statement_at"]
                yield Violation("I11", run_id, f"a lease was renewed for {kept_s:.2f} s")
        ended = any(record.get("lease") for record in log)
        lapsed += [
            run_id for record in log if (c := record["claim"]) and c["was_running"] and not ended
        ]
    if len(lapsed) >= MANY_LAPSES and not renewals:
        yield Violation("I11", lapsed[0], f"{len(lapsed)} leases ran out and none was renewed")


def only_the_dead_are_taken_for_dead(history: History) -> Iterator[Violation]:
    """A worker whose lease was ended claims nothing after that, unless its sessions were cut."""
    last: dict[str, float] = {}
    ended: dict[str, tuple[float, str]] = {}
    for run_id, log in history.log.items():
        for record in log:
            if (claim := record["claim"]) and claim.get("worker"):
                worker = claim["worker"]
                last[worker] = max(last.get(worker, 0.0), claim["statement_at"])
            elif (lease := record.get("lease")) and lease["until"] <= lease["at"]:
                first = ended.get(lease["worker"], (lease["at"], run_id))
                ended[lease["worker"]] = min(first, (lease["at"], run_id))
    cuts = [fault for fault in history.faults if fault["name"].startswith(OF_SESSIONS)]
    for worker, (at, run_id) in ended.items():
        excused = any(cut["begin"] <= at + LATE_S and cut["end"] >= at - PROOF_S for cut in cuts)
        if not excused and last.get(worker, 0.0) > at + FLIGHT_S:
            yield Violation("I11", run_id, f"{worker} was taken for dead, and lives")


def who_was_asked_to_stop_stops(history: History) -> Iterator[Violation]:
    """A worker, and its children, claim nothing when their grace is long over."""
    last: dict[int, float] = {}
    for stop in history.stops:
        last |= dict.fromkeys(stop["pids"], stop["at"] + stop["grace_s"] + LONG_AFTER_S)
    for run_id, log in history.log.items() if last else ():
        for claim in (record["claim"] for record in log if record["claim"]):
            pid = (claim["worker"] or "").split(":")[1:2]
            if pid and claim["statement_at"] > last.get(int(pid[0]), 1e18):
                yield Violation("I11", run_id, f"{claim['worker']} claims long after its grace")


def results_are_of_the_last_attempt(history: History) -> Iterator[Violation]:
    """I11 by what is in the journal: a result names the call of the body that made it."""
    for run_id, _, events in history.each_run():
        calls = {effect["call"]: effect for effect in history.effects[run_id]}
        for event in of_type(events, "StepFinished"):
            result = (event["data"] or {}).get("result")
            if not isinstance(result, dict) or "call" not in result:
                continue
            effect = calls.get(result["call"])
            step = event["step"], event["attempt"]
            if effect is None:
                yield Violation("I4", run_id, f"the result of {step} is of no body")
            elif (made := (effect["step"], effect["attempt"])) != step:
                yield Violation("I11", run_id, f"the result of {step} is of {made}")


def attempts_are_explained(history: History) -> Iterator[Violation]:
    """A step begins again after a failure, a give-back, or with a run that was taken over."""
    for run_id, _, events in history.each_run():
        taken_over = sum(
            claim["was_running"] for record in history.log[run_id] if (claim := record["claim"])
        )
        started = Counter(e["step"] for e in of_type(events, "StepStarted"))
        failed = Counter(e["step"] for e in of_type(events, "StepFailed"))
        traces = of_type(events, "DebugTrace")
        failed.update(e["step"] for e in traces if (e["data"] or {}).get("name") in UNCOUNTED)
        for step, count in (started - failed).items():
            if count > 1 + taken_over:
                yield Violation(
                    "I10", run_id, f"{step} began {count} times, {taken_over} takeovers"
                )
        effects = Counter((e["step"], e["attempt"]) for e in history.effects[run_id])
        given_back = Counter(
            (e["step"], e["attempt"]) for e in traces if lost_attempt(e["data"] or {})
        )
        for (step, attempt), count in effects.items():
            if count > 1 + given_back[step, attempt]:
                yield Violation("I10", run_id, f"attempt {attempt} of {step} ran {count} times")


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    leases_exclude,
    leases_last,
    only_the_dead_are_taken_for_dead,
    who_was_asked_to_stop_stops,
    results_are_of_the_last_attempt,
    attempts_are_explained,
)
