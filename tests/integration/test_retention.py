"""Retention: what ended long ago goes, in small steps, and nothing else does."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from beatless import App, CannotRetry, EventsPruned, RunNotFound
from beatless.api.sse import Framing, chunks
from beatless.orchestrator.retention import REST_S, SHORT_REST_S, Retention
from beatless.outbox.backoff import Backoff
from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.observer import ChoreFailed, ChoreRested, ChoreStepped, ChoreTaken
from beatless.outbox.relay import Relay
from beatless.testing import Kit
from tests.integration.test_relay import Announcements

DAY = 86_400
QUICK = Backoff(initial=0.01, cap=0.05)


@pytest.fixture
def session(beatless_app: App) -> Iterator[psycopg.Connection]:
    with beatless_app.direct_connection() as found:
        yield found


@pytest.fixture
def retention(beatless_app: App) -> Callable[..., Retention]:
    def make(**options: Any) -> Retention:
        given = {"events_days": 30, "runs_days": 365, "faults": beatless_app.faults}
        return Retention(beatless_app.settings.schema, **given | options)

    return make


def finish(beatless: Kit, plan: str = "agents.run", **options: Any) -> str:
    run = beatless.start_run(plan, **options)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state.final
    return run.run_id


def exhaust(retention: Retention, session: psycopg.Connection) -> float:
    """Step until a step asks for a long rest."""
    for _ in range(1000):
        if (rest := retention.step(session)) >= SHORT_REST_S:
            return rest
    raise AssertionError("it never rests")


def stored(postgres: psycopg.Connection, run_id: str) -> list[int]:
    rows = postgres.execute(
        "SELECT seq FROM run_events WHERE run_id = %s ORDER BY seq", (run_id,)
    ).fetchall()
    return [seq for (seq,) in rows]


def test_the_events_of_a_run_that_ended_long_ago_go_and_the_run_stays(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    old = finish(beatless, key="order:1")
    beatless.advance(29 * DAY)
    recent = finish(beatless)
    assert exhaust(retention(), session) == REST_S
    assert len(stored(postgres, old)) == 13

    beatless.advance(1 * DAY + 1)
    exhaust(retention(), session)

    assert stored(postgres, old) == []
    assert len(stored(postgres, recent)) == 13
    run = beatless.client.get_run(old)
    assert (run.state, run.last_seq, run.pruned_seq) == ("completed", 13, 13)
    assert beatless.start_run("agents.run", key="order:1").run_id == old
    beatless.verify()


def test_a_pruned_run_is_no_dead_letter_and_can_be_cleaned(
    beatless: Kit, session, retention
) -> None:
    old = finish(beatless, "fatally")
    beatless.advance(30 * DAY + 1)
    exhaust(retention(), session)
    recent = finish(beatless, "fatally")

    started, refused = beatless.client.retry_failed(limit=1)

    assert [run.retry_of for run in started] == [recent]
    assert refused == []
    assert beatless.client.count_finished("failed", 30 * DAY) == (1, 0)
    assert beatless.client.clean("failed", 30 * DAY) == 1
    with pytest.raises(RunNotFound):
        beatless.client.get_run(old)


def test_what_asks_for_pruned_events_is_told_so(beatless: Kit, session, retention) -> None:
    run_id = finish(beatless)
    beatless.advance(31 * DAY)
    exhaust(retention(), session)
    client = beatless.client

    for ask in (
        lambda: client.events(run_id),
        lambda: client.events(run_id, from_seq=12),
        lambda: list(client.stream_run(run_id)),
    ):
        with pytest.raises(EventsPruned, match=f"of run {run_id} were removed after the retention"):
            ask()
    with pytest.raises(CannotRetry, match="start a new run"):
        client.retry_run(run_id)
    assert client.events(run_id, from_seq=13) == []
    assert list(client.stream_run(run_id, 13)) == []
    assert client.wait_for_run(run_id).state == "completed"
    told = [(moment.kind, moment.text) for moment in client.explain(run_id)]
    assert told[0] == ("pruned", "events 1 to 13 were removed after the retention time")


def test_an_unfinished_run_is_never_touched_however_old(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    far = beatless.start_run("two_steps", delay=9 * 365 * DAY).run_id
    failing = beatless.start_run("retries", {"failures": 1}).run_id
    running = beatless.start_run("two_steps").run_id
    beatless.step(failing)
    beatless.app.leases.claim(
        session, running, plan="two_steps", worker="somebody", first_step="first", dispatch=1
    )
    ended = finish_one(beatless)
    kept = {run_id: stored(postgres, run_id) for run_id in (far, failing, running)}
    assert all(kept.values())

    for _ in range(2):
        beatless.advance(400 * DAY)
        exhaust(retention(), session)

    assert {run_id: stored(postgres, run_id) for run_id in kept} == kept
    assert {run.run_id for run in beatless.client.list_runs()} == set(kept)
    assert ended not in kept
    beatless.verify()


def finish_one(beatless: Kit) -> str:
    run_id = beatless.start_run("two_steps").run_id
    while not beatless.client.get_run(run_id).state.final:
        beatless.step(run_id)
    return run_id


def test_a_long_run_goes_in_parts_and_every_part_leaves_a_true_picture(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    long, short = finish(beatless), finish(beatless, "two_steps")
    beatless.advance(31 * DAY)
    chore = retention(batch=5)

    chore.step(session)
    assert stored(postgres, long) == list(range(6, 14))
    assert [event.seq for event in beatless.client.events(long, 5)] == list(range(6, 14))
    with pytest.raises(EventsPruned, match="events from 6 on are kept") as raised:
        beatless.client.events(long, 4)
    assert (raised.value.after, raised.value.oldest) == (4, 6)
    # Its row's own time begins when all are gone.
    assert postgres.execute("SELECT count(pruned_at) FROM runs").fetchone() == (0,)
    beatless.verify()

    chore.step(session)
    chore.step(session)  # the last three of one run and the first two of the next
    assert (stored(postgres, long), stored(postgres, short)) == ([], [3, 4, 5, 6])
    beatless.verify()
    exhaust(chore, session)
    assert stored(postgres, short) == []


def test_a_pruned_run_goes_after_its_own_time_and_its_key_is_free_then(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    run_id = finish(beatless, "two_steps", key="order:2")
    postgres.execute(
        "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES ('event', %s, '', '{}')",
        (run_id,),
    )
    chore = retention(runs_days=10)
    beatless.advance(31 * DAY)
    exhaust(chore, session)
    beatless.advance(9 * DAY)
    exhaust(chore, session)
    assert beatless.client.get_run(run_id).pruned_seq == 6

    beatless.advance(1 * DAY + 1)
    exhaust(chore, session)

    with pytest.raises(RunNotFound):
        beatless.client.get_run(run_id)
    assert beatless.client.dead_letters() == []
    assert beatless.start_run("two_steps", key="order:2").run_id != run_id
    beatless.verify()


def test_one_line_in_the_log_tells_what_was_removed(
    beatless: Kit, session, retention, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        finish(beatless, "two_steps")
    beatless.advance(31 * DAY)
    caplog.set_level("INFO", "beatless.orchestrator.retention")
    chore = retention(batch=3, runs_days=1)
    exhaust(chore, session)
    beatless.advance(2 * DAY)
    exhaust(chore, session)
    exhaust(chore, session)
    assert [(record.events, record.runs) for record in caplog.records] == [(12, 0), (0, 2)]


def test_runs_are_kept_for_ever_if_asked(beatless: Kit, session, retention) -> None:
    run_id = finish(beatless, "two_steps")
    chore = retention(runs_days=0)
    beatless.advance(31 * DAY)
    exhaust(chore, session)
    beatless.advance(100_000 * DAY)
    assert exhaust(chore, session) == REST_S
    assert beatless.client.get_run(run_id).pruned_seq == 6


class TestKeptForEver:
    @pytest.fixture
    def beatless_settings(self) -> dict[str, Any]:
        return {"retention_days": 0}

    def test_a_retention_of_zero_gives_the_relay_nothing_to_do(self, beatless_app: App) -> None:
        assert beatless_app.chores() == []


def test_the_next_look_comes_when_something_is_due(beatless: Kit, session, retention) -> None:
    assert retention().step(session) == REST_S
    finish(beatless, "two_steps")
    beatless.advance(30 * DAY - 600)
    assert 500 < retention().step(session) <= 600
    beatless.advance(590)
    assert retention().step(session) == SHORT_REST_S


def test_runs_that_somebody_works_on_are_passed_over(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    busy, free = finish(beatless, "two_steps"), finish(beatless, "two_steps")
    beatless.advance(31 * DAY)
    chore = retention()
    with postgres.transaction():
        postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (busy,))
        assert exhaust(chore, session) == SHORT_REST_S
        assert (len(stored(postgres, busy)), stored(postgres, free)) == (6, [])
    exhaust(chore, session)
    assert stored(postgres, busy) == []


def test_a_crash_in_the_middle_of_a_batch_takes_it_back(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    run_id = finish(beatless)
    beatless.advance(31 * DAY)
    beatless.app.faults.arm("retention.pruned")
    with pytest.raises(SimulatedCrash):
        retention().step(session)
    assert len(stored(postgres, run_id)) == 13
    beatless.verify()
    exhaust(retention(), session)
    assert stored(postgres, run_id) == []


def test_a_batch_whose_commit_fails_is_done_again_and_counted_once(
    beatless: Kit,
    postgres: psycopg.Connection,
    session,
    retention,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = [finish(beatless, "two_steps") for _ in range(2)]
    beatless.advance(31 * DAY)
    postgres.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'not now'; END $$"
    )
    postgres.execute(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER UPDATE ON runs"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    caplog.set_level("INFO", "beatless.orchestrator.retention")
    chore = retention()
    with pytest.raises(psycopg.errors.RaiseException, match="not now"):
        chore.step(session)
    postgres.execute("DROP FUNCTION refuse CASCADE")

    exhaust(chore, session)

    assert [stored(postgres, run_id) for run_id in ended] == [[], []]
    assert [record.events for record in caplog.records] == [12]


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_batch_takes_it_back(
    beatless: Kit, postgres: psycopg.Connection, session, retention
) -> None:
    run_id = finish(beatless)
    beatless.advance(31 * DAY)
    code = """
import tests.plans
app = tests.plans.app
(chore,) = app.chores()
with app.direct_connection() as connection:
    chore.step(connection)
"""
    environ = os.environ | beatless.app.settings.to_env()
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env=environ | {"BEATLESS_FAULT": "retention.pruned@1:kill"},
        cwd=Path(__file__).parents[2],
    )
    assert killed.returncode == -signal.SIGKILL
    # Postgres may need a moment to notice; until then the run counts as one that is worked on.
    postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (run_id,))
    assert len(stored(postgres, run_id)) == 13

    exhaust(retention(), session)
    assert stored(postgres, run_id) == []
    beatless.verify()


# Watching while it goes


@pytest.fixture
def watched(beatless: Kit) -> str:
    """More events than a stream reads at once."""
    return finish(beatless, "traces", input={"traces": 600})


def is_a_part(seen: list[int], error: EventsPruned) -> bool:
    """The viewer has what it had, without a gap, and is told from where on it has nothing."""
    assert seen == list(range(1, len(seen) + 1))
    return 1 <= len(seen) < 603 and (error.after, error.oldest) == (len(seen), None)


def test_a_stream_that_is_overtaken_by_retention_says_so(
    beatless: Kit, watched: str, session, retention
) -> None:
    stream = beatless.client.stream_run(watched)
    seen = [next(stream).seq]
    beatless.advance(31 * DAY)
    exhaust(retention(), session)

    with pytest.raises(EventsPruned) as raised:
        seen.extend(event.seq for event in stream)

    assert is_a_part(seen, raised.value)


@pytest.mark.slow
def test_an_asynchronous_stream_that_is_overtaken_says_so_too(
    beatless: Kit, watched: str, session, retention
) -> None:
    seen: list[int] = []

    async def follow() -> None:
        try:
            async for event in beatless.client.astream_run(watched):
                seen.append(event.seq)
                if event.seq == 1:
                    beatless.advance(31 * DAY)
                    exhaust(retention(), session)
        finally:
            await beatless.app.streams.aclose()

    with pytest.raises(EventsPruned) as raised:
        asyncio.run(follow())
    assert is_a_part(seen, raised.value)


@pytest.mark.slow
def test_a_stream_over_http_ends_there_and_coming_again_tells_why(
    beatless: Kit, watched: str, session, retention
) -> None:
    run, text = beatless.client.get_run(watched), list[bytes]()
    pruned = False

    async def follow() -> None:
        nonlocal pruned
        stream = chunks(
            beatless.app.streams,
            run,
            Framing(beatless.app.redaction.text),
            lambda _chunk: False,
            epoch="e",
            after=0,
            reset=None,
        )
        async for chunk in stream:
            text.append(chunk)
            if b"id: e.1\n" in chunk:
                beatless.advance(31 * DAY)
                exhaust(retention(), session)
                pruned = True
        await beatless.app.streams.aclose()

    asyncio.run(follow())
    assert pruned
    _, *seen = map(int, re.findall(rb"id: e\.(\d+)\n", b"".join(text)))
    # What the server does with the viewer's Last-Event-ID; the answer is in test_api.
    with pytest.raises(EventsPruned) as raised:
        beatless.client.get_run(watched).require_events(seen[-1])
    assert is_a_part(seen, raised.value)


# The relay's timers


@pytest.fixture
def relay(beatless_app: App) -> Iterator[Callable[..., Announcements]]:
    """Starts relays that do their chores at once."""
    relays: list[Relay] = []

    def start(**options: Any) -> Announcements:
        announcements = Announcements()
        given = {"observer": announcements, "backoff": QUICK, "chores_after": 0.0}
        relays.append(beatless_app.relay(**given | options))
        relays[-1].start()
        return announcements

    yield start
    for started in relays:
        started.stop()


def test_the_relay_prunes_by_itself_and_goes_on_publishing(
    beatless: Kit, postgres: psycopg.Connection, relay, retention
) -> None:
    ended = [finish(beatless, "two_steps") for _ in range(3)]
    beatless.advance(31 * DAY)

    announcements = relay(chores=[retention(batch=4)])

    assert announcements.wait(ChoreRested) == ChoreRested(rest_s=REST_S)
    assert len(announcements.all(ChoreStepped)) == 5  # 18 events, 4 at once
    assert [stored(postgres, run_id) for run_id in ended] == [[], [], []]
    waiting = beatless.start_run("two_steps")
    beatless.wait_for_outbox_flush(waiting.run_id)
    beatless.verify()


def test_the_relay_of_an_app_prunes_by_default(
    beatless: Kit, postgres: psycopg.Connection, relay
) -> None:
    run_id = finish(beatless, "two_steps")
    beatless.advance(31 * DAY)
    relay().wait(ChoreRested)
    assert stored(postgres, run_id) == []


class Held:
    """A chore that takes as long as the test wants."""

    def __init__(self) -> None:
        self.steps = 0
        self.begun, self.go = threading.Event(), threading.Event()

    def step(self, connection: psycopg.Connection) -> float:
        self.steps += 1
        self.begun.set()
        assert self.go.wait(60)
        return 60.0


def test_a_step_in_a_frozen_process_is_taken_back_by_postgres(relay) -> None:
    class Asking:
        def step(self, connection: psycopg.Connection) -> float:
            names = "idle_in_transaction_session_timeout", "idle_session_timeout", "lock_timeout"
            self.found = [connection.execute(f"SHOW {name}").fetchone()[0] for name in names]
            return 60.0

    chore = Asking()
    relay(chores=[chore]).wait(ChoreRested)
    assert chore.found == ["10s", "10s", "1s"]


def test_a_chore_of_a_process_frozen_between_two_steps_is_free_for_others(
    beatless_app: App, relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beatless.outbox.chores.IDLE_TIMEOUT_S", 0.1)
    chore = Held()
    relay(chores=[chore])
    try:
        assert chore.begun.wait(60)
        with beatless_app.executors.connect() as other:
            other.execute("SET lock_timeout = '60s'")
            other.execute(f"SELECT pg_advisory_lock({beatless_app.queries.chore_key}, 0)")
    finally:
        chore.go.set()


def test_of_two_relays_one_does_the_chore(beatless: Kit, relay) -> None:
    chore = Held()
    relay(chores=[chore])
    try:
        assert chore.begun.wait(60)
        relay(chores=[chore]).wait(ChoreTaken)
        assert chore.steps == 1
        # And nobody's drains wait for it.
        run = beatless.start_run("two_steps")
        beatless.wait_for_outbox_flush(run.run_id)
    finally:
        chore.go.set()


def test_a_chore_that_fails_is_tried_again_and_stops_nothing(beatless: Kit, relay) -> None:
    class Failing:
        def step(self, connection: psycopg.Connection) -> float:
            raise ValueError("on purpose")

    announcements = relay(chores=[Failing()])
    assert announcements.wait(ChoreFailed) == ChoreFailed(error="on purpose")
    run = beatless.start_run("two_steps")
    beatless.wait_for_outbox_flush(run.run_id)
