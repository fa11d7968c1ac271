"""Retention at full haste beside runs that are started, streamed, read and verified."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from beatless import App, EventsPruned, RunNotFound
from beatless.cli.demo import GOLDEN, without_handbacks
from beatless.orchestrator.events import Event
from beatless.orchestrator.retention import Retention
from beatless.testing import Kit
from beatless.verify import verify

FOLLOWERS, EACH = 6, 20


def types(events: list[Event]) -> list[str]:
    return [event.type for event in without_handbacks(events)]


@pytest.mark.long
def test_retention_takes_nothing_that_is_alive_and_leaves_nothing_that_is_not(
    beatless: Kit, beatless_app: App
) -> None:
    beatless.relay_process("tests.plans:app")
    beatless.worker_process("tests.plans:app", concurrency=2)
    # Events go an hour after the end of their run, its row a moment later. A run ends an hour ago
    # when it was followed to its end, however slowly.
    options = {"events_days": 1 / 24, "runs_days": 0.2 / 86_400, "batch": 50}
    stopping = threading.Event()

    def prune() -> None:
        retention = Retention(beatless_app.settings.schema, **options)
        with beatless_app.direct_connection() as session:
            while not stopping.wait(min(0.1, retention.step(session))):
                pass

    def follow(number: int) -> None:
        oldest = None
        for n in range(EACH):
            run = beatless.client.start_run("agents.run", run_id=f"follow-{number}-{n}")
            stream = beatless.client.stream_run(run.run_id, timeout=60)
            assert types(list(stream)) == GOLDEN
            with beatless_app.engine.begin() as connection:
                connection.exec_driver_sql(
                    f"UPDATE {beatless_app.settings.schema}.run_events"
                    f" SET ts = ts - interval '1 hour' WHERE run_id = '{run.run_id}'"
                )
            # All of it, a part that is named as such, or nothing: never a silent gap.
            oldest = oldest or run.run_id
            with suppress(EventsPruned):
                try:
                    assert types(beatless.client.events(oldest)) == GOLDEN
                except RunNotFound:
                    oldest = None

    try:
        with ThreadPoolExecutor(FOLLOWERS + 2) as threads:
            pruners = [threads.submit(prune) for _ in range(2)]
            followers = [threads.submit(follow, number) for number in range(FOLLOWERS)]
            try:
                while not all(follower.done() for follower in followers):
                    with beatless_app.engine.connect() as connection:
                        found = verify(connection, beatless_app.settings.schema)
                    assert [str(violation) for violation in found] == []
                    stopping.wait(0.3)
                for follower in followers:
                    follower.result()
            finally:
                stopping.set()
            for pruner in pruners:
                pruner.result()
    finally:
        stopping.set()

    beatless.advance(3601)
    with beatless_app.direct_connection() as session:
        retention = Retention(beatless_app.settings.schema, **options)
        while beatless.client.list_runs(limit=1):
            retention.step(session)
            beatless.advance(10)
    beatless.verify()
