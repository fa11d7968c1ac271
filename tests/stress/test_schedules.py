"""Schedules at length: each second through deaths of relays and of Postgres, and a great many."""

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from beatless import App, Schedule
from beatless.local.child import Child
from beatless.local.postgres import EmbeddedPostgres
from beatless.migrations import migrate
from beatless.outbox.observer import TicksFired, WatchdogRan
from beatless.testing import Kit
from tests.integration.test_relay import noting, running
from tests.valkeys import until

pytestmark = pytest.mark.long(minutes=1)

SECONDS = 60
FAULT_EVERY_S = 5.0
SCHEDULES, DUE = 100_000, 1000
RARE_S = 300 * 86_400


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """One of its own, which can be killed."""
    with EmbeddedPostgres(tmp_path / "postgres", settings={"fsync": "off"}) as server:
        yield server


@pytest.fixture
def apart(beatless_app: App, server: EmbeddedPostgres, tmp_path: Path) -> Iterator[Kit]:
    """A kit on that server."""
    with ExitStack() as ends:
        settings = replace(beatless_app.settings, database_url=server.url, listen_url="")
        app = App(settings, list(beatless_app.plans.values()))
        ends.callback(app.close)
        migrate(app.engine, app.settings.schema)
        kit = Kit(app, directory=tmp_path)
        ends.callback(kit.close)
        yield kit


def test_each_second_has_one_run_while_relays_are_killed_and_frozen_and_postgres_dies(
    apart: Kit, server: EmbeddedPostgres
) -> None:
    relays = [apart.relay_process("tests.plans:app") for _ in range(3)]
    made = apart.client.create_schedule(
        Schedule("second", "two_steps", every=1, catch_up="all", queue="nobody")
    )
    rng, pause = random.Random(21), threading.Event()
    first = made.next_tick
    assert first is not None
    frozen: list[Child] = []
    faults = 0
    while (datetime.now(UTC) - first).total_seconds() < SECONDS:
        pause.wait(FAULT_EVERY_S)
        faults += 1
        for relay in frozen:
            os.kill(relay.pid, signal.SIGCONT)
        frozen.clear()
        victim = rng.choice(relays)
        if rng.random() < 0.5:
            os.kill(victim.pid, signal.SIGSTOP)
            frozen.append(victim)
        else:
            victim.kill()
            relays[relays.index(victim)] = apart.relay_process("tests.plans:app")
        if faults == 6:
            server.crash()
            server.start()
            apart.app.engine.dispose()
    for relay in frozen:
        os.kill(relay.pid, signal.SIGCONT)
    last = first + timedelta(seconds=SECONDS - 1)
    until(lambda: (tick := apart.schedules["second"].last_tick) is not None and tick >= last, 300)
    apart.client.pause_schedule("second")

    runs = sorted(apart.client.list_runs(queue="nobody", limit=1000), key=lambda run: run.tick)
    assert len(runs) >= SECONDS
    assert [run.tick for run in runs] == [
        first + timedelta(seconds=number) for number in range(len(runs))
    ]
    lateness = sorted((run.created_at - run.tick).total_seconds() for run in runs)
    assert lateness[0] >= 0
    told("a tick each second", lateness)


def test_a_hundred_thousand_schedules_cost_an_idle_relay_nothing_and_a_thousand_fire_at_once(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    made = beatless.client.create_schedule(
        Schedule("s-1", "two_steps", every=RARE_S, queue="nobody")
    )
    assert made.next_tick is not None
    postgres.execute(
        "INSERT INTO schedules (namespace, name, app, declared, run, every, tz, catch_up, overlap,"
        " jitter, state, tick, due_at, look_at)"
        " SELECT namespace, 's-' || n, app, declared, run, every, tz, catch_up, overlap, jitter,"
        f" state, tick, due_at, look_at FROM schedules, generate_series(2, {SCHEDULES}) n".encode()
    )
    postgres.execute("ANALYZE schedules")
    connect, statements = noting(beatless_app)
    with running(beatless_app, connect=connect, watchdog=0.2) as (_, announcements):
        begin = len(statements)
        announcements.wait(WatchdogRan, 3)
        said = [text for text in statements[begin:] if text != "a cursor"]
        assert all("FROM pg_locks" in text for text in said), said

        postgres.execute(
            "UPDATE schedules SET due_at = date_trunc('second', clock_timestamp())"
            f" + interval '2 s' WHERE id <= {DUE}".encode()
        )
        postgres.execute(f"UPDATE schedules SET look_at = due_at WHERE id <= {DUE}".encode())
        with beatless_app.engine.begin() as connection:
            beatless.client.update_schedule(
                Schedule("s-100000", "two_steps", every=RARE_S, queue="nobody"),
                connection=connection,
            )
        announcements.wait_until(
            lambda seen: (
                sum(len(each.ticks) for each in seen if isinstance(each, TicksFired)) >= DUE
            )
        )
    lateness = [
        seconds
        for (seconds,) in postgres.execute(
            "SELECT last_late_s FROM schedules WHERE last_run_id IS NOT NULL"
        ).fetchall()
    ]
    assert len(lateness) == DUE
    assert min(lateness) >= 0
    assert postgres.execute("SELECT count(*) FROM runs").fetchone() == (DUE,)
    told(f"{DUE} of {SCHEDULES} schedules due at once", sorted(lateness))


def told(what: str, lateness: list[float]) -> None:
    """Shown by `-rP`. The figures are the machine's: none is asserted."""
    p50, p99 = (lateness[len(lateness) * part // 100] for part in (50, 99))
    sys.stderr.write(
        f"{what}: late by {p50:.3f} s (p50), {p99:.3f} s (p99), {lateness[-1]:.3f} s (most)\n"
    )
