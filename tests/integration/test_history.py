"""Which history events are of: a restored schema is another, and so is another database's."""

import itertools
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import monotonic

import psycopg
import pytest
from sqlalchemy import make_url

from beatless import App, HistoryChanged
from beatless.doctor import Doctor, Status
from beatless.migrations import migrate
from beatless.outbox.backoff import Backoff
from beatless.streams.streams import Streams
from beatless.testing import Kit
from tests.serving import serving

RESTORES = {
    "as a new table": """
ALTER TABLE history RENAME TO old; CREATE TABLE history (LIKE old);
INSERT INTO history TABLE old; DROP TABLE old""",
    "into an emptied table": """
CREATE TEMP TABLE kept AS TABLE history; TRUNCATE history; INSERT INTO history TABLE kept""",
    "over what was deleted": """
CREATE TEMP TABLE kept AS TABLE history; DELETE FROM history; INSERT INTO history TABLE kept""",
}
"""What pg_dump and pg_restore leave in the same cluster."""


def patient(app: App) -> Streams:
    """Streams that look into the journal, once they have begun, only for what they missed."""
    return Streams(
        journal=app.journal,
        engine=app.engine.execution_options(isolation_level="AUTOCOMMIT"),
        redis_client=app.redis,
        aredis_client=app.aredis,
        prefix=app.settings.prefix,
        head_check=60,
    )


@pytest.mark.parametrize("how", RESTORES)
def test_a_dump_that_is_restored_is_another_history(
    beatless: Kit, postgres: psycopg.Connection, how: str
) -> None:
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    epoch = beatless.client.epoch()
    stream = beatless._streams.follow(run, 0, timeout=60)
    assert next(stream).seq == 1

    postgres.execute(RESTORES[how].encode())

    assert beatless.client.epoch() != epoch
    with serving(beatless.app) as api:
        path = f"/v1/runs/{run.run_id}/stream"
        with api.stream(path, Last_Event_ID=f"{epoch}.1") as viewer:
            assert "reset" in [next(viewer).get("event") for _ in range(2)]
    with pytest.raises(HistoryChanged):
        next(stream)


def test_a_stream_that_is_told_to_begins_anew_in_another_history(
    beatless: Kit, postgres: psycopg.Connection, monkeypatch
) -> None:
    monkeypatch.setattr(beatless.app.streams, "_head_check", 0.1)
    run = beatless.start_run("two_steps")
    resets: list[bool] = []
    stream = beatless.client.stream_run(
        run.run_id, timeout=60, on_reset=lambda: resets.append(True)
    )
    assert next(stream).seq == 1
    postgres.execute(next(iter(RESTORES.values())).encode())
    beatless.work_until_idle()
    assert [event.seq for event in stream] == [1, 2, 3, 4, 5, 6]
    assert resets == [True]


def test_a_viewer_who_comes_after_a_restore_is_shown_events_as_they_are_published(
    beatless: Kit, postgres: psycopg.Connection, monkeypatch
) -> None:
    run = beatless.start_run("two_steps")
    path = f"/v1/runs/{run.run_id}/stream"
    with serving(beatless.app) as api:
        streams = api.state.services.now().streams
        # Only what Redis brings is shown, but for the first look into the journal.
        for name, seconds in ("_head_check", 3600), ("_without_redis", 3600), ("_patience", 60):
            monkeypatch.setattr(streams, name, seconds)
        with api.stream(path) as viewer:
            assert of_events(viewer, 1) == [1]
        postgres.execute(next(iter(RESTORES.values())).encode())
        with api.stream(path) as viewer:
            assert of_events(viewer, 1) == [1]
            beatless.client.epoch()
            channel = beatless.app.streams.channel(run.run_id)
            with beatless.app.redis() as client:
                assert client.pubsub_numsub(channel) == [(channel.encode(), 1)]
            beatless.work_until_idle()
            assert of_events(viewer, 5) == [2, 3, 4, 5, 6]


def of_events(viewer: Iterator[dict[str, str]], count: int) -> list[int]:
    """The seqs of a viewer's next events."""
    frames = (frame for frame in viewer if "data" in frame)
    return [json.loads(frame["data"])["seq"] for frame in islice(frames, count)]


def test_maintenance_of_the_table_is_no_other_history(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    epoch = beatless.client.epoch()
    for command in ("VACUUM", "VACUUM FREEZE", "VACUUM FULL", "ANALYZE", "REINDEX TABLE"):
        postgres.execute(f"{command} history".encode())
    assert beatless.client.epoch() == epoch


def test_a_snapshot_that_is_restored_beneath_a_living_process_is_noticed(beatless: Kit) -> None:
    client, origin = beatless.client, beatless.app.streams._origin
    epoch = client.epoch()
    assert client.epoch() == epoch
    origin._flushed += 1_000_000  # as if the database had been so far before

    renewed = client.epoch()

    assert renewed != epoch
    assert client.epoch() == renewed


def test_a_relay_notices_by_the_way_that_its_history_was_renewed(beatless: Kit) -> None:
    app = beatless.app
    relay = app.relay(watchdog=0.1, backoff=Backoff(initial=0.01, cap=0.1))
    relay.start()
    try:
        first = beatless.start_run("two_steps")
        beatless.wait_for_outbox_flush(first.run_id)
        with app.engine.begin() as connection:
            app.journal.renew(connection)
        streams = patient(app)
        channel = streams.channel("live")
        with app.redis() as client, client.pubsub(ignore_subscribe_messages=True) as ear:
            ear.subscribe(channel)
            ear.get_message(timeout=60)
            until = monotonic() + 60
            for number in itertools.count():
                assert monotonic() < until, "the relay goes on to publish for the old history"
                beatless.client.start_run("two_steps", run_id=f"other-{number}")
                app.client.epoch()
                ear.psubscribe(streams.channel("other-*"))
                if ear.get_message(timeout=0.2):
                    return
    finally:
        relay.stop()


@contextmanager
def other_database(app: App, directory: Path) -> Iterator[Kit]:
    """The same app on another database of the server, with the same Redis, prefix and schema."""
    name = f"t_{uuid.uuid4().hex[:8]}"
    url = make_url(app.settings.database_url)
    admin = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        there = url.set(database=name, query={}).render_as_string(hide_password=False)
        settings = replace(app.settings, database_url=there, listen_url=there)
        kit = Kit(App(settings, list(app.plans.values())), directory=directory)
        try:
            migrate(kit.app.engine, settings.schema)
            yield kit
        finally:
            kit.close()
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_two_databases_with_one_redis_never_show_each_others_events(
    beatless: Kit, tmp_path: Path
) -> None:
    with other_database(beatless.app, tmp_path) as production:
        staging = beatless
        mine = staging.client.start_run("two_steps", {"of": "staging"}, run_id="order-7")
        staging.drain_outbox_once()
        streams = patient(staging.app)
        stream = streams.follow(mine, 0, timeout=60)
        assert next(stream).seq == 1

        production.client.start_run("two_steps", {"of": "production"}, run_id="order-7")
        production.drain_outbox_once()
        while production.step("order-7"):
            production.drain_outbox_once()
        assert production.client.get_run("order-7").state.final

        while staging.step("order-7"):
            staging.drain_outbox_once()
        seen = list(stream)
        assert seen == staging.client.events("order-7", 1)
        assert seen != production.client.events("order-7", 1)
        assert streams.channel("r") != production.app.streams.channel("r")


def test_an_event_of_another_run_is_not_believed(beatless: Kit) -> None:
    mine = beatless.start_run("two_steps")
    streams = patient(beatless.app)
    stream = streams.follow(mine, 0, timeout=60)
    assert next(stream).seq == 1
    with beatless.app.redis() as client:
        client.publish(
            streams.channel(mine.run_id),
            b'{"run_id":"other","seq":2,"ts":1,"type":"RunFinished","v":1,"source":"worker"}',
        )
    beatless.work_until_idle()
    assert [event.run_id for event in stream] == [mine.run_id] * 5


def test_doctor_names_a_broker_that_two_databases_share(beatless: Kit, tmp_path: Path) -> None:
    beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    for finding in Doctor(beatless.app).examine(("shared broker",)):
        assert finding.status is Status.OK
    with other_database(beatless.app, tmp_path) as other:
        other.start_run("two_steps", run_id="theirs")
        other.drain_outbox_once()
        for finding in Doctor(beatless.app).examine(("shared broker",)):
            assert finding.status is Status.WARNING
            assert "1 of 2 waiting messages" in finding.text
            assert "theirs" in finding.text
