"""Rules of the checker about waits and signals: none is lost, taken twice, or older than another.

A wait ends by the oldest signal of its names that no wait has taken; by its time only if none is
in the journal, nor was committed before its worker looked. The rules know no plan but its routes,
and no speed of the machine.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from tests.faults.history import History, Record, Violation, of_type

TIMED_OUT = ("timed_out", "slept")

EARLY_S = 0.002
"""Stored times are of milliseconds."""


def base(occurrence: str) -> str:
    """The name of a step or wait, without the number of its occurrence."""
    return occurrence.partition("#")[0]


def waits_take_the_oldest(history: History) -> Iterator[Violation]:
    """Each wait ends once, by the oldest signal of its names or, if there is none, by its time."""
    for run_id, _, events in history.each_run():
        signals: dict[int, str] = {}
        begun: dict[str, Record] = {}
        begun_at: dict[str, float] = {}
        for event in events:
            data, wait = event["data"] or {}, event["step"]
            if event["type"] == "SignalReceived":
                signals[event["seq"]] = data["name"]
            elif event["type"] == "RunRestarted":
                begun = {}
            elif event["type"] == "WaitStarted":
                if wait in begun:
                    yield Violation("wait", run_id, f"{wait} began twice")
                begun[wait], begun_at[wait] = event, event["ts"]
            elif event["type"] == "WaitFinished":
                start = (begun.get(wait) or {}).get("data")
                if start is None:
                    yield Violation("wait", run_id, f"{wait} ended and had not begun")
                    continue
                begun[wait] = event | {"data": None}  # it may begin and end no more
                mine = [seq for seq, name in signals.items() if name in start.get("names", ())]
                if data["outcome"] in TIMED_OUT:
                    if mine:
                        yield Violation("wait", run_id, f"{wait} ended without signal {mine[0]}")
                    if event["ts"] < begun_at[wait] + start.get("seconds", 1e18) - EARLY_S:
                        yield Violation("wait", run_id, f"{wait} ended before its time")
                elif [data["seq"]] != mine[:1]:
                    yield Violation("wait", run_id, f"{wait} took {data['seq']} of {mine}")
                signals.pop(data.get("seq"), None)


def signals_are_received_once(history: History) -> Iterator[Violation]:
    """Each as it was sent, if its transaction has committed, and those that were sent alone."""
    sent: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for call in history.calls:
        if call["op"] == "signal":
            sent[call["run_id"], call["key"]].append(call)
    for run_id, _, events in history.each_run():
        received = of_type(events, "SignalReceived")
        for key, count in Counter(event["data"]["key"] for event in received).items():
            if count > 1:
                yield Violation("wait", run_id, f"signal {key} was received {count} times")
        for event in received:
            data = event["data"]
            calls = sent[run_id, data["key"]]
            if not any(call["outcome"] in ("ok", "unknown") for call in calls):
                yield Violation("I12", run_id, f"nobody has sent signal {data['key']}")
            elif not any(call["name"] == data["name"] for call in calls):
                yield Violation("wait", run_id, f"signal {data['key']} is not as it was sent")


def time_outs_look_first(history: History) -> Iterator[Violation]:
    """What was committed before the inbox was read wins over a time-out that is written then.

    The inbox is read by a statement that begins after the run's row was locked.
    """
    sent: dict[str, list[Record]] = defaultdict(list)
    for call in history.called("signal"):
        sent[call["run_id"]].append(call)
    for run_id, _, events in history.each_run():
        by_seq = {event["seq"]: event for event in events}
        keys = {e["data"]["key"]: e["seq"] for e in of_type(events, "SignalReceived")}
        claimed = 0.0
        for record in history.log[run_id]:
            if record["claim"]:
                claimed = record["claim"]["statement_at"]
            end = by_seq.get((record["event"] or {}).get("seq", 0))
            if end is None or end["type"] != "WaitFinished":
                continue
            if end["data"]["outcome"] not in TIMED_OUT:
                continue
            look = history.looks.get(record["txid"])
            if look and not look["locked"]:
                yield Violation("wait", run_id, "its inbox was read before its row was locked")
            looked = look["statement_at"] if look else claimed
            names = names_of(end["step"], events)
            for call in sent[run_id]:
                late = keys.get(call["key"], 1e18) > end["seq"]
                if call["name"] in names and call["end"] < looked and late:
                    yield Violation("wait", run_id, f"{end['step']} overlooked {call['key']}")


def names_of(wait: str, events: list[Record]) -> list[str]:
    """The signals that end this occurrence of a wait."""
    starts = [event for event in of_type(events, "WaitStarted") if event["step"] == wait]
    return starts[0]["data"].get("names", []) if starts else []


def plans_that_wait_take_their_routes(history: History) -> Iterator[Violation]:
    """Each step and wait that begins follows from the end of the one before."""
    for run_id, run, events in history.each_run():
        plan = history.plan(run)
        if "routes" not in plan or run["retry_of"]:
            continue
        at, begun = "", set[str]()
        for event in events:
            step = event["step"]
            if event["type"] == "WaitFinished":
                at = f"{base(step)}/{event['data']['outcome']}"
            if event["type"] not in ("StepStarted", "WaitStarted") or step in begun:
                continue
            begun.add(step)
            if base(step) in plan["cleanup"]:
                break
            if base(step) not in plan["routes"].get(at, ()):
                yield Violation("order", run_id, f"{step} began after {at or 'the start'}")
                break
            at = base(step)
        else:
            if run["state"] == "completed" and "END" not in plan["routes"].get(at, ()):
                yield Violation("order", run_id, f"completed after {at or 'the start'}")


def functions_see_what_is_stored(history: History) -> Iterator[Violation]:
    """A function's result lists the outcomes that it was given: those of the journal, in order."""
    for run_id, run, events in history.each_run():
        stored: list[object] = []
        if run["retry_of"]:  # which was given those of the other run, too
            continue
        for event in events:
            data = event["data"] or {}
            if event["type"] == "RunRestarted":
                stored = []
            elif event["type"] == "StepFinished":
                stored.append((data.get("result") or {}).get("call"))
            elif event["type"] == "WaitFinished":
                stored.append(data.get("seq"))
            elif event["type"] == "RunFinished" and data.get("outcome") == "completed":
                result = data.get("result")
                if isinstance(result, dict) and "seen" in result and result["seen"] != stored:
                    yield Violation("I4", run_id, f"saw {result['seen']}, stored are {stored}")


def nothing_waits_after_a_cancel(history: History) -> Iterator[Violation]:
    for run_id, _, events in history.each_run():
        cancels = of_type(events, "CancelRequested")
        after = [e for e in events if cancels and e["seq"] > cancels[0]["seq"]]
        if began := of_type(after, "WaitStarted"):
            yield Violation("I9", run_id, f"{began[0]['step']} began after its cancel")


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    waits_take_the_oldest,
    signals_are_received_once,
    time_outs_look_first,
    plans_that_wait_take_their_routes,
    functions_see_what_is_stored,
    nothing_waits_after_a_cancel,
)
