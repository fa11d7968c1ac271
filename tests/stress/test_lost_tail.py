"""A failover that loses the last commits: what is left is whole, and goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from beatless import App, HistoryChanged, RunState
from beatless.cli.demo import without_handbacks
from beatless.client import RunRequest
from beatless.migrations import migrate
from beatless.orchestrator.errors import RunNotFound
from beatless.testing import Kit
from tests.integration.test_failover import catch_up, following, primary_and_standby
from tests.plans import TWO_STEPS
from tests.proxy import Proxy, proxy

APP = "tests.plans:app"
RUNS = 20


@pytest.mark.long
def test_a_failover_that_loses_the_last_commits_costs_nothing_else(
    beatless_app: App, tmp_path: Path
) -> None:
    """Runs that were executed in the lost time are executed again; those started in it are gone."""
    ways: list[Proxy] = []

    @contextmanager
    def through(port: int) -> Iterator[int]:
        with proxy(port) as way:
            ways.append(way)
            yield way.port

    with primary_and_standby(tmp_path, through) as (primary, standby):
        both = primary.url.replace(
            f":{primary.port}/", f":{primary.port},127.0.0.1:{standby.port}/"
        )
        settings = replace(
            beatless_app.settings,
            database_url=both,
            listen_url="",
            lease_seconds=300,
            redispatch_seconds=2,
        )
        kit = Kit(App(settings, list(beatless_app.plans.values())), directory=tmp_path)
        migrate(kit.app.engine, settings.schema)
        client = kit.client
        relay, worker = kit.relay_process(APP), kit.worker_process(APP)
        before = client.epoch()
        client.pause_queue("default")
        kept = client.start_runs([RunRequest(plan="two_steps") for _ in range(RUNS)])
        catch_up(primary)

        ways[0].hold()  # from here on the standby learns nothing
        client.resume_queue("default")
        lost = client.start_runs([RunRequest(plan="two_steps", key=str(n)) for n in range(RUNS)])
        waiting = client.start_run("two_steps", queue="nobody", key="waiting")
        for run in [*kept, *lost]:
            assert kit.wait_for_run_completion(run.run_id).state is RunState.COMPLETED
        stream = following(kit.app).follow(waiting, 0)
        assert next(stream).seq == 1

        primary.crash()
        with psycopg.connect(standby.url, autocommit=True) as session:
            assert session.execute("SELECT pg_promote()").fetchone() == (True,)

        with pytest.raises((HistoryChanged, RunNotFound)):
            next(stream)
        assert client.epoch() != before
        for run in [*lost, waiting]:
            with pytest.raises(RunNotFound):
                client.get_run(run.run_id)
        for run in kept:
            assert client.get_run(run.run_id).state is RunState.QUEUED
        client.resume_queue("default")  # which was lost, too
        again = client.start_runs([RunRequest(plan="two_steps", key=str(n)) for n in range(RUNS)])
        for run in [*kept, *again]:
            assert kit.wait_for_run_completion(run.run_id).result == "one two"
            events = without_handbacks(list(client.stream_run(run.run_id, timeout=60)))
            assert [event.type for event in events] == TWO_STEPS
        kit.verify()
        assert relay.alive
        assert worker.alive
        kit.close()
