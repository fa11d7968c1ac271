"""Checks a recorded history: what callers did, what bodies did, what viewers saw, what is stored.

It imports nothing of the project, so that a mistake of the product is not repeated here. The
records are described in `history.py`, the invariants in docs/guarantees.md.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tests.faults import duplicates, families, leases, limits, punctuality, ticks, undos, waits
from tests.faults.history import ENDED, History, Record, Violation, due_after, of_type

END = "RunFinished"

CLOCK_S = 0.002
"""Stored times are of milliseconds."""


def check(records: Iterable[Record]) -> list[Violation]:
    """Every violation of the history."""
    history = History(records)
    return [violation for rule in RULES for violation in rule(history)]


def journal_is_dense(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        seqs = [event["seq"] for event in events]
        if seqs != list(range(1, run["last_seq"] + 1)):
            yield Violation("I2", run_id, f"stored are {seqs}, last_seq is {run['last_seq']}")
    for run_id in history.events.keys() - history.runs.keys():
        yield Violation("I2", run_id, "has events but no run")


def runs_finish_once(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        ends = of_type(events, END)
        if len(ends) > 1 or (ends and events[-1]["type"] != END):
            yield Violation("I5", run_id, f"{END} at {[event['seq'] for event in ends]}")
        elif bool(ends) != (run["state"] in ENDED):
            yield Violation("I5", run_id, f"is {run['state']} with {len(ends)} {END}")
        elif ends and ends[0]["data"]["outcome"] != run["state"]:
            yield Violation("I5", run_id, f"is {run['state']}, {END} says {ends[0]['data']}")


def steps_commit_once(history: History) -> Iterator[Violation]:
    for run_id, _, events in history.each_run():
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
    for run_id, _, events in history.each_run():
        finished = Counter(e["step"] for e in of_type(events, "StepFinished"))
        for step, count in Counter(row["step"] for row in history.rows[run_id]).items():
            if count != finished[step]:
                yield Violation("I4", run_id, f"{step} stored {count} rows, see its result")


@dataclass
class Tries:
    """The attempts of a step so far."""

    expected: int = 1
    failures: int = 0
    due: float = 0.0


def attempts_are_counted(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        retries = history.plan(run).get("retries", {})
        tries: dict[str, Tries] = defaultdict(Tries)  # of steps that may be in flight at once
        # By a deadline a retry comes sooner; the end of a run that is undone then takes it away.
        undone = of_type(events, "UndoStarted")
        capped = max((e["seq"] for e in undone if "deadline_at" in (e["data"] or {})), default=0)
        for event in events:
            step, number, data = event["step"], event["attempt"], event["data"] or {}
            if event["type"] == "StepStarted":
                if number != tries[step].expected:
                    text = f"{step} began as {number}, not {tries[step].expected}"
                    yield Violation("I10", run_id, text)
                if event["ts"] < tries[step].due:
                    yield Violation("delay", run_id, f"attempt {number} of {step} came too early")
                tries[step].expected = number + 1
            elif event["type"] == "DebugTrace" and data.get("name") in leases.UNCOUNTED:
                tries[step].expected = number
            elif event["type"] == "StepFailed" and step in tries:
                tried = tries[step]
                tried.failures += 1
                policy = retries.get(waits.base(step), {})
                again = None if data.get("final") else due_after(event)
                most = policy.get("attempts", 1)
                mine = (data.get("error") or {}).get("type") == policy.get("error")
                if again and tried.failures >= most:
                    yield Violation("I10", run_id, f"{step} is tried again after {tried.failures}")
                elif mine and not again and tried.failures < most and run["state"] == "failed":
                    yield Violation("I10", run_id, f"{step} is given up after {tried.failures}")
                elif again and mine and not run["deadline_at"] and event["seq"] >= capped:
                    tried.due = again - 0.01
                    # The event is later: a statement may be held up between two looks.
                    wrote = history.written.get((run_id, event["seq"]), 0.0)
                    if again < wrote + policy["delays_s"][tried.failures - 1] - CLOCK_S:
                        text = f"{step} is due too early after {tried.failures}"
                        yield Violation("delay", run_id, text)


def retries_take_results_over(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        before = history.events.get(run["retry_of"], [])
        # A function that has begun again is retried from there, with its last input.
        begun = max((e["seq"] for e in of_type(before, "RunRestarted")), default=0)
        before = [event for event in before if event["seq"] > begun]
        finished = {event["step"] for event in of_type(before, "StepFinished")}
        again = finished & {event["step"] for event in of_type(events, "StepStarted")}
        # What was undone is to be done again.
        undone = of_type(before, "CancelRequested") or of_type(before, "UndoStarted")
        if again and not undone:
            yield Violation("I4", run_id, f"repeats {sorted(again)} of the run that it retries")


def steps_follow_the_plan(history: History) -> Iterator[Violation]:
    for run_id, run, events in history.each_run():
        plan = history.plans.get(run["plan"])
        if (
            plan is None or "steps" not in plan or run["retry_of"]
        ):  # which goes on where the other has failed
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
    views = {view["viewer"]: view for view in history.views}
    for watch in history.watches:
        run_id, frames = watch["run_id"], history.frames[watch["viewer"]]
        stored = {event["seq"]: event["text"] for event in history.events.get(run_id, [])}
        expected, view, epoch = watch["from_seq"], views.get(watch["viewer"]), None
        for frame in frames:
            expected, known = expected + 1, epoch
            epoch = frame.get("epoch") or epoch
            if frame["type"] == "reset":
                expected, epoch = 0, frame.get("epoch")
                continue
            if known not in (None, epoch):
                yield Violation("I6", run_id, f"a viewer went on from {known} in {epoch}")
            if frame["run_id"] != run_id:
                yield Violation("I6", run_id, f"a viewer was given {frame['run_id']}")
            elif frame["seq"] != expected:
                yield Violation("I6", run_id, f"a viewer got {frame['seq']}, not {expected}")
                break
            elif frame["text"] != stored.get(frame["seq"]):
                yield Violation("I6", run_id, f"{frame['seq']} is not as stored: {frame['text']}")
        else:
            whole = bool(frames) and frames[-1]["type"] == END
            if view is None:
                continue  # still watching
            if not view["ended"] or not whole or expected != max(stored, default=0):
                yield Violation("I1", run_id, f"a viewer was left at {expected}")


def wire_is_in_order(history: History) -> Iterator[Violation]:
    for (connection, run_id), seqs in history.wire.items():
        events = history.events.get(run_id, [])
        if events and events[0]["ts"] > history.listening.get(connection, 1e18):
            first = list(dict.fromkeys(seqs))
            if first != list(range(1, len(first) + 1)):
                yield Violation("I3", run_id, f"published first as {first}")


def accepted_runs_end(history: History) -> Iterator[Violation]:
    starts = [call for call in history.calls if call["op"] == "start"]
    started = {call["run_id"] for call in starts} | {call.get("key") for call in starts} - {None}
    retried = {call["run_id"] for call in history.calls if call["op"] == "retry"}
    for call in history.called("start", "ok") + history.called("retry", "ok"):
        run_id = call.get("new", call["run_id"])
        if run_id not in history.runs:
            yield Violation("I7", run_id, "was accepted and is not stored")
    for run_id, run, _ in history.each_run():
        if history.over and run["state"] not in ENDED:
            yield Violation("I7", run_id, f"is {run['state']} after all faults are over")
        own = {run_id, run["key"]} & started or run["retry_of"] in retried
        own = own or run.get("parent_id") in history.runs or run.get("schedule")
        if not own:
            yield Violation("I12", run_id, "nobody has started it")


def outbox_drains(history: History) -> Iterator[Violation]:
    if history.outbox:
        yield Violation("I8", "-", f"{history.outbox} rows are left in the outbox")


def in_flight(events: list[Record]) -> set[str]:
    """The steps that have begun in these, and not ended: several if they are beside one another."""
    found: set[str] = set()
    for event in events:
        if event["type"] == "StepStarted":
            found.add(event["step"])
        elif event["type"] in ("StepFinished", "StepFailed"):
            found.discard(event["step"])
    return found


def cancels_are_obeyed(history: History) -> Iterator[Violation]:
    for call in history.called("cancel"):
        run_id = call["run_id"]
        if not of_type(history.events.get(run_id, []), "CancelRequested"):
            yield Violation("I9", run_id, "a cancel was accepted and is not stored")
    for run_id, run, events in history.each_run():
        cleanup = history.plan(run).get("cleanup", [])
        begun = {event["step"] for event in of_type(events, "StepStarted")}
        for request in of_type(events, "CancelRequested"):
            undo = (request["data"] or {}).get("on_cancel")
            if undo and run["state"] == "cancelled" and undo not in begun:
                yield Violation("I9", run_id, f"was cancelled without {undo}")
            after = [e for e in events if e["seq"] > request["seq"] and e["step"] not in cleanup]
            flying = in_flight(events[: events.index(request)]) - set(cleanup)
            began = [event["step"] for event in of_type(after, "StepStarted")]
            ended = [event["step"] for event in of_type(after, "StepFinished", "StepFailed")]
            if began or len(ended) > max(1, len(flying)):
                yield Violation("I9", run_id, f"after its cancel {began} began, {ended} ended")


def rollbacks_leave_nothing(history: History) -> Iterator[Violation]:
    for call in history.called("start", "rolled_back"):
        if call["run_id"] in history.runs or call["run_id"] in history.events:
            yield Violation("I12", call["run_id"], "its caller has rolled back")
    for call in history.called("cancel", "rolled_back"):
        others = [c for c in history.calls if c["op"] == "cancel" and c is not call]
        asked = any(c["outcome"] != "rolled_back" and c["run_id"] == call["run_id"] for c in others)
        cancels = of_type(history.events.get(call["run_id"], []), "CancelRequested")
        if not asked and not all(duplicates.replaces(cancel) for cancel in cancels):
            yield Violation("I12", call["run_id"], "a cancel was rolled back, and is stored")


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


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    journal_is_dense,
    runs_finish_once,
    steps_commit_once,
    transactional_rows_are_exact,
    attempts_are_counted,
    retries_take_results_over,
    steps_follow_the_plan,
    streams_are_exact,
    wire_is_in_order,
    accepted_runs_end,
    outbox_drains,
    cancels_are_obeyed,
    rollbacks_leave_nothing,
    keys_name_one_run,
    *leases.RULES,
    *punctuality.RULES,
    *waits.RULES,
    *families.RULES,
    *undos.RULES,
    *duplicates.RULES,
    *ticks.RULES,
    *limits.RULES,
)
