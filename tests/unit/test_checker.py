"""The checker of recorded histories: an honest history passes, and each lie is found."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.checker import check

Lie = Callable[[list[dict[str, Any]]], None]


def event(run_id: str, seq: int, type: str, step: str | None = None, **more: Any) -> dict[str, Any]:
    source = "api" if type in ("RunStarted", "CancelRequested") else "worker"
    found = {"kind": "event", "run_id": run_id, "seq": seq, "ts": 100.0 + seq, "type": type}
    found |= {"step": step, "attempt": 1 if step else None, "data": None, "source": source}
    return found | {"text": f"{run_id} {seq} {type}"} | more


def run(run_id: str, plan: str, state: str, last_seq: int, **more: Any) -> dict[str, Any]:
    found = {"kind": "run", "run_id": run_id, "plan": plan, "state": state, "last_seq": last_seq}
    found |= {"key": None, "created_at": 101.0, "deadline_at": None, "retry_of": None}
    return found | {"attended": True} | more


def call(op: str, begin: float, end: float, outcome: str = "ok", **more: Any) -> dict[str, Any]:
    return {"kind": "call", "op": op, "begin": begin, "end": end, "outcome": outcome} | more


def effect(run_id: str, step: str, call: str, attempt: int = 1) -> dict[str, Any]:
    found = {"kind": "effect", "run_id": run_id, "step": step, "attempt": attempt, "call": call}
    return found | {"key": f"{run_id}:{step}"}


def logged(id: int, txid: int, run_id: str, **what: Any) -> dict[str, Any]:
    return {"kind": "log", "id": id, "txid": txid, "run_id": run_id, "event": None} | what


def claim(token: int, at: float, **more: Any) -> dict[str, Any]:
    found = {"token": token, "worker": "w", "was_running": False, "lease_until": None, "at": at}
    return {"claim": found | {"statement_at": at, "queue": "calm", "slots": 1} | more}


def kept(worker: str, until: float, at: float) -> dict[str, Any]:
    """A lease that was renewed, or ended."""
    found = {"worker": worker, "until": until, "at": at, "statement_at": at - 0.01, "seconds": 3.0}
    return {"claim": None, "lease": found}


def wrote(type: str, step: str, attempt: int = 1) -> dict[str, Any]:
    found = {"type": type, "source": "worker", "step": step, "attempt": attempt}
    return {"claim": None, "event": found}


def frame(viewer: str, run_id: str, seq: int, type: str) -> dict[str, Any]:
    found = {"kind": "frame", "viewer": viewer, "run_id": run_id, "seq": seq, "type": type}
    return found | {"text": f"{run_id} {seq} {type}", "at": 100.1 + seq}


def wire(seq: int, connection: str = "1") -> dict[str, Any]:
    found = {"kind": "wire", "connection": connection, "run_id": "r", "seq": seq}
    return found | {"at": 100.1 + seq}


FLAKY = {"error": "ValueError", "attempts": 2, "delays_s": [0.5]}


def honest() -> list[dict[str, Any]]:
    """A run whose worker was killed, one that was cancelled, and one that was retried."""
    types = ["RunStarted", "StepStarted", "StepStarted", "StepFinished", "StepStarted"]
    types += ["StepFinished", "RunFinished"]
    result_a, result_b = {"result": {"call": "a2"}}, {"result": {"call": "b1"}}
    return [
        {
            "kind": "plan",
            "plan": "p",
            "steps": ["a", "b"],
            "cleanup": ["undo"],
            "retries": {"b": FLAKY},
        },
        call("start", 99, 101, run_id="r", plan="p", key="k", delay_s=1),
        call("start", 99, 101, run_id="c", plan="p"),
        call("start", 99, 101, "rolled_back", run_id="gone", plan="p"),
        call("start", 99, 101, run_id="f", plan="p"),
        call("retry", 110, 111, run_id="f", new="n"),
        call("cancel", 102, 103, run_id="c"),
        call("cancel", 102, 103, "rolled_back", run_id="r"),
        call("pause", 110, 111, queue="calm"),
        call("resume", 120, 121, queue="calm"),
        {"kind": "fault", "name": "kill", "begin": 102.5, "end": 102.6},
        {"kind": "stop", "pids": [6], "at": 99.0, "grace_s": 5.0},
        {"kind": "quiet", "begin": 103.5, "end": 140.0, "drained": 104.0, "rows": None},
        {"kind": "calm", "begin": 104.0, "end": 140.0, "bound_s": 3.0},
        run("r", "p", "completed", 7, key="k", deadline_at=200.0),
        event("r", 1, "RunStarted"),
        event("r", 2, "StepStarted", "a"),
        event("r", 3, "StepStarted", "a", attempt=2),
        event("r", 4, "StepFinished", "a", attempt=2, data=result_a),
        event("r", 5, "StepStarted", "b"),
        event("r", 6, "StepFinished", "b", data=result_b),
        event("r", 7, "RunFinished", data={"outcome": "completed"}),
        effect("r", "a", "a1"),
        effect("r", "a", "a2", attempt=2),
        effect("r", "b", "b1"),
        {"kind": "row", "run_id": "r", "step": "b"},
        logged(1, 1, "r", **wrote("StepStarted", "a")),
        logged(2, 1, "r", **claim(71, 101.5)),
        logged(3, 2, "r", **claim(72, 103, was_running=True, lease_until=102.9)),
        logged(4, 2, "r", **wrote("StepStarted", "a", 2)),
        logged(5, 3, "r", **wrote("StepFinished", "a", 2)),
        logged(6, 3, "r", **wrote("StepStarted", "b")),
        logged(7, 4, "r", **wrote("StepFinished", "b")),
        logged(8, 5, "r", **kept("w", until=106.01, at=103.02)),
        logged(9, 6, "r", **kept("dead", until=102.9, at=102.9)),
        {"kind": "watch", "viewer": "v", "run_id": "r", "from_seq": 2, "at": 101.0},
        *(frame("v", "r", seq, types[seq - 1]) for seq in range(3, 8)),
        {"kind": "view", "viewer": "v", "run_id": "r", "from_seq": 2, "ended": True},
        {"kind": "listen", "connection": "1", "at": 99.0},
        *map(wire, (1, 2, 1, 3, 2, 4, 5, 6, 7)),
        run("c", "p", "cancelled", 7),
        event("c", 1, "RunStarted"),
        event("c", 2, "StepStarted", "a"),
        event("c", 3, "CancelRequested", data={"on_cancel": "undo"}),
        event("c", 4, "StepFinished", "a", data={"result": None}),
        event("c", 5, "StepStarted", "undo"),
        event("c", 6, "StepFinished", "undo", data={"result": None}),
        event("c", 7, "RunFinished", data={"outcome": "cancelled"}),
        run("f", "p", "failed", 10),
        event("f", 1, "RunStarted"),
        event("f", 2, "StepStarted", "a"),
        event("f", 3, "StepFinished", "a", data={"result": None}),
        *failures("f", 4),
        logged(
            40, 40, "f", claim=None, event=NOBODY | {"type": "x", "seq": 7, "statement_at": 107}
        ),
        event("f", 10, "RunFinished", data={"outcome": "failed"}),
        run("n", "p", "completed", 4, retry_of="f"),
        event("n", 1, "RunStarted", ts=111.0),
        event("n", 2, "StepStarted", "b", ts=112.0),
        event("n", 3, "StepFinished", "b", ts=113.0, data={"result": None}),
        event("n", 4, "RunFinished", ts=114.0, data={"outcome": "completed"}),
        *({**wire(n), "run_id": run_id} for run_id in "cfn" for n in range(1, 12)),
        *waiting(),
        *family(),
        *scheduled(),
        {"kind": "plan", "plan": "lim", "steps": ["a"], "cleanup": [], "retries": {}, "at_once": 1},
        *held("l1", 91, 120.0, 121.0),
        *held("l2", 92, 121.1, 122.0),
        {"kind": "plan", "plan": "kept", "steps": ["a"], "at_once": 1, "kept": True}
        | {"cleanup": [], "retries": {}},
        *held("z1", 94, 130.0, 131.0, plan="kept"),
        *held("z2", 95, 131.1, 132.0, plan="kept"),
        {"kind": "plan", "plan": "choked", "steps": ["a"], "step_at_once": {"a": 1}}
        | {"cleanup": [], "retries": {}},
        *held("z4", 97, 140.0, 141.0, plan="choked"),
        *held("z5", 98, 141.1, 142.0, plan="choked"),
        {"kind": "outbox", "rows": 0},
    ]


def scheduled() -> list[dict[str, Any]]:
    """A schedule that has fired each two seconds until it was paused, of which one tick late."""
    found: list[dict[str, Any]] = [
        {"kind": "scheduled", "name": "s", "every_s": 2, "first": 100.0},
        {
            "kind": "schedule",
            "name": "s",
            "state": "paused",
            "reason": None,
            "last_tick": 106.0,
            "until": 106.0,
        },
    ]
    for tick, at in ((100.0, 100.01), (102.0, 103.9), (104.0, 104.01), (106.0, 106.01)):
        found += ticked(f"t{tick:.0f}", tick, at)
    return found


def ticked(run_id: str, tick: float, at: float) -> list[dict[str, Any]]:
    """The run of a tick, which has reached its deadline."""
    return [
        run(run_id, "p", "failed", 2, schedule="s", tick=tick, created_at=at, attended=False),
        event(run_id, 1, "RunStarted", ts=at),
        event(run_id, 2, "RunFinished", ts=at + 0.1, data={"outcome": "failed"}),
        *({**wire(n), "run_id": run_id, "at": at + 0.2} for n in (1, 2)),
    ]


def held(
    run_id: str, token: int, begin: float, end: float, plan: str = "lim"
) -> list[dict[str, Any]]:
    """A run of a plan with a limit, which had a lease from then to then."""
    return [
        call("start", 99, 101, run_id=run_id, plan=plan),
        run(run_id, plan, "completed", 4),
        event(run_id, 1, "RunStarted", ts=begin),
        event(run_id, 2, "StepStarted", "a", ts=begin),
        event(run_id, 3, "StepFinished", "a", ts=end, data={"result": None}),
        event(run_id, 4, "RunFinished", ts=end, data={"outcome": "completed"}),
        logged(token, token, run_id, **claim(token, begin)),
        *({**wire(n), "run_id": run_id, "at": begin if n < 3 else end} for n in (1, 2, 3, 4)),
    ]


def waiting() -> list[dict[str, Any]]:
    """A function that has waited twice, once in vain, and has begun again in between."""
    routes = {
        "": ["ask", "paid"],
        "ask": ["paid"],
        "paid/received": ["ask"],
        "paid/timed_out": ["END"],
    }
    paid = {"names": ["paid"], "seconds": 1, "until": 105_000}
    return [
        {"kind": "plan", "plan": "fn", "routes": routes, "cleanup": [], "retries": {}},
        call("start", 99, 101, run_id="w", plan="fn"),
        sent("w", "k1", 101.5),
        sent("w", "k2", 102.0),
        sent("w", "undone", 102.0, "rolled_back"),
        run("w", "fn", "completed", 13),
        event("w", 1, "RunStarted"),
        event("w", 2, "StepStarted", "ask"),
        event("w", 3, "StepFinished", "ask", data={"result": {"call": "w1"}}),
        event("w", 4, "WaitStarted", "paid", data=paid),
        event("w", 5, "SignalReceived", data={"name": "paid", "key": "k1"}),
        event("w", 6, "SignalReceived", data={"name": "other", "key": "k2"}),
        event("w", 7, "WaitFinished", "paid", data={"outcome": "received", "seq": 5}),
        event("w", 8, "RunRestarted"),
        event("w", 9, "StepStarted", "ask#2"),
        event("w", 10, "StepFinished", "ask#2", data={"result": {"call": "w2"}}),
        event("w", 11, "WaitStarted", "paid#2", data=paid | {"until": 112_000}),
        event("w", 12, "WaitFinished", "paid#2", data={"outcome": "timed_out"}),
        event(
            "w",
            13,
            "RunFinished",
            data={"outcome": "completed", "result": {"seen": ["w2", None]}},
        ),
        effect("w", "ask", "w1"),
        effect("w", "ask#2", "w2"),
        logged(30, 30, "w", **claim(81, 111.9, queue="other")),
        logged(31, 31, "w", claim=None, event={"type": "WaitFinished", "seq": 12} | NOBODY),
        {"kind": "look", "txid": 31, "statement_at": 111.99, "locked": True},
        *({**wire(n), "run_id": "w"} for n in range(1, 14)),
    ]


def family() -> list[dict[str, Any]]:
    """A run with one child, and two more of which one at a time may be unfinished."""
    calls = {"ends": ["k2", "k3"], "counted": ["k2", "k3"], "alone": "k1"}
    many = {"first": 2, "count": 2, "at_once": 1, "failure": "collect"}
    counted = {"call": "m6", "ends": calls["ends"]}
    return [
        call("start", 99, 101, run_id="m", plan="fam"),
        run("m", "fam", "completed", 7),
        event("m", 1, "RunStarted"),
        event("m", 2, "ChildrenStarted", "one", data={"first": 1, "count": 1, "run_id": "k1"}),
        event("m", 3, "ChildrenStarted", "many", data=many),
        event("m", 4, "ChildrenFinished", "many", data=many),
        event("m", 5, "StepStarted", "total"),
        event("m", 6, "StepFinished", "total", data={"result": counted}),
        event("m", 7, "RunFinished", data={"outcome": "completed", "result": calls}),
        effect("m", "total", "m6"),
        *child("k1", 1, 102.1),
        *child("k2", 2, 103.1),
        *child("k3", 3, 103.5),
        *({**wire(n), "run_id": run_id} for run_id in ("m", "k1", "k2", "k3") for n in range(1, 8)),
    ]


def child(run_id: str, number: int, at: float) -> list[dict[str, Any]]:
    """A run of `m` that has emitted three pieces, begun at this time."""
    result = {"result": {"call": run_id, "pieces": 3}}
    events = [
        event(run_id, 1, "RunStarted"),
        event(run_id, 2, "StepStarted", "talk"),
        event(run_id, 3, "StepOutput", "talk", data={"first": 0, "pieces": [0, 1]}),
        event(run_id, 4, "StepOutput", "talk", data={"first": 2, "pieces": [2]}),
        event(run_id, 5, "StepFinished", "talk", data=result),
        event(run_id, 6, "RunFinished", data={"outcome": "completed"} | result),
    ]
    family = {"parent_id": "m", "child_no": number, "detached": False}
    return [
        run(run_id, "piece", "completed", 6, created_at=at, **family),
        *({**each, "ts": at + 0.05 * each["seq"]} for each in events),
        effect(run_id, "talk", run_id),
    ]


def parked(run_id: str, at: float, **facts: Any) -> list[dict[str, Any]]:
    """A run that has waited since then, and has been published."""
    names = {"names": ["paid"]} | facts
    return [
        call("start", at, at, run_id=run_id, plan="fn"),
        run(run_id, "fn", "queued", 2),
        event(run_id, 1, "RunStarted", ts=at),
        event(run_id, 2, "WaitStarted", "paid", ts=at, data=names),
        *({**wire(n), "run_id": run_id, "at": at + 0.1} for n in (1, 2)),
    ]


NOBODY = {"source": "worker", "step": None, "attempt": None}


def sent(run_id: str, key: str, at: float, outcome: str = "ok") -> dict[str, Any]:
    name = "other" if key == "k2" else "paid"
    return call("signal", at - 0.1, at, outcome, run_id=run_id, name=name, key=key)


def failures(run_id: str, seq: int) -> list[dict[str, Any]]:
    """Two attempts of `b`, of which the first was given back once."""
    error = {"type": "ValueError"}
    return [
        event(run_id, seq, "StepStarted", "b"),
        event(run_id, seq + 1, "DebugTrace", "b", data={"name": "beatless.given_back"}),
        event(run_id, seq + 2, "StepStarted", "b"),
        event(run_id, seq + 3, "StepFailed", "b", data={"error": error, "retry_at": 107_500}),
        event(run_id, seq + 4, "StepStarted", "b", attempt=2),
        event(
            run_id, seq + 5, "StepFailed", "b", attempt=2, data={"error": error, "retry_at": None}
        ),
    ]


def change(chosen: dict[str, Any], **members: Any) -> Lie:
    """The first record that has what is chosen gets other members."""

    def tell(records: list[dict[str, Any]]) -> None:
        found = next(r for r in records if chosen.items() <= r.items())
        for name, value in members.items():
            found[name] = (found[name] or {}) | value if isinstance(value, dict) else value

    return tell


def drop(**chosen: Any) -> Lie:
    """The first record that has what is chosen is missing."""

    def tell(records: list[dict[str, Any]]) -> None:
        records.remove(next(r for r in records if chosen.items() <= r.items()))

    return tell


def add(*more: dict[str, Any]) -> Lie:
    """There is more than there was."""
    return lambda records: records.extend(more)


def lapses(number: int) -> list[dict[str, Any]]:
    """Takeovers of so many runs whose leases had run out."""
    lapsed = {"was_running": True, "lease_until": 1}
    return [logged(20 + n, 20 + n, f"x{n}", **claim(90 + n, 125, **lapsed)) for n in range(number)]


LIES: dict[str, tuple[str, Lie]] = {
    "a tick fired twice": ("tick", add(*ticked("again", 104.0, 104.02))),
    "a tick that was lost": ("tick", drop(kind="run", run_id="t102")),
    "a tick that was early": ("tick", change({"run_id": "t106"}, created_at=105.99)),
    "a tick that is none": ("tick", change({"run_id": "t106"}, tick=106.5, created_at=106.6)),
    "a tick that was late in a calm": ("tick", change({"run_id": "t106"}, created_at=109.5)),
    "ticks that are fired no more": ("tick", change({"kind": "schedule"}, until=120.0)),
    "a schedule that was stopped": ("tick", change({"kind": "schedule"}, state="stopped")),
    "a seq is missing": ("I2", drop(kind="event", run_id="r", seq=4)),
    "a seq is there twice": ("I2", add(event("r", 4, "DebugTrace"))),
    "last_seq is ahead": ("I2", change({"kind": "run", "run_id": "r"}, last_seq=8)),
    "events without their run": ("I2", add(event("x", 1, "RunStarted"))),
    "no RunFinished": ("I5", change({"kind": "event", "run_id": "r", "seq": 7}, type="DebugTrace")),
    "two RunFinished": (
        "I5",
        change({"kind": "event", "run_id": "r", "seq": 3}, type="RunFinished"),
    ),
    "another outcome than the state": (
        "I5",
        change({"kind": "run", "run_id": "r"}, state="failed"),
    ),
    "a step has two results": (
        "I4",
        change({"kind": "event", "run_id": "r", "seq": 6}, step="a", attempt=2),
    ),
    "a step begins after its result": ("I4", change({"kind": "event", "seq": 5}, step="a")),
    "an effect after the result": ("I4", add(effect("r", "b", "b2", attempt=2))),
    "another key in the second attempt": ("I4", change({"kind": "effect", "call": "a2"}, key="?")),
    "two steps with one key": ("I4", change({"kind": "effect", "call": "b1"}, key="r:a")),
    "a result that no body made": ("I4", drop(kind="effect", call="b1")),
    "a transactional step stored twice": ("I4", add({"kind": "row", "run_id": "r", "step": "b"})),
    "a row without its result": ("I4", add({"kind": "row", "run_id": "c", "step": "b"})),
    "the result of the frozen worker": (
        "I11",
        change({"kind": "event", "run_id": "r", "seq": 4}, data={"result": {"call": "a1"}}),
    ),
    "a slot of a run that has ended": (
        "I14",
        add({"kind": "slot", "limit_id": "lim", "run_id": "l1"}),
    ),
    "a lease without a slot": ("I14", change({"kind": "log", "run_id": "l1"}, claim={"slots": 0})),
    "two leases where a limit lets have one": ("I14", add(*held("l3", 93, 120.5, 121.05))),
    "two runs where one keeps its slot": (
        "I14",
        add(*held("z3", 96, 130.5, 131.05, plan="kept")),
    ),
    "two steps where a limit lets one begin": (
        "I14",
        add(*held("z6", 99, 140.5, 141.05, plan="choked")),
    ),
    "a token that was there before": ("I11", change({"kind": "log", "id": 3}, claim={"token": 71})),
    "a lease without token": ("I11", change({"kind": "log", "id": 2}, claim={"token": 0})),
    "a lease that was taken too early": (
        "I11",
        change({"kind": "log", "id": 3}, claim={"lease_until": 104}),
    ),
    "a write of the worker before": ("I11", change({"kind": "log", "id": 5}, event={"attempt": 1})),
    "a trace of the worker before": (
        "I11",
        add(logged(10, 5, "r", **wrote("DebugTrace", "a", 1))),
    ),
    "a lease that was renewed for a moment": (
        "I11",
        change({"kind": "log", "id": 8}, lease={"until": 103.5}),
    ),
    "leases that nobody renews": (
        "I11",
        lambda records: (drop(kind="log", id=8)(records), add(*lapses(6))(records))[1],
    ),
    "a worker that was taken for dead and lives": (
        "I11",
        add(logged(10, 7, "r", **claim(73, 122, worker="dead"))),
    ),
    "a worker that claims long after it was asked to stop": (
        "I11",
        add(
            {"kind": "stop", "pids": [6, 7], "at": 100.0, "grace_s": 5.0},
            logged(10, 7, "r", **claim(73, 126, worker="host:7:a")),
        ),
    ),
    "an attempt that nothing explains": (
        "I10",
        change({"kind": "log", "id": 3}, claim={"was_running": False}),
    ),
    "a retry that is due too early": (
        "delay",
        change({"kind": "event", "run_id": "f", "seq": 7}, data={"retry_at": 107_450}),
    ),
    "an attempt that ran twice": ("I10", add(effect("r", "b", "b2"))),
    "an attempt that was given back is counted": (
        "I10",
        change({"kind": "event", "run_id": "f", "seq": 6}, attempt=2),
    ),
    "an attempt that failed is not counted": (
        "I10",
        change({"kind": "event", "run_id": "f", "seq": 8}, attempt=1),
    ),
    "a step is tried again too often": (
        "I10",
        change({"kind": "event", "run_id": "f", "seq": 9}, data={"retry_at": 109_500}),
    ),
    "a step is given up too early": (
        "I10",
        change({"kind": "plan"}, retries={"b": FLAKY | {"attempts": 3}}),
    ),
    "a retry that does not wait": (
        "delay",
        change({"kind": "event", "run_id": "f", "seq": 8}, ts=107.2),
    ),
    "a retry that repeats a finished step": (
        "I4",
        change({"kind": "event", "run_id": "n", "seq": 2}, step="a"),
    ),
    "a step was left out": (
        "order",
        change({"kind": "plan", "plan": "p"}, steps=["a", "between", "b"]),
    ),
    "completed before the end": ("order", change({"kind": "plan"}, steps=["a", "b", "c"])),
    "a viewer missed one": ("I6", drop(kind="frame", seq=5)),
    "a viewer saw one twice": ("I6", change({"kind": "frame", "seq": 5}, seq=4)),
    "a viewer saw another text": ("I6", change({"kind": "frame", "seq": 5}, text="other")),
    "a viewer saw another run": ("I6", change({"kind": "frame", "seq": 5}, run_id="c")),
    "a viewer went on in another history": (
        "I6",
        lambda records: (
            change({"kind": "frame", "seq": 4}, epoch="a")(records),
            change({"kind": "frame", "seq": 5}, epoch="b")(records),
        )[1],
    ),
    "a viewer never got the end": ("I1", drop(kind="frame", seq=7)),
    "a viewer still waits": ("I1", change({"kind": "view"}, ended=False)),
    "published out of order": (
        "I3",
        add({"kind": "listen", "connection": "2", "at": 99.0}, wire(2, "2"), wire(1, "2")),
    ),
    "never published": ("I3", drop(kind="wire", run_id="r", seq=4)),
    "an accepted run is gone": ("I7", add(call("start", 1, 2, run_id="lost", plan="p"))),
    "a run never ends": ("I7", change({"kind": "run", "run_id": "r"}, state="queued")),
    "a run that nobody started": ("I12", drop(kind="call", run_id="r")),
    "a rolled back start has a run": (
        "I12",
        change({"kind": "call", "run_id": "gone"}, run_id="r"),
    ),
    "rows are left in the outbox": ("I8", change({"kind": "outbox"}, rows=1)),
    "rows are left in the outbox of a quiet": (
        "I8",
        change({"kind": "quiet"}, drained=None, rows=1),
    ),
    "a run does not move in a quiet": (
        "I7",
        add(
            run("w", "p", "queued", 1),
            event("w", 1, "RunStarted"),
            {"kind": "quiet", "begin": 200.0, "end": 230.0, "drained": None, "rows": 0},
        ),
    ),
    "a run that began late in calm": (
        "prompt",
        add(
            call("start", 119, 120, run_id="l", plan="p"),
            run("l", "p", "queued", 1),
            event("l", 1, "RunStarted", ts=119.5),
        ),
    ),
    "an event that was published late in calm": (
        "prompt",
        change({"kind": "wire", "run_id": "r", "seq": 6}, at=111.0),
    ),
    "an event that was shown late in calm": (
        "prompt",
        change({"kind": "frame", "seq": 7}, at=111.0),
    ),
    "a deadline that nobody looked at in calm": (
        "prompt",
        change({"kind": "run", "run_id": "n"}, deadline_at=110.5),
    ),
    "a cancel whose caller has rolled back": (
        "I12",
        change({"kind": "call", "op": "cancel", "run_id": "c"}, outcome="rolled_back"),
    ),
    "a cancel that undoes nothing": (
        "I9",
        change({"kind": "event", "run_id": "c", "seq": 5}, type="DebugTrace"),
    ),
    "a cancel is not stored": ("I9", change({"kind": "call", "op": "cancel"}, run_id="r")),
    "a step begins after the cancel": (
        "I9",
        change({"kind": "event", "run_id": "c", "seq": 5}, step="b"),
    ),
    "a key names two runs": ("key", change({"kind": "run", "run_id": "c"}, key="k")),
    "a delayed run began early": (
        "delay",
        change({"kind": "event", "run_id": "r", "seq": 2}, ts=101.5),
    ),
    "a step began after the deadline": (
        "deadline",
        change({"kind": "event", "run_id": "r", "seq": 5}, ts=208.5),
    ),
    "a run outlived its deadline": (
        "deadline",
        change({"kind": "run", "run_id": "r"}, deadline_at=107.0 - 181),
    ),
    "a child that was started twice": ("child", add(*child("again", 2, 103.2))),
    "a child that no call has started": ("child", add(*child("more", 9, 103.2))),
    "a call that has started its children twice": (
        "child",
        change({"kind": "event", "run_id": "m", "seq": 4}, type="ChildrenStarted"),
    ),
    "two children at once where one may be": (
        "child",
        change({"kind": "event", "run_id": "k3", "seq": 1}, ts=103.3),
    ),
    "results in another order than the children": (
        "child",
        change(
            {"kind": "event", "run_id": "m", "seq": 7},
            data={"result": {"ends": ["k3", "k2"], "counted": ["k2", "k3"], "alone": "k1"}},
        ),
    ),
    "another result than that of the child": (
        "child",
        change({"kind": "event", "run_id": "k1", "seq": 6}, data={"result": {"call": "other"}}),
    ),
    "a child that outlives its parent": (
        "child",
        lambda records: (
            drop(kind="event", run_id="k3", seq=6)(records),
            change({"kind": "run", "run_id": "k3"}, state="running", last_seq=5)(records),
        )[1],
    ),
    "a parent that is not woken": (
        "I7",
        add(
            run("p", "fam", "queued", 2),
            event("p", 1, "RunStarted"),
            event("p", 2, "ChildrenStarted", "many", data={"first": 1, "count": 1}),
            *({**each, "parent_id": "p"} for each in child("pk", 1, 150.0)),
            {"kind": "quiet", "begin": 200.0, "end": 230.0, "drained": None, "rows": 0},
        ),
    ),
    "output with a hole": (
        "output",
        change({"kind": "event", "run_id": "k2", "seq": 4}, data={"first": 3}),
    ),
    "output that is there twice": (
        "output",
        change({"kind": "event", "run_id": "k2", "seq": 4}, data={"pieces": [1]}),
    ),
    "output that was lost": (
        "output",
        change({"kind": "event", "run_id": "k2", "seq": 4}, data={"pieces": []}),
    ),
    "a wait that ends twice": (
        "wait",
        change(
            {"kind": "event", "run_id": "w", "seq": 9},
            type="WaitFinished",
            step="paid",
            data={"outcome": "timed_out"},
        ),
    ),
    "a wait that had not begun": ("wait", drop(kind="event", run_id="w", seq=4)),
    "a time-out in spite of a signal": (
        "wait",
        change({"kind": "event", "run_id": "w", "seq": 6}, data={"name": "paid"}),
    ),
    "a time-out that came too early": (
        "wait",
        change({"kind": "event", "run_id": "w", "seq": 12}, ts=111.9),
    ),
    "a wait that takes a signal of another name": (
        "wait",
        change({"kind": "event", "run_id": "w", "seq": 7}, data={"seq": 6}),
    ),
    "a signal that is taken twice": (
        "wait",
        change({"kind": "event", "run_id": "w", "seq": 12}, data={"outcome": "received", "seq": 5}),
    ),
    "a wait that takes the younger signal": (
        "wait",
        lambda records: (
            change({"kind": "event", "run_id": "w", "seq": 6}, data={"name": "paid"})(records),
            change({"kind": "event", "run_id": "w", "seq": 7}, data={"seq": 6})(records),
        )[1],
    ),
    "a signal that was received twice": (
        "wait",
        change({"kind": "event", "run_id": "w", "seq": 6}, data={"key": "k1"}),
    ),
    "a signal that nobody sent": (
        "I12",
        change({"kind": "event", "run_id": "w", "seq": 6}, data={"key": "nobody"}),
    ),
    "a signal whose sender has rolled back": (
        "I12",
        change({"kind": "event", "run_id": "w", "seq": 6}, data={"key": "undone"}),
    ),
    "a signal that came under another name": (
        "wait",
        change({"kind": "event", "run_id": "w", "seq": 6}, data={"name": "third"}),
    ),
    "a time-out that overlooks a committed signal": ("wait", add(sent("w", "k9", 111.98))),
    "a time-out without a look, after a committed signal": (
        "wait",
        lambda records: (drop(kind="look")(records), add(sent("w", "k9", 111.8))(records))[1],
    ),
    "an inbox that is read before the row is locked": (
        "wait",
        change({"kind": "look"}, locked=False),
    ),
    "a route that is not the plan's": (
        "order",
        change({"kind": "plan", "plan": "fn"}, routes={"paid/received": ["END"]}),
    ),
    "a function that ends too early": (
        "order",
        change({"kind": "plan", "plan": "fn"}, routes={"paid/timed_out": ["ask"]}),
    ),
    "a function that was told another result": (
        "I4",
        change({"kind": "event", "run_id": "w", "seq": 10}, data={"result": {"call": "w1"}}),
    ),
    "a function that was told of a signal in vain": (
        "I4",
        change({"kind": "event", "run_id": "w", "seq": 13}, data={"result": {"seen": ["w2", 5]}}),
    ),
    "a body that is called again by a replay": ("I10", add(effect("w", "ask", "w3"))),
    "a wait that begins after a cancel": (
        "I9",
        change({"kind": "event", "run_id": "c", "seq": 5}, type="WaitStarted", data={}),
    ),
    "a signal that wakes nobody": (
        "I7",
        add(
            *parked("p", 190.0),
            sent("p", "late", 195.0),
            {"kind": "quiet", "begin": 200.0, "end": 230.0, "drained": None, "rows": 0},
        ),
    ),
    "a time-out that wakes nobody": (
        "I7",
        add(
            *parked("p", 190.0, until=196_000),
            {"kind": "quiet", "begin": 200.0, "end": 230.0, "drained": None, "rows": 0},
        ),
    ),
    "a signal that was received late in calm": (
        "prompt",
        add(*parked("p", 106.0), sent("p", "late", 110.0)),
    ),
    "a signal that was received in calm and ends no wait": (
        "prompt",
        add(
            *parked("p", 106.0),
            event("p", 3, "SignalReceived", ts=110.0, data={"name": "paid", "key": "late"}),
        ),
    ),
    "a claim in a paused queue": (
        "pause",
        change({"kind": "log", "id": 2}, claim={"statement_at": 115}),
    ),
}


def parked_history(*more: dict[str, Any]) -> list[dict[str, Any]]:
    """All ended, but for a run that waits for a signal in a quiet in which nothing ends."""
    quiet = {"kind": "quiet", "begin": 200.0, "end": 230.0, "drained": None, "rows": 0}
    return [r for r in honest() if r["kind"] != "outbox"] + [*parked("p", 150.0), quiet, *more]


def test_a_function_that_has_begun_again_is_retried_from_there() -> None:
    again = event("f", 3, "RunRestarted"), event("n", 2, "StepStarted", "a", ts=112.0)
    before = event("f", 2, "StepFinished", "a", data={"result": None})
    records = [
        *(
            call("start", 99, 101, run_id="f", plan="q"),
            call("retry", 110, 111, run_id="f", new="n"),
        ),
        *(run("f", "q", "failed", 4), run("n", "q", "completed", 4, retry_of="f")),
        *(event("f", 1, "RunStarted"), before, again[0]),
        event("f", 4, "RunFinished", data={"outcome": "failed"}),
        *(event("n", 1, "RunStarted", ts=111.0), again[1]),
        event("n", 3, "StepFinished", "a", ts=113.0, data={"result": None}),
        event("n", 4, "RunFinished", ts=114.0, data={"outcome": "completed"}),
    ]
    assert check(records) == []
    assert [each.invariant for each in check([r for r in records if r != again[0]])] == ["I2", "I4"]


@pytest.mark.parametrize("told", ["b", None])
def test_a_viewer_that_is_reset_is_shown_all_again(told: str | None) -> None:
    records = honest()
    end = next(n for n, record in enumerate(records) if record["kind"] == "view")
    types = [r["type"] for r in records if r["kind"] == "event" and r["run_id"] == "r"]
    anew = [frame("v", "r", seq, type) | {"epoch": "b"} for seq, type in enumerate(types, 1)]
    reset = frame("v", "r", 0, "reset") | {"epoch": told}
    change({"kind": "frame", "seq": 4}, epoch="a")(records)
    assert check([*records[:end], reset, *anew, *records[end:]]) == []


def test_the_deadline_of_a_run_that_is_undone_then_hastens_a_retry() -> None:
    records = copy.deepcopy(honest())
    LIES["a retry that is due too early"][1](records)
    assert "delay" in {violation.invariant for violation in check(records)}
    records.append(event("f", 20, "UndoStarted"))
    assert "delay" in {violation.invariant for violation in check(records)}
    records[-1]["data"] = {"deadline_at": 107_450}
    assert "delay" not in {violation.invariant for violation in check(records)}


def test_a_run_may_wait_for_a_signal_that_nobody_sends() -> None:
    assert check(parked_history()) == []


def test_a_signal_may_come_between_the_look_and_the_time_out() -> None:
    assert check([*honest(), sent("w", "k9", 111.995)]) == []


def test_a_signal_may_come_when_the_run_has_ended_by_itself() -> None:
    assert check([*honest(), sent("w", "k9", 114.0), sent("w", "k8", 114.0, "failed")]) == []


def beside(*ended: str) -> list[dict[str, Any]]:
    """A run that was cancelled with the steps a, b and c in flight, of which these ended then."""
    return [
        call("start", 99, 101, run_id="g", plan="q"),
        call("cancel", 102, 103, run_id="g"),
        run("g", "q", "cancelled", 6 + len(ended)),
        event("g", 1, "RunStarted"),
        *(event("g", seq, "StepStarted", step) for seq, step in enumerate("abc", 2)),
        event("g", 5, "CancelRequested"),
        *(
            event("g", seq, "StepFinished", step, data={"result": None})
            for seq, step in enumerate(ended, 6)
        ),
        event("g", 6 + len(ended), "RunFinished", data={"outcome": "cancelled"}),
    ]


def test_all_that_is_in_flight_at_a_cancel_may_end_after_it() -> None:
    assert check(beside("a", "b", "c")) == []
    assert [violation.invariant for violation in check(beside("a", "b", "c", "d"))] == ["I9"]


@pytest.mark.parametrize(("version", "found"), [(2**30 + 1, []), (1, ["I11", "I11"])])
def test_steps_that_were_begun_beside_others_end_in_their_lease(
    version: int, found: list[str]
) -> None:
    records = beside("a", "b", "c")
    log = [("StepStarted", step) for step in "abc"] + [("StepFinished", step) for step in "abc"]
    seqs = (2, 3, 4, 6, 7, 8)
    for record in records:
        if record.get("type") == "StepStarted":
            record["data"] = {"version": version}
    records += [logged(1, 1, "g", **claim(75, 101.5))]
    for seq, (type, step) in zip(seqs, log, strict=True):
        wrote_one = wrote(type, step)
        wrote_one["event"] |= {"seq": seq, "statement_at": 101.6}
        records.append(logged(seq, seq, "g", **wrote_one))
    assert [violation.invariant for violation in check(records)] == found


def test_an_honest_history_has_no_violation() -> None:
    assert check(honest()) == []


def test_a_lie_is_found() -> None:
    believed = []
    for lie, (invariant, tell) in LIES.items():
        records = copy.deepcopy(honest())
        tell(records)
        if invariant not in {violation.invariant for violation in check(records)}:
            believed.append(lie)
    assert believed == []


def test_leases_may_run_out_on_a_slow_machine_where_others_are_renewed() -> None:
    assert check([*honest(), *lapses(20)]) == []


def test_where_all_are_slow_nothing_is_late() -> None:
    records = honest()
    change({"kind": "wire", "run_id": "r", "seq": 6}, at=111.0)(records)
    for record in records:
        if record["kind"] in ("frame", "wire") and record["at"] < 111:
            record["at"] += 0.9
    assert check(records) == []


def test_a_worker_may_be_taken_for_dead_whose_sessions_were_cut() -> None:
    records = honest()
    add(
        logged(10, 7, "r", **claim(73, 122, worker="dead")),
        {"kind": "fault", "name": "every_session_ended", "begin": 102.0, "end": 102.1},
    )(records)
    assert check(records) == []


def test_a_statement_may_be_held_up_between_two_looks_at_the_clock() -> None:
    records = honest()
    change({"kind": "event", "run_id": "f", "seq": 7}, ts=107.4, data={"retry_at": 107_500})(
        records
    )
    assert check(records) == []


def test_the_order_of_the_records_does_not_matter_where_they_say_their_place() -> None:
    records = honest()
    ordered = [r for r in records if r["kind"] in ("frame", "wire")]
    others = [r for r in records if r["kind"] not in ("frame", "wire")]
    assert check([*reversed(others), *ordered]) == []


def synced(*numbers: int, begun: int = 3, stored: int | None = None) -> list[dict[str, Any]]:
    """A run of `customer-1` whose input was given these numbers, one after the other."""
    facts = {"plan": "synced", "key": None, "delay_s": None, "run_id": "s"}
    calls = [
        call("start", n, n + 0.5, number=n, **facts, start="input_replaced" if n > 1 else "started")
        for n in numbers
    ]
    number = numbers[-1] if stored is None else stored
    keyed = {"dedupe_key": "customer-1", "number": number}
    return [
        *calls,
        {"kind": "plan", "plan": "synced", "steps": ["sync"], "cleanup": [], "retries": {}},
        run("s", "synced", "completed", 5, **keyed),
        event("s", 1, "RunStarted"),
        event("s", 2, "InputReplaced", data={"not_before": (100 + begun) * 1000}, source="api"),
        event("s", 3, "StepStarted", "sync"),
        event("s", 4, "StepFinished", "sync", data={"result": {"call": "c", "number": number}}),
        event("s", 5, "RunFinished", data={"outcome": "completed"}),
        effect("s", "sync", "c"),
    ]


def behind(at: float) -> list[dict[str, Any]]:
    """Another run of the same key, which begins then."""
    facts = {"plan": "synced", "key": None, "delay_s": None, "run_id": "t", "number": 9}
    done = {"result": {"call": "d", "number": 9}}
    return [
        call("start", 9, 9.5, start="started", **facts),
        run("t", "synced", "completed", 4, dedupe_key="customer-1", number=9, created_at=102.0),
        event("t", 1, "RunStarted", ts=102.0),
        event("t", 2, "StepStarted", "sync", ts=at),
        event("t", 3, "StepFinished", "sync", ts=at + 1, data=done),
        event("t", 4, "RunFinished", ts=at + 2, data={"outcome": "completed"}),
        effect("t", "sync", "d"),
    ]


def test_runs_of_one_key_pass_one_after_the_other() -> None:
    assert check([*synced(1, 2, 3), *behind(105.1)]) == []


@pytest.mark.parametrize(
    ("records", "rule"),
    [
        ([*synced(1, 2), *behind(104.5)], "I13 t: began while s had customer-1, too"),
        (synced(1, 2, 3, stored=2), "input s: has the input 2, and 3 came later"),
        (synced(1, 2, stored=7), "input s: has the input 7, which nobody gave"),
        (synced(1, 2, begun=4), "delay s: began before its last input was old enough"),
        (
            [
                *synced(1, 2),
                *({**wire(n), "run_id": "s", "at": 109.9} for n in range(1, 6)),
                call("start", 110.0, 111.0, plan="synced", run_id="s", number=5, start="joined"),
            ],
            "I13 s: had ended, and a start has joined it",
        ),
    ],
)
def test_what_a_dedupe_key_promises_is_checked(records: list[dict[str, Any]], rule: str) -> None:
    assert [str(violation) for violation in check(records)] == [rule]


def test_a_run_whose_end_nobody_can_know_of_yet_is_joined() -> None:
    joins = call("start", 110.0, 111.0, plan="synced", run_id="s", number=5, start="joined")
    heard = ({**wire(n), "run_id": "s", "at": 110.1} for n in range(1, 6))
    assert check([*synced(1, 2), *heard, joins]) == []


def test_a_result_of_another_input_and_an_input_for_a_run_that_has_begun_are_found() -> None:
    records = synced(1, 2)
    late = [each | {"ts": 103.5, "seq": 4} if each.get("seq") == 2 else each for each in records]
    late = [each | {"seq": each["seq"] - 1} if each.get("seq") == 3 else each for each in late]
    assert "input s: got another input after it had begun" in map(str, check(late))
    other = [
        each | {"data": {"result": {"call": "c", "number": 1}}} if each.get("seq") == 4 else each
        for each in records
    ]
    found = [str(violation) for violation in check(other)]
    assert found == ["input s: was executed with another input than it has"]
