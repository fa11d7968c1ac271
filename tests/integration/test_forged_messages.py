"""Who may reach the broker, Redis or NOTIFY and nothing else: it costs latency at most."""

import json
from contextlib import closing
from typing import Any

import psycopg
import pytest
from celery import Celery

from beatless import App, Plan, RunState, Snooze, StepContext, step
from beatless.outbox.backoff import Backoff
from beatless.outbox.doorbell import MEMBERS_CHANGED
from beatless.outbox.observer import Drained, RelayFailed, RelayStarted, ShardsAssigned, Signal
from beatless.outbox.publishers import worker_queue
from beatless.outbox.queries import LAST_ATTEMPT
from beatless.streams.observer import Backfilled
from beatless.testing import Kit
from tests.integration.test_relay import Announcements, running
from tests.plans import two_steps


@step
def charge(ctx: StepContext) -> str:
    return "charged"


@step
def refund(ctx: StepContext) -> str:
    return "refunded"


@step
def doze(ctx: StepContext) -> Snooze:
    return Snooze(60)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("charge", [charge]), Plan("refund", [refund]), Plan("doze", [doze])]


def forge(app: App, task: str, *args: Any, **kwargs: Any) -> None:
    queue = worker_queue(app.settings.prefix, "default")
    # Our own refuses it; who can write to the broker asks nobody.
    Celery.send_task(app.celery, task, args=args, kwargs=kwargs, queue=queue, task_id="forged")


def test_a_forged_message_runs_no_run_by_another_plan(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("charge")
    forge(beatless_app, "refund", run.run_id, 1)

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == "charged"
    beatless.verify()


@pytest.mark.parametrize("number", [LAST_ATTEMPT, 2**63, 2**200, -5, 10**6])
def test_a_forged_number_moves_that_of_the_next_message_by_one_at_most(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, number: int
) -> None:
    run = beatless.start_run("doze")
    forge(beatless_app, "doze", run.run_id, number)
    assert beatless._execute(beatless._inbox.take())
    assert postgres.execute("SELECT attempts FROM dispatches").fetchone()[0] in (0, 1)

    other = beatless.start_run("charge")
    beatless.work_until_idle()

    assert beatless.client.get_run(other.run_id).state is RunState.COMPLETED


@pytest.mark.parametrize(
    "args",
    [(), (None, None), ("a\0b", 1), ("\ud800", 1), ([1], 1), ("r", "1")],
)
def test_a_forged_message_that_is_none_of_a_relay_is_dropped(
    beatless_app: App, caplog: pytest.LogCaptureFixture, args: tuple[Any, ...]
) -> None:
    beatless_app.celery.tasks["charge"].run(*args, and_more=1)
    assert "not one of a relay's" in caplog.text


FORGED = ["{", "{}", '{"ping": []}', '{"ping": 1}', "[1]", "null", '{"":' * 1900, "\x01", "99"]


def test_a_forged_notification_restarts_no_relay(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    with running(beatless_app) as (_, announcements):
        for payload in (*FORGED, "relay"):
            postgres.execute("SELECT pg_notify(%s, %s)", (beatless_app.queries.channel, payload))
            run = beatless.start_run("charge")
            beatless.wait_for_outbox_flush(run.run_id)
    assert announcements.all(RelayFailed) == []
    assert len(announcements.all(RelayStarted)) == 1


def test_a_relay_that_is_told_of_others_without_end_drains_all_the_same(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """Each piece of news has it count the relays anew, which must not be all that it does."""

    class Flooding(Announcements):
        def __call__(self, signal: Signal) -> None:
            super().__call__(signal)
            if isinstance(signal, ShardsAssigned) and len(self.all(Drained)) < 3:
                postgres.execute("SELECT pg_notify(%s, %s)", (channel, MEMBERS_CHANGED))

    channel, announcements = beatless_app.queries.channel, Flooding()
    relay = beatless_app.relay(observer=announcements, backoff=Backoff(initial=0.01, cap=0.05))
    relay.start()
    for _ in range(3):
        run = beatless.start_run("charge")
        beatless.wait_for_outbox_flush(run.run_id)
    relay.stop()


def test_forged_events_of_a_far_seq_do_not_have_the_journal_read_without_pause(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(
        beatless.client._streams,
        "_observer",
        lambda signal: read.append(signal.reason) if isinstance(signal, Backfilled) else None,
    )
    run = beatless.start_run("charge")
    stream = beatless.client.stream_run(run.run_id, timeout=60)
    assert next(stream).type == "RunStarted"
    channel = beatless.client._streams.channel(run.run_id)
    with closing(beatless_app.redis()) as client:
        for seq in range(1000, 1200):
            event = {"run_id": run.run_id, "seq": seq, "ts": 1, "type": "DebugTrace", "v": 1}
            client.publish(channel, json.dumps(event | {"source": "worker"}))
    beatless.work_until_idle()

    assert list(stream)[-1].type == "RunFinished"
    assert read.count("gap") <= 4


GARBAGE = (
    b"garbage",
    b"{}",
    b'{"body": 1, "headers": {}, "properties": {}}',
    b"[]",
    b"\xff",
    b"null",
)


class TestGarbage:
    @pytest.fixture
    def beatless_plans(self) -> list[Plan]:
        return [two_steps]

    @pytest.mark.long
    def test_what_is_no_message_ends_no_worker(self, beatless: Kit, beatless_app: App) -> None:
        beatless.relay_process("tests.plans:app")
        worker = beatless.worker_process("tests.plans:app")
        with beatless_app._broker() as broker:
            for garbage in GARBAGE:
                broker.default_channel.client.lpush(
                    f"{beatless_app.settings.prefix}.default", garbage
                )
        run = beatless.start_run("two_steps")
        beatless.wait_for_run_completion(run.run_id, timeout=60)
        assert worker.alive
