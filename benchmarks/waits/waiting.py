"""Many runs that sleep or wait for a signal: what they cost, and how soon they go on."""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from time import monotonic

from beatless import App, SignalRequest
from beatless.local.child import Child
from beatless.orchestrator.events import EventType, NewEvent
from benchmarks.measure import interleaved, ratios
from benchmarks.peers.process_tree import processor_s
from benchmarks.peers.workloads import percentile
from benchmarks.waits.fleet import BULK, Chosen, Figure, Fleet, fleets, pause, pause_until
from benchmarks.waits.plans import PLANS

WAITING = 100_000
"""Runs of each kind."""

IDLE_S = 5.0
LONG_S = timedelta(days=30).total_seconds()

DUE = 1000
"""Runs whose sleep ends within one second."""

LEAD_S = 10.0
"""Seconds that they have to fall asleep; twice as many if that was not enough."""

SENT = 10_000
"""Signals that are accepted in a repeat."""

SINGLE = 1000
"""Of those that are sent by a call of their own."""

PAIRS = 60
"""Signals to runs that wait, and starts of plain runs, of a repeat."""

LEASED = 1000
"""Runs that plain appends go to."""

DATA = {"amount": 12, "note": "x" * 40}
TRACE = NewEvent(type=EventType.DEBUG_TRACE, step="begin", attempt=1, data=json.dumps(DATA))
"""What is appended: as large as a signal."""


def measure(chosen: Chosen) -> Iterator[Figure]:
    with fleets() as fleet:
        relay, worker = fleet.start("relay"), fleet.start("worker")
        yield _idle(chosen, relay, "empty", "while no run waits")
        count = chosen.of(WAITING)
        began = monotonic()
        fleet.park("later", [{"seconds": LONG_S}] * count)
        waiting = fleet.park("signalled", [None] * count)
        yield Figure(
            key="parked",
            values=[2 * count / (monotonic() - began)],
            unit="/s",
            what="runs started in bulk, begun and parked at a wait",
        )
        fleet.await_published()
        all_of_them = f"while {count:,} runs sleep and {count:,} wait for a signal"
        yield _idle(chosen, relay, "idle", all_of_them)
        yield from _due(fleet, chosen)
        yield from _resumed(fleet, chosen, waiting)
        fleet.end(relay, worker)
        yield from _accepted(fleet, chosen, waiting)


def _idle(chosen: Chosen, relay: Child, key: str, when: str) -> Figure:
    found = []
    for _ in range(chosen.repeats):
        before, began = processor_s(relay.pid), monotonic()
        pause(IDLE_S)
        found.append(100 * (processor_s(relay.pid) - before) / (monotonic() - began))
    what = f"of a core that a relay uses {when}"
    return Figure(key=key, values=found, unit="%", what=what)


def _due(fleet: Fleet, chosen: Chosen) -> Iterator[Figure]:
    """From the time that a sleep ends to the first line of what follows it."""
    count, lead_s = chosen.of(DUE), LEAD_S
    last, half, most, early = list[float](), list[float](), list[float](), list[float]()
    while len(last) < chosen.repeats:
        first = time.time() + lead_s
        run_ids = fleet.start_runs("until", [{"due": first + n / count} for n in range(count)])
        fleet.until(partial(_all_sleep, fleet, run_ids), "all runs sleep")
        in_time = time.time() < first
        fleet.await_ends(run_ids)
        if not in_time:
            lead_s *= 2
            continue
        ends, begun = _ends_of_sleeps(fleet, run_ids), fleet.results(run_ids)
        late = [began - ends[run_id] for run_id, began in zip(run_ids, begun, strict=True)]
        last.append(max(begun) - max(ends.values()))
        half.append(1000 * percentile(late, 50))
        most.append(1000 * percentile(late, 99))
        early.append(sum(each < 0 for each in late))
    of = f"{count:,} sleeps that end in one second, beside all that wait"
    yield Figure(key="due", values=last, unit="s", what=f"last end to all begun: {of}")
    yield Figure(key="due.p50", values=half, unit="ms", what="end to first line of each, p50")
    yield Figure(key="due.p99", values=most, unit="ms", what="the same, p99")
    yield Figure(key="due.early", values=early, unit="", what="of them before their time")


def _all_sleep(fleet: Fleet, run_ids: Sequence[str]) -> bool:
    return len(_ends_of_sleeps(fleet, run_ids)) == len(run_ids)


def _ends_of_sleeps(fleet: Fleet, run_ids: Sequence[str]) -> dict[str, float]:
    """The time at which the sleep of each run ends, of those that have begun it."""
    rows = fleet.db.execute(
        "SELECT run_id, (data ->> 'until')::float8 / 1000 FROM run_events"
        " WHERE run_id = ANY(%s) AND type = 'WaitStarted'",
        (list(run_ids),),
    ).fetchall()
    return dict(rows)


def _resumed(fleet: Fleet, chosen: Chosen, waiting: list[str]) -> Iterator[Figure]:
    """Signals to runs that wait and starts of plain runs, in random order, 50 ± 20 ms apart."""
    pairs = chosen.of(PAIRS, least=10)
    found: dict[str, list[float]] = {"signal": [], "start": []}
    chance = random.Random(7)
    for _ in range(chosen.repeats):
        calls: dict[str, list[tuple[str, float]]] = {"signal": [], "start": []}
        due = time.time()
        for kind in chance.sample(["signal", "start"] * pairs, 2 * pairs):
            due += chance.uniform(0.03, 0.07)
            pause_until(due)
            began = time.time()
            if kind == "signal":
                run_id = waiting.pop()
                fleet.client.signal_run(run_id, "go", DATA)
            else:
                run_id = fleet.client.start_run("plain", DATA).run_id
            calls[kind].append((run_id, began))
        for kind, sent in calls.items():
            run_ids = [run_id for run_id, _ in sent]
            fleet.await_ends(run_ids)
            lines = zip(fleet.results(run_ids), sent, strict=True)
            found[kind].append(1000 * percentile([line - began for line, (_, began) in lines], 50))
    yield Figure(key="signal", values=found["signal"], unit="ms", what="signal to first line, p50")
    yield Figure(
        key="signal.start",
        values=found["start"],
        unit="ms",
        what="start to first line of a plain run, p50, in between",
    )
    yield Figure(
        key="signal.ratio",
        values=ratios(found["signal"], found["start"]),
        unit="x",
        what="signal to first line / start to first line of a plain run, p50",
    )


def _accepted(fleet: Fleet, chosen: Chosen, waiting: list[str]) -> Iterator[Figure]:
    """How many signals one process sends, while no other works; then how soon all runs go on."""
    many, few = chosen.of(SENT), chosen.of(SINGLE)
    sent: list[str] = []

    def timed(count: int, calls: Callable[[Sequence[str]], None]) -> float:
        run_ids = [waiting.pop() for _ in range(count)]
        sent.extend(run_ids)
        began = monotonic()
        calls(run_ids)
        return count / (monotonic() - began)

    def in_bulk(run_ids: Sequence[str]) -> None:
        for first in range(0, len(run_ids), BULK):
            some = run_ids[first : first + BULK]
            fleet.client.signal_runs([SignalRequest(each, "go", DATA) for each in some])

    def one_by_one(run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            fleet.client.signal_run(run_id, "go", DATA)

    with _appends(fleet, chosen.of(LEASED)) as append:
        found = interleaved(
            {
                "bulk": lambda: timed(many, in_bulk),
                "single": lambda: timed(few, one_by_one),
                "appends": lambda: append(few, 1),
                "appends_bulk": lambda: append(many, BULK),
            },
            chosen.repeats,
        )
    yield Figure(
        key="signals",
        values=found["bulk"],
        unit="/s",
        what=f"signals accepted, {BULK} to a call of signal_runs",
    )
    for key, above, below, what in (
        ("one", "bulk", "appends", "the same / plain appends, a commit each"),
        ("many", "bulk", "appends_bulk", f"the same / plain appends, {BULK} to a commit"),
        ("single", "single", "appends", "signals, a call each / plain appends, a commit each"),
    ):
        values = ratios(found[above], found[below])
        yield Figure(key=f"signals.{key}", values=values, unit="x", what=what)
    fleet.start("relay"), fleet.start("worker")
    began = monotonic()
    fleet.await_ends(sent, every_s=1.0)
    yield Figure(
        key="signals.resumed",
        values=[len(sent) / (monotonic() - began)],
        unit="/s",
        what=f"runs that go on to their ends, {len(sent):,} that have got a signal",
    )


@contextmanager
def _appends(fleet: Fleet, count: int) -> Iterator[Callable[[int, int], float]]:
    """Plain appends to so many runs, by their number and how many share a commit: their rate."""
    # Of a fleet whose leases last: nobody takes these runs over.
    app = App(replace(fleet.bench.settings, lease_seconds=86_400), PLANS)
    leases = []
    with closing(app), app.executors.connect() as connection:
        for run_id in fleet.start_runs("plain", [None] * count):
            lease = app.leases.claim(
                connection, run_id, plan="plain", worker="w", first_step="begin", dispatch=1
            )
            assert lease
            leases.append(lease)

        def append(number: int) -> None:
            lease = leases[number % count]
            assert app.journal.append(connection, lease.run.run_id, lease.token, [TRACE])

        def rate(events: int, together: int) -> float:
            began = monotonic()
            for first in range(0, events, together):
                with connection.transaction() if together > 1 else nullcontext():
                    for number in range(first, min(first + together, events)):
                        append(number)
            return events / (monotonic() - began)

        yield rate
