"""Checks a recorded history: what callers did, what bodies did, what viewers saw, what is stored.

It imports nothing of the project, so that a mistake of the product is not repeated here. The
records are described in `history.py`, the invariants in docs/guarantees.md.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tests.faults.history import History, Record

END = "RunFinished"
ENDED = ("completed", "failed", "cancelled")
DEADLINE_BOUND_S = 60.0
"""A run whose deadline has passed has ended within this time, whatever else happens."""


AFTERMATH_S = 5.0
"""How long after a fault it may still be the reason of a new attempt."""


class Violation(NamedTuple):
    """One thing that must not be."""

    invariant: str
    run_id: str
    message: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.run_id}: {self.message}"


def check(records: Iterable[Record]) -> list[Violation]:
    """Every violation of the history."""
    history = History(records)
    return [violation for rule in RULES for violation in rule(history)]


def each_run(history: History) -> Iterator[tuple[str, Record, list[Record]]]:
    for run_id, run in history.runs.items():
        yield run_id, run, history.events.get(run_id, [])


def of_type(events: Sequence[Record], *types: str) -> list[Record]:
    return [event for event in events if event["type"] in types]


def journal_is_dense(history: History) -> Iterator[Violation]:
    for run_id, run, events in each_run(history):
        seqs = [event["seq"] for event in events]
        if seqs != list(range(1, run["last_seq"] + 1)):
            yield Violation("I2", run_id, f"stored are {seqs}, last_seq is {run['last_seq']}")
    for run_id in history.events.keys() - history.runs.keys():
        yield Violation("I2", run_id, "has events but no run")


def runs_finish_once(history: History) -> Iterator[Violation]:
    for run_id, run, events in each_run(history):
        ends = of_type(events, END)
        if len(ends) > 1 or (ends and events[-1]["type"] != END):
            yield Violation("I5", run_id, f"{END} at {[event['seq'] for event in ends]}")
        elif bool(ends) != (run["state"] in ENDED):
            yield Violation("I5", run_id, f"is {run['state']} with {len(ends)} {END}")
        elif ends and ends[0]["data"]["outcome"] != run["state"]:
            yield Violation("I5", run_id, f"is {run['state']}, {END} says {ends[0]['data']}")


def steps_commit_once(history: History) -> Iterator[Violation]:
    for run_id, _, events in each_run(history):
        finished: dict[str, Record] = {}
        for event in events:
            step = event["step"]
            if event["type"] in ("StepStarted", "StepFinished", "StepFailed") and step in finished:
                yield Violation("I4", run_id, f"{event['type']} of {step} after its result")
            if event["type"] == "StepFinished":
                finished[step] = event
        keys: dict[str, set[str]] = defaultdict(set)
        for effect in history.effects[run_id]:
            keys[effect["step"]].add(effect["key"])
            result = finished.get(effect["step"])
            if result and effect["attempt"] > result["attempt"]:
                yield Violation("I4", run_id, f"{effect['step']} had an effect after its result")
        for step, found in keys.items():
            if len(found) > 1:
                yield Violation("I4", run_id, f"{step} had the keys {sorted(found)}")
        if len(set.union(set(), *keys.values())) < len(keys):
            yield Violation("I4", run_id, "two steps share a key")


def transactional_rows_are_exact(history: History) -> Iterator[Violation]:
    for run_id, _, events in each_run(history):
        finished = Counter(e["step"] for e in of_type(events, "StepFinished"))
        for step, count in Counter(row["step"] for row in history.rows[run_id]).items():
            if count != finished[step]:
                yield Violation("I4", run_id, f"{step} stored {count} rows, see its result")


def results_are_of_the_last_attempt(history: History) -> Iterator[Violation]:
    """I11 by what is in the journal: a result names the call of the body that made it."""
    for run_id, _, events in each_run(history):
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


def leases_exclude(history: History) -> Iterator[Violation]:
    for run_id, log in history.log.items():
        tokens: set[int] = set()
        started: tuple[str, int] | None = None
        # In one transaction the claim comes first, in whichever order the triggers fired.
        first = {record["txid"]: n for n, record in reversed(list(enumerate(log)))}
        for record in sorted(log, key=lambda r: (first[r["txid"]], r["event"] is not None)):
            if (claim := record["claim"]) is not None:
                if not claim["token"] or claim["token"] in tokens:
                    yield Violation("I11", run_id, f"token {claim['token']} is no new one")
                if claim["was_running"] and claim["lease_until"] > claim["at"]:
                    yield Violation("I11", run_id, "a lease was taken from a worker that holds it")
                tokens.add(claim["token"])
                started = None
                continue
            event = record["event"]
            if event["type"] == "StepStarted":
                started = event["step"], event["attempt"]
            # The relay fails a run whose worker has ended too often, outside of any lease.
            elif (
                event["type"] in ("StepFinished", "StepFailed", "DebugTrace")
                and event["source"] == "worker"
                and started != (step := (event["step"], event["attempt"]))
            ):
                yield Violation("I11", run_id, f"{event['type']} {step} in a lease of {started}")


def attempts_are_explained(history: History) -> Iterator[Violation]:
    for run_id, run, events in each_run(history):
        if not events:
            continue
        faults = history.faults_during(events[0]["ts"] - AFTERMATH_S, events[-1]["ts"])
        started = Counter(e["step"] for e in of_type(events, "StepStarted"))
        failed = Counter(e["step"] for e in of_type(events, "StepFailed"))
        # An attempt that was given back does not count, for its body was not called or was ended.
        failed.update(
            e["step"]
            for e in of_type(events, "DebugTrace")
            if (e["data"] or {}).get("name") == "beatless.given_back"
        )
        snoozing = history.plans.get(run["plan"], {}).get("snoozing", ())
        for step, count in started.items():
            if count > 1 + failed[step] + faults and step not in snoozing:
                yield Violation("I10", run_id, f"{step} began {count} times, {faults} faults")
        effects = Counter((e["step"], e["attempt"]) for e in history.effects[run_id])
        for (step, attempt), count in effects.items():
            if count > 1:
                yield Violation("I10", run_id, f"attempt {attempt} of {step} ran {count} times")


def steps_follow_the_plan(history: History) -> Iterator[Violation]:
    for run_id, run, events in each_run(history):
        plan = history.plans.get(run["plan"])
        if plan is None or run["retry_of"]:  # which goes on where the other has failed
            continue
        begun = dict.fromkeys(e["step"] for e in of_type(events, "StepStarted"))
        began = [step for step in begun if step not in plan["cleanup"]]
        finished = [e["step"] for e in of_type(events, "StepFinished")]
        expected = plan["steps"]
        if began != expected[: len(began)]:
            yield Violation("order", run_id, f"steps began as {began}")
        if run["state"] == "completed" and finished != expected:
            yield Violation("order", run_id, f"completed after {finished}")


def streams_are_exact(history: History) -> Iterator[Violation]:
    for view in history.views:
        run_id, frames = view["run_id"], history.frames[view["viewer"]]
        stored = {event["seq"]: event["text"] for event in history.events.get(run_id, [])}
        expected = view["from_seq"]
        for frame in frames:
            expected += 1
            if frame["run_id"] != run_id:
                yield Violation("I6", run_id, f"a viewer was given {frame['run_id']}")
            elif frame["seq"] != expected:
                yield Violation("I6", run_id, f"a viewer got {frame['seq']}, not {expected}")
                break
            elif frame["text"] != stored.get(frame["seq"]):
                yield Violation("I6", run_id, f"{frame['seq']} is not as stored: {frame['text']}")
        else:
            whole = bool(frames) and frames[-1]["type"] == END
            if not view["ended"] or not whole or expected != max(stored, default=0):
                yield Violation("I1", run_id, f"a viewer was left at {expected}")


def wire_is_in_order(history: History) -> Iterator[Violation]:
    for (_, run_id), seqs in history.wire.items():
        first = list(dict.fromkeys(seqs))
        if first != sorted(first):
            yield Violation("I3", run_id, f"published first as {first}")


def accepted_runs_end(history: History) -> Iterator[Violation]:
    started = {call["run_id"] for call in history.calls if call["op"] == "start"}
    retried = {call["run_id"] for call in history.calls if call["op"] == "retry"}
    accepted = [call["run_id"] for call in history.called("start")]
    for run_id in accepted + [call["new"] for call in history.called("retry")]:
        if run_id not in history.runs:
            yield Violation("I7", run_id, "was accepted and is not stored")
    for run_id, run, _ in each_run(history):
        if run["state"] not in ENDED:
            yield Violation("I7", run_id, f"is {run['state']} after all faults are over")
        if run_id not in started and run["retry_of"] not in retried:
            yield Violation("I12", run_id, "nobody has started it")


def outbox_drains(history: History) -> Iterator[Violation]:
    if history.outbox:
        yield Violation("I8", "-", f"{history.outbox} rows are left in the outbox")


def cancels_are_obeyed(history: History) -> Iterator[Violation]:
    for call in history.called("cancel"):
        run_id = call["run_id"]
        if not of_type(history.events.get(run_id, []), "CancelRequested"):
            yield Violation("I9", run_id, "a cancel was accepted and is not stored")
    for run_id, run, events in each_run(history):
        cleanup = history.plans.get(run["plan"], {}).get("cleanup", [])
        for request in of_type(events, "CancelRequested"):
            after = [e for e in events if e["seq"] > request["seq"] and e["step"] not in cleanup]
            began = [event["step"] for event in of_type(after, "StepStarted")]
            ended = [event["step"] for event in of_type(after, "StepFinished", "StepFailed")]
            if began or len(ended) > 1:
                yield Violation("I9", run_id, f"after its cancel {began} began, {ended} ended")


def rollbacks_leave_nothing(history: History) -> Iterator[Violation]:
    for call in history.called("start", "rolled_back"):
        if call["run_id"] in history.runs or call["run_id"] in history.events:
            yield Violation("I12", call["run_id"], "its caller has rolled back")


def keys_name_one_run(history: History) -> Iterator[Violation]:
    named: dict[str, set[str]] = defaultdict(set)
    for call in history.called("start"):
        if call.get("key"):
            named[call["key"]].add(call["run_id"])
    for run_id, run in history.runs.items():
        if run["key"]:
            named[run["key"]].add(run_id)
    for key, runs in named.items():
        if len(runs) > 1:
            yield Violation("key", min(runs), f"{key} names {sorted(runs)}")


def times_are_kept(history: History) -> Iterator[Violation]:
    delays = {c["run_id"]: c["delay_s"] for c in history.called("start") if c.get("delay_s")}
    for run_id, run, events in each_run(history):
        begins = of_type(events, "StepStarted")
        if begins and begins[0]["ts"] < run["created_at"] + delays.get(run_id, 0) - 0.01:
            yield Violation("delay", run_id, "began before its time")
        deadline = run["deadline_at"]
        if deadline and events and events[-1]["ts"] > deadline + DEADLINE_BOUND_S:
            yield Violation("deadline", run_id, "ended long after its deadline")
        if deadline and any(event["ts"] > deadline + 1 for event in begins):
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
    journal_is_dense,
    runs_finish_once,
    steps_commit_once,
    transactional_rows_are_exact,
    results_are_of_the_last_attempt,
    leases_exclude,
    attempts_are_explained,
    steps_follow_the_plan,
    streams_are_exact,
    wire_is_in_order,
    accepted_runs_end,
    outbox_drains,
    cancels_are_obeyed,
    rollbacks_leave_nothing,
    keys_name_one_run,
    times_are_kept,
    pauses_are_kept,
)
