"""A recorded history: what callers did, what bodies did, what viewers saw, what is stored.

A history is a list of records (JSON objects) in any order; times are seconds by the clock of one
host. `kind` says what a record is:

| kind | members |
|---|---|
| `plan` | `plan`, `steps` in order or `routes` (the names that may follow each name, a wait as |
| | `name/outcome`, the start as "", the end as `END`), `cleanup` (may run after a cancel), |
| | `retries`: of a step that fails, `error`, `attempts` and `delays_s` between them; |
| | `at_once`: how many runs may have a lease at once, of a plan with a limit; `kept`: it is how |
| | many may have begun and not ended; `step_at_once`: how many attempts of a step, by its name |
| `call` | `op`, `begin`, `end`, `outcome` (`ok`, `failed`, `unknown`, `rolled_back`), and |
| | of `start`: `run_id` (null: not known), `plan`, `key`, `delay_s`; with a dedupe key the |
| | `number` of its input and `start`, its outcome as it was told; of `cancel`: `run_id`; |
| | of `retry`: `run_id`, `new` (the new run); of `pause`, `resume`: `queue`; |
| | of `signal`: `run_id`, `name`, `key` |
| `effect` | `run_id`, `step`, `attempt`, `key`, `call` (unique): a body has had its effect |
| `row` | `run_id`, `step`: a transactional step has written this row |
| `log` | `id`, `txid`, `run_id`, and one of `event` (`type`, `seq`, `source`, `step`, `attempt`, |
| | `statement_at`), |
| | `claim` (`token`, `worker`, `was_running`, `lease_until`, `at`, `statement_at`, `queue`, |
| | `slots`: of limits, that the run has then) and |
| | `lease` (`worker`, `until`, `at`, `statement_at`, `seconds`: renewed, or ended at once): |
| | written by triggers, under the lock of the run's row; of `source` `takeover` is what a |
| | worker writes instead of a start, for a step that has ended its process too often |
| `look` | `txid`, `statement_at`: an inbox was read; `locked`: the transaction had locked a row |
| `watch` | `viewer`, `run_id`, `from_seq`, `at`: a viewer has begun |
| `frame` | `viewer`, `run_id`, `seq`, `type`, `text`, `at`: in the order in which it was seen; |
| | `epoch` of the history that it is of, if told; of `type` `reset`: all comes again |
| `view` | `viewer`, `run_id`, `from_seq`, `ended` |
| `listen` | `connection`, `at`: from then on it hears all that Redis publishes |
| `wire` | `connection`, `run_id`, `seq`, `at`: in the order in which Redis published them |
| `fault` | `name`, `begin`, `end` |
| `stop` | `pids`, `at`, `grace_s`: a worker and its children were asked to stop |
| `quiet` | `begin`, `end`: no fault, no call, all processes there; `drained`: when all that was |
| | due had ended, or null; `rows`: of the outbox, at the end of one that did not drain; |
| | `slack_s`: so much more than on an idle machine may take |
| `calm` | `begin`, `end`: the same, drained, with few calls; `bound_s`: what nothing takes then |
| `run` | `run_id`, `plan`, `state`, `last_seq`, `key`, `created_at`, `deadline_at`, |
| | `retry_of`, `attended`: there are workers for its queue; of a child `parent_id`, `child_no`, |
| | `detached`; of a tick `schedule`, `tick`; with a `dedupe_key` the `number` of its input |
| `event` | `run_id`, `seq`, `ts`, `type`, `step`, `attempt`, `data`, `text`: as stored |
| `slot` | `limit_id`, `run_id`: a slot of a limit that is held, of the moment of `run` |
| `scheduled` | `name`, `every_s`, `first` (its first tick): a schedule was stored |
| `schedule` | `name`, `state`, `reason`, `last_tick`, `until` (from then on it was paused) |
| `outbox` | `rows`: what was left when all was over; without it the history is a part of one |
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]

Wait = tuple[str, str, float, float]
"""What was waited for, in which run, since when, and until when (infinite: not yet)."""

NEVER = float("inf")

ENDED = ("completed", "failed", "cancelled")


class Violation(NamedTuple):
    """One thing that must not be."""

    invariant: str
    run_id: str
    message: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.run_id}: {self.message}"


class History:
    """The records by kind and by run."""

    def __init__(self, records: Iterable[Record]) -> None:
        by_kind: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            by_kind[record["kind"]].append(record)
        self.plans = {plan["plan"]: plan for plan in by_kind["plan"]}
        self.calls = by_kind["call"]
        self.faults = by_kind["fault"]
        self.stops = by_kind["stop"]
        self.views = by_kind["view"]
        self.watches = by_kind["watch"]
        self.quiets = by_kind["quiet"]
        self.calms = by_kind["calm"]
        self.runs = {run["run_id"]: run for run in by_kind["run"]}
        made = {each["name"]: each for each in by_kind["scheduled"]}
        self.schedules = {each["name"]: made[each["name"]] | each for each in by_kind["schedule"]}
        self.over = bool(by_kind["outbox"])
        self.outbox = sum(record["rows"] for record in by_kind["outbox"])
        self.events = self._by_run(by_kind["event"], "seq")
        self.effects = self._by_run(by_kind["effect"])
        self.rows = self._by_run(by_kind["row"])
        self.slots = by_kind["slot"]
        self.log = self._by_run(by_kind["log"], "id")
        self.written = {
            (record["run_id"], event.get("seq")): event.get("statement_at", NEVER)
            for record in by_kind["log"]
            if (event := record["event"])
        }
        """When the statement began that has written an event."""
        self.looks = {record["txid"]: record for record in by_kind["look"]}
        self.frames: dict[str, list[Record]] = defaultdict(list)
        for frame in by_kind["frame"]:
            self.frames[frame["viewer"]].append(frame)
        self.listening = {record["connection"]: record["at"] for record in by_kind["listen"]}
        self.wire: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.heard: dict[tuple[str, int], float] = {}
        """When an event was first heard."""
        for message in by_kind["wire"]:
            self.wire[message["connection"], message["run_id"]].append(message["seq"])
            self.heard.setdefault((message["run_id"], message["seq"]), message["at"])

    @staticmethod
    def _by_run(records: list[Record], order: str = "") -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = defaultdict(list)
        for record in sorted(records, key=lambda record: record[order]) if order else records:
            found[record["run_id"]].append(record)
        return found

    def each_run(self) -> Iterator[tuple[str, Record, list[Record]]]:
        """Each run with its row and its events."""
        for run_id, run in self.runs.items():
            yield run_id, run, self.events.get(run_id, [])

    def plan(self, run: Record) -> Record:
        """The plan of a run; an empty one if it is not known."""
        return self.plans.get(run["plan"], {})

    def called(self, op: str, *outcomes: str) -> list[Record]:
        return [c for c in self.calls if c["op"] == op and c["outcome"] in (outcomes or ("ok",))]

    def faults_during(self, begin: float, end: float) -> int:
        return sum(fault["begin"] <= end and fault["end"] >= begin for fault in self.faults)

    def waits(self) -> Iterator[Wait]:
        """All that somebody or something waited for."""
        for run_id, run, events in self.each_run():
            called = max((c["end"] for c in self._calls_of(run_id)), default=0.0)
            for n, event in enumerate(events):
                after = events[n + 1]["ts"] if n + 1 < len(events) else NEVER
                due = due_after(event)
                if due is not None and event["type"] in ("RunStarted", "InputReplaced"):
                    due = max(due, self.end_before(run))
                of_a_limit = "at_once" in self.plan(run) or self.plan(run).get("step_at_once")
                if run["attended"] and not of_a_limit and due is not None and due < after:
                    yield "to go on", run_id, max(due, called if n == 0 else 0), after
                heard = self.heard.get((run_id, event["seq"]), NEVER)
                # Of what is not heard, only what the last listener would have heard is missing.
                if heard < NEVER or event["ts"] > max(self.listening.values(), default=NEVER):
                    yield f"publishing {event['seq']}", run_id, max(event["ts"], called), heard
            yield from self._signals_to_take(run_id, run, events)
            yield from self._ends_of_children(run_id, events)
            end = events[-1]["ts"] if events and events[-1]["type"] == "RunFinished" else NEVER
            if run["deadline_at"]:
                yield "to end at its deadline", run_id, run["deadline_at"], end
        for watch in self.watches:
            run_id, frames = watch["run_id"], self.frames[watch["viewer"]]
            seen = {frame["seq"]: frame["at"] for frame in reversed(frames)}
            for event in self.events.get(run_id, ()):
                if event["seq"] > watch["from_seq"]:
                    since = max(event["ts"], watch["at"])
                    yield f"showing {event['seq']}", run_id, since, seen.get(event["seq"], NEVER)

    def _ends_of_children(self, run_id: str, events: Sequence[Record]) -> Iterator[Wait]:
        """The ends of the children of a map until their parent is told; cancels until they are."""
        for started in of_type(events, "ChildrenStarted"):
            told = [
                event["ts"]
                for event in events
                if event["seq"] > started["seq"]
                and (event["type"] in ENDS_OF_WAITS or event["step"] == started["step"])
            ]
            if "run_id" not in started["data"]:
                since = self.children_end(run_id, started)
                yield "waking a parent", run_id, since, min(told, default=NEVER)

    def _signals_to_take(
        self, run_id: str, run: Record, events: Sequence[Record]
    ) -> Iterator[Wait]:
        """Signals that were sent while the run waited, until they were received."""
        received = {e["data"]["key"]: e["ts"] for e in of_type(events, "SignalReceived")}
        for call in self.signals(run_id) if run["attended"] else ():
            ends = [e["ts"] for e in of_type(events, *ENDS_OF_WAITS) if e["ts"] > call["begin"]]
            until = received.get(call["key"], NEVER)
            waits = open_wait([event for event in events if event["ts"] < call["begin"]])
            if waits and (not ends or until <= ends[0]):  # else something else has ended it
                yield "receiving a signal", run_id, call["end"], until
        for n, event in enumerate(events):
            wait = open_wait(events[:n]) if event["type"] == "SignalReceived" else None
            if wait and event["data"]["name"] in (wait["data"] or {}).get("names", ()):
                ends = of_type(events[n:], *ENDS_OF_WAITS)
                yield "taking a signal", run_id, event["ts"], ends[0]["ts"] if ends else NEVER

    def signals(self, run_id: str) -> list[Record]:
        """Those that were sent to a run, and have committed."""
        if not hasattr(self, "_signals"):
            self._signals = self._by_run(self.called("signal"))
        return self._signals[run_id]

    def children(self, run_id: str) -> list[Record]:
        """The rows of the children of a run."""
        if not hasattr(self, "_children"):
            records = [run for run in self.runs.values() if run.get("parent_id")]
            self._children = defaultdict[str, list[Record]](list)
            for record in records:
                self._children[record["parent_id"]].append(record)
        return self._children[run_id]

    def end(self, run_id: str) -> float:
        """When a run has ended; infinite: it has not."""
        events = self.events.get(run_id, [])
        return events[-1]["ts"] if events and events[-1]["type"] == "RunFinished" else NEVER

    def end_heard(self, run_id: str) -> float:
        """When somebody first heard that a run has ended; infinite: nobody has."""
        events = self.events.get(run_id, [])
        ended = events and events[-1]["type"] == "RunFinished"
        return self.heard.get((run_id, events[-1]["seq"]), NEVER) if ended else NEVER

    def end_before(self, run: Record) -> float:
        """When the runs with its dedupe key had ended that were there before; 0: it has none."""
        if not run.get("dedupe_key"):
            return 0.0
        if not hasattr(self, "_with_key"):
            self._with_key = defaultdict[str, list[Record]](list)
            for each in self.runs.values():
                self._with_key[each.get("dedupe_key") or ""].append(each)
        before = [
            self.end(each["run_id"])
            for each in self._with_key[run["dedupe_key"]]
            if each["created_at"] < run["created_at"]
        ]
        return max(before, default=0.0)

    def children_end(self, run_id: str, started: Record) -> float:
        """When all children of a ChildrenStarted had ended."""
        first, count = started["data"]["first"], started["data"]["count"]
        numbers = range(first, first + count)
        ends = [self.end(c["run_id"]) for c in self.children(run_id) if c["child_no"] in numbers]
        return max(ends, default=started["ts"]) if len(ends) == count else NEVER

    def due(self, run_id: str, events: Sequence[Record]) -> float:
        """When an unfinished run goes on after its last event, in seconds."""
        begun = of_type(events, "ChildrenStarted")
        last = of_type(events, *PLACES)[-1:]
        if begun and last[0]["type"] in ("ChildrenStarted", "StepFinished"):
            # It may wait for any of those that it has started.
            return max(self.children_end(run_id, each) for each in begun)
        wait = open_wait(events)
        if wait is None and events[-1]["type"] in ("RunStarted", "InputReplaced"):
            return max(due_after(events[-1]) or 0.0, self.end_before(self.runs[run_id]))
        if wait is None:
            return due_after(events[-1]) or float(events[-1]["ts"])
        received = {event["data"]["key"] for event in of_type(events, "SignalReceived")}
        left = [call["end"] for call in self.signals(run_id) if call["key"] not in received]
        return min([due_after(wait) or NEVER, *left])

    def _calls_of(self, run_id: str) -> list[Record]:
        if not hasattr(self, "_calls"):
            self._calls = self._by_run([c for c in self.calls if c.get("run_id")])
        return [c for c in self._calls[run_id] if c["op"] in ("start", "cancel")]


def of_type(events: Sequence[Record], *types: str) -> list[Record]:
    return [event for event in events if event["type"] in types]


PLACES = ("ChildrenStarted", "ChildrenFinished", "StepStarted", "StepFinished", "StepFailed")
PLACES += ("WaitStarted", "WaitFinished", "CancelRequested", "RunRestarted")
"""The events by which a run that has children is where it is."""

ENDS_OF_WAITS = ("WaitFinished", "CancelRequested", "RunFinished")


def open_wait(events: Sequence[Record]) -> Record | None:
    """The wait at which the run is after these events."""
    last = of_type(events, "WaitStarted", *ENDS_OF_WAITS)[-1:]
    return last[0] if last and last[0]["type"] == "WaitStarted" else None


def due_after(event: Record) -> float | None:
    """When the run goes on after this event, if it waits after it."""
    data = event["data"] or {}
    match event["type"]:
        case "RunStarted" | "InputReplaced":
            return max(event["ts"], (data.get("not_before") or 0) / 1000)
        case "StepFailed" if data.get("retry_at"):
            return float(data["retry_at"] / 1000)
        case "WaitStarted" if data.get("until"):
            return float(data["until"] / 1000)
        case "DebugTrace" if data.get("name") == "beatless.snoozed":
            return float(event["ts"] + data["seconds"])
    return None
