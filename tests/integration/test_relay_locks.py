"""Rows that somebody else's transaction holds: they wait, and nobody else does."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from beatless import App
from beatless.client import RunRequest
from beatless.outbox.backoff import Backoff
from beatless.outbox.errors import PublishFailed
from beatless.outbox.observer import RelayAsleep, RelayFailed
from beatless.testing import Kit
from tests.integration.test_relay import (
    Announcements,
    Door,
    doors,
    lose_messages,
    pending,
    recording,
    seqs,
    tasks_of,
    until,
)

__all__ = ["doors"]

SENT = "SELECT run_id FROM dispatches WHERE state = 'sent'"


@contextmanager
def holding(app: App, table: str, run_ids: list[str]) -> Iterator[psycopg.Transaction]:
    """Another transaction has written these runs' rows, and stays open."""
    with (
        app.direct_connection() as other,
        other.transaction() as transaction,
    ):
        other.execute(f"SET LOCAL search_path TO {app.settings.schema}")
        other.execute(f"SELECT FROM {table} WHERE run_id = ANY(%s) FOR UPDATE".encode(), (run_ids,))
        yield transaction
        raise psycopg.Rollback(transaction)


def test_a_cancel_in_an_open_transaction_holds_up_no_other_run(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    held = beatless.start_run("two_steps")
    others = [beatless.start_run("two_steps") for _ in range(5)]
    relay = recording(beatless_app, doors)
    with beatless_app.engine.connect() as caller:
        caller.begin()
        beatless.client.cancel_run(held.run_id, connection=caller)
        for _ in range(3):
            relay.drain_once()

        assert pending(postgres) == 0
        assert {row[0] for row in postgres.execute(SENT)} == {run.run_id for run in others}
        assert len(doors[1].messages) == 6  # what is held is not sent again and again
        caller.rollback()
    relay.drain_once()
    relay.stop()

    # Who took its first message may have waited for the row and given up.
    assert [message.run_id for message in doors[1].messages[6:]] == [held.run_id]
    assert len(postgres.execute(SENT).fetchall()) == 6
    assert beatless.work_until_idle() > 0
    beatless.verify()


def test_runs_that_are_held_take_nobodys_place_in_the_window(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    requests = [RunRequest(plan="two_steps", priority=9)] * 100
    held = [run.run_id for run in beatless.client.start_runs(requests)]
    others = beatless.client.start_runs([RunRequest(plan="two_steps")] * 10)
    relay = recording(beatless_app, doors)
    with holding(beatless_app, "dispatches", held):
        relay.drain_once()
        relay.drain_once()

        sent = sorted(row[0] for row in postgres.execute(SENT))
        assert sent == sorted(run.run_id for run in others)
        assert len(doors[1].messages) == 64 + 10  # the first batch, and none of them since
    relay.stop()


def test_a_lease_that_has_run_out_is_taken_over_when_its_row_is_free(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    """A rollback rings nobody, and a row that is due has no time by which a relay would look."""
    dead = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    postgres.execute("UPDATE dispatches SET state = 'running', reason = 'lease', due_at = now()")
    announcements = Announcements()
    relay = recording(beatless_app, doors, observer=announcements, watchdog=600)
    with holding(beatless_app, "dispatches", [dead.run_id]):
        relay.start()
        announcements.wait(RelayAsleep)
        announcements.wait_until(lambda seen: tasks_of(seen) >= 1)
        sent = tasks_of(announcements.seen)
    announcements.wait_until(lambda seen: tasks_of(seen) > sent)
    until(lambda: len(postgres.execute(SENT).fetchall()) == 1)
    relay.stop()
    assert announcements.all(RelayFailed) == []


def test_an_event_whose_outbox_row_is_held_is_published_once_and_forgotten_later(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    held, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    with holding(beatless_app, "run_outbox", [held.run_id]):
        for _ in range(3):
            relay.drain_once()
        later = beatless.start_run("two_steps")
        relay.drain_once()
        assert pending(postgres) == 1
    relay.drain_once()
    relay.stop()

    assert seqs(doors[0]) == {run.run_id: [1] for run in (held, other, later)}
    assert pending(postgres) == 0


def test_a_broker_that_is_back_gets_what_it_lost_though_a_run_is_held(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    held, lost = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    relay = recording(beatless_app, doors, backoff=Backoff(initial=0, cap=0))
    relay.drain_once()
    doors[1].error = PublishFailed("the broker", "restarted empty")
    lose_messages(beatless_app)
    new = beatless.start_run("two_steps")
    relay.drain_once()
    doors[1].error = None
    with holding(beatless_app, "dispatches", [held.run_id]):
        relay.drain_once()
    relay.stop()

    sent = sorted((message.run_id, message.attempt) for message in doors[1].messages[2:])
    assert sent == sorted([(lost.run_id, 2), (new.run_id, 1)])


def test_a_run_that_is_free_again_in_a_paused_queue_is_not_looked_at(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door]
) -> None:
    run = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    with holding(beatless_app, "dispatches", [run.run_id]):
        relay.drain_once()
        relay.drain_once()
        drain = relay._once[1]
        assert drain.tasks.rows_held
        beatless.client.pause_queue("default")
    relay.drain_once()
    assert not drain.tasks.rows_held
    relay.stop()
