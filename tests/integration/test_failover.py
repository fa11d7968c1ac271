"""After a failover or a restore nobody is left with events that are not there any more."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from queue import Queue

import psycopg
import pytest

from beatless import App, Event, HistoryChanged
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.privileges import server_user
from beatless.migrations import migrate
from beatless.outbox.observer import Observer, Signal, ignore
from beatless.streams.observer import Backfilled, StreamClosed
from beatless.streams.streams import Streams
from beatless.testing import Kit
from tests.serving import serving
from tests.valkeys import until


def following(app: App, head_check: float = 0.02, observer: Observer = ignore) -> Streams:
    """Streams that look often."""
    return Streams(
        journal=app.journal,
        engine=app.engine.execution_options(isolation_level="AUTOCOMMIT"),
        redis_client=app.redis,
        aredis_client=app.aredis,
        prefix=app.settings.prefix,
        head_check=head_check,
        without_redis=head_check,
        observer=observer,
    )


def go_back(kit: Kit, run_id: str, seq: int) -> None:
    """The events after this one were lost in a failover, and nobody has published them since."""
    schema = kit.app.settings.schema
    with kit.app.engine.begin() as connection:
        for statement in (
            f"DELETE FROM {schema}.run_events WHERE run_id = '{run_id}' AND seq > {seq}",
            f"DELETE FROM {schema}.run_outbox WHERE run_id = '{run_id}'",
            (
                f"UPDATE {schema}.runs SET last_seq = {seq}, state = 'queued', attempt = 0, "
                f"started_at = NULL, lease_token = 0 WHERE run_id = '{run_id}'"
            ),
        ):
            connection.exec_driver_sql(statement)


async def first(events: AsyncIterator[Event], count: int) -> list[int]:
    return [(await anext(events)).seq for _ in range(count)]


def test_a_stream_whose_events_are_gone_ends_with_an_error(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)
    stream = following(beatless.app).follow(run, 0)
    assert [next(stream).seq for _ in range(3)] == [1, 2, 3]

    go_back(beatless, run.run_id, 1)

    with pytest.raises(HistoryChanged, match="since event 3"):
        next(stream)


def test_an_async_stream_whose_events_are_gone_ends_with_an_error(beatless: Kit) -> None:
    run, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    beatless.step(run.run_id)
    streams = following(beatless.app)

    async def main() -> None:
        stream, untouched = streams.afollow(run, 0), streams.afollow(other, 0)
        assert await first(stream, 3) == [1, 2, 3]
        assert await first(untouched, 1) == [1]
        await asyncio.to_thread(go_back, beatless, run.run_id, 1)
        with pytest.raises(HistoryChanged, match="since event 3"):
            await anext(stream)
        await asyncio.to_thread(beatless.work_until_idle)
        assert [event.seq async for event in untouched] == [2, 3, 4, 5, 6]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_wait_ends_with_the_run_in_whichever_history(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)
    opened: Queue[Signal] = Queue()

    def observe(signal: Signal) -> None:
        if isinstance(signal, Backfilled | StreamClosed):
            opened.put(signal)

    client = beatless.app.client_for("default")
    client._streams = following(beatless.app, observer=observe)
    with ThreadPoolExecutor(1) as waiting:
        result = waiting.submit(client.wait_for_run, run.run_id, 300)
        assert isinstance(opened.get(timeout=60), Backfilled)
        go_back(beatless, run.run_id, 1)
        while opened.get(timeout=60) != StreamClosed():
            pass
        beatless.work_until_idle()
        assert result.result(60).result == "one two"


def test_a_cursor_of_events_that_are_gone_gets_a_reset(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)
    epoch = beatless.client.epoch()
    go_back(beatless, run.run_id, 1)
    with serving(beatless.app) as api:
        path = f"/v1/runs/{run.run_id}/stream"
        with api.stream(path, Last_Event_ID=f"{epoch}.3") as stream:
            assert [next(stream).get("event") for _ in range(3)] == [None, "reset", "RunStarted"]
        assert api("GET", f"{path}?from_seq=3").status == 409


@contextmanager
def primary_and_standby(
    folder: Path, through: Callable[[int], AbstractContextManager[int]] = nullcontext
) -> Iterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A primary, and a standby that follows it, by the port that `through` makes of its own.

    A connection between them that carries nothing is never replaced by another.
    """
    settings = {"fsync": "off", "wal_sender_timeout": "0", "wal_receiver_timeout": "0"}
    primary = EmbeddedPostgres(folder / "one", settings=settings)
    with primary:
        pass
    shutil.copytree(primary.directory, folder / "two")
    with primary, through(primary.port) as port:
        way = f"host=127.0.0.1 port={port} user=postgres password={primary.password}"
        standby = EmbeddedPostgres(folder / "two", settings=settings | {"primary_conninfo": way})
        (standby.cluster / "standby.signal").touch()
        if (owner := server_user().owner) is not None:
            for path in (standby.cluster, *standby.cluster.rglob("*")):
                os.chown(path, *owner)
        with standby:
            yield primary, standby


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    with primary_and_standby(tmp_path) as found:
        yield found


def catch_up(primary: EmbeddedPostgres) -> None:
    """Returns once the standby has replayed all that the primary has committed."""
    with psycopg.connect(primary.url, autocommit=True) as session:

        def replayed() -> bool:
            rows = session.execute(
                "SELECT replay_lsn >= pg_current_wal_flush_lsn() FROM pg_stat_replication"
            )
            return rows.fetchone() == (True,)

        until(replayed)


def fail_over(primary: EmbeddedPostgres, standby: EmbeddedPostgres) -> None:
    """The primary is lost; all that it has committed is on the standby, which takes its place."""
    catch_up(primary)
    primary.crash()
    with psycopg.connect(standby.url, autocommit=True) as session:
        assert session.execute("SELECT pg_promote()").fetchone() == (True,)


@pytest.mark.slow
def test_a_standby_that_takes_over_is_another_epoch_from_its_first_moment(
    beatless_app: App, tmp_path: Path, pair: tuple[EmbeddedPostgres, EmbeddedPostgres]
) -> None:
    primary, standby = pair
    both = primary.url.replace(f":{primary.port}/", f":{primary.port},127.0.0.1:{standby.port}/")
    settings = replace(
        beatless_app.settings,
        database_url=both,
        listen_url="",
    )
    kit = Kit(App(settings, list(beatless_app.plans.values())), directory=tmp_path)
    migrate(kit.app.engine, kit.app.settings.schema)
    run = kit.start_run("two_steps")
    before = kit.client.epoch()
    catch_up(primary)
    with psycopg.connect(standby.url) as session:
        assert kit.app.journal.epoch(session)[0] == before
    stream = following(kit.app).follow(run, 0)
    assert next(stream).seq == 1
    quiet = following(kit.app, head_check=0.5)

    async def main() -> None:
        astream = quiet.afollow(run, 0)
        assert await first(astream, 1) == [1]
        await asyncio.to_thread(fail_over, primary, standby)
        assert await asyncio.to_thread(kit.client.epoch) != before
        with pytest.raises(HistoryChanged, match="since event 1"):
            await anext(astream)

    with ThreadPoolExecutor(1) as waiting, serving(kit.app) as api:
        result = waiting.submit(kit.client.wait_for_run, run.run_id, 300)
        asyncio.run(asyncio.wait_for(main(), 300))
        after = kit.client.epoch()
        assert after.rpartition("t") == (before.rpartition("t")[0], "t", "2")
        with pytest.raises(HistoryChanged, match="since event 1"):
            next(stream)
        with api.stream(f"/v1/runs/{run.run_id}/stream", Last_Event_ID=f"{before}.1") as viewer:
            assert [next(viewer).get("event") for _ in range(3)] == [None, "reset", "RunStarted"]
        kit.work_until_idle()
        assert result.result(60).result == "one two"
    kit.close()
