"""What the calls of the test kit do: their counts, time, namespaces, other tasks, and waits."""

import logging
import re
from contextlib import closing
from typing import Any

import psycopg
import pytest

from beatless import App, Plan, RunState, step
from beatless.auth import Scope, Tokens
from beatless.orchestrator.errors import RunNotFound
from beatless.outbox.faults import POINTS
from beatless.outbox.publishers import worker_queue
from beatless.outbox.relay import Relay
from beatless.streams.streams import Streams
from beatless.testing import Kit

APP = "tests.plans:app"


class TestTheOutbox:
    def test_a_row_with_several_events_is_not_flushed_up_to_its_first(self, beatless: Kit):
        run = beatless.start_run("two_steps")
        beatless.drain_outbox_once()
        beatless.client.cancel_run(run.run_id)  # two events in one row

        beatless.wait_for_outbox_flush(run.run_id, seq=1)
        for seq in (2, 3):
            with pytest.raises(AssertionError, match="outbox 2 to 3"):
                beatless.wait_for_outbox_flush(run.run_id, seq=seq, timeout=0.05)

    def test_of_a_run_that_was_rolled_back_is_no_flushed_one(self, beatless: Kit):
        with beatless.app.engine.connect() as connection:
            run = beatless.start_run("two_steps", connection=connection)
            connection.rollback()
        with pytest.raises(RunNotFound):
            beatless.wait_for_outbox_flush(run.run_id)

    def test_an_event_that_is_still_to_come_is_not_flushed(self, beatless: Kit):
        run = beatless.start_run("two_steps")
        beatless.drain_outbox_once()
        with pytest.raises(AssertionError, match="outbox still has events"):
            beatless.wait_for_outbox_flush(run.run_id, seq=2, timeout=0.05)
        beatless.client.cancel_run(run.run_id)
        beatless.drain_outbox_once()
        beatless.wait_for_outbox_flush(run.run_id, seq=3)
        with pytest.raises(AssertionError, match="ended with event 3: there is no event 4"):
            beatless.wait_for_outbox_flush(run.run_id, seq=4)


class TestCounts:
    def test_a_second_message_of_a_run_is_no_second_execution(self, beatless: Kit):
        beatless.start_run("two_steps")
        beatless.drain_outbox_once()
        beatless.advance(31)  # nobody claimed it: it is sent again
        assert beatless.work_until_idle() == 1

    def test_a_message_of_a_run_that_was_stepped_meanwhile_is_none_either(self, beatless: Kit):
        run = beatless.start_run("two_steps")
        beatless.drain_outbox_once()
        assert beatless.step(run.run_id)
        assert beatless.work_until_idle() == 1
        assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED

    def test_queues_are_asked_in_the_order_of_their_names(self, beatless: Kit):
        names = [f"q{number}" for number in range(12)]
        for name in reversed(names):
            beatless.start_run("two_steps", queue=name)
        beatless.work_until_idle()
        runs = sorted(beatless.client.list_runs(), key=lambda run: run.started_at)
        assert [run.queue for run in runs] == sorted(names)


class TestTime:
    def test_what_is_stored_stays_in_order(self, beatless: Kit):
        done = beatless.start_run("two_steps")
        beatless.work_until_idle()
        again = beatless.start_run("retries", {"failures": 1})
        beatless.work_until_idle()
        before = beatless.client.get_run(done.run_id)
        retry_at = beatless.client.events(again.run_id)[-1].data["retry_at"]

        beatless.advance(40 * 86_400)

        run = beatless.client.get_run(done.run_id)
        assert (before.created_at - run.created_at).days == 40
        assert run.created_at <= run.started_at <= run.finished_at
        assert run.finished_at - run.created_at == before.finished_at - before.created_at
        stamps = [event.ts for event in beatless.client.events(done.run_id)]
        assert stamps == sorted(stamps)
        assert abs(stamps[0] / 1000 - run.created_at.timestamp()) < 0.002
        waits = beatless.client.get_run(again.run_id)
        failed = beatless.client.events(again.run_id)[-1]
        assert failed.data["retry_at"] == retry_at - 40 * 86_400_000
        assert abs(failed.data["retry_at"] / 1000 - waits.not_before.timestamp()) < 0.002
        beatless.verify()

    def test_a_token_grows_old_too(self, beatless: Kit):
        tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
        _, secret = tokens.create(scopes=[Scope.RUNS_READ], seconds=60)
        assert tokens.find(secret) is not None
        beatless.advance(61)
        assert tokens.find(secret) is None

    def test_a_relay_that_nobody_has_called_is_not_late(self, beatless: Kit):
        run = beatless.start_run("two_steps")
        while beatless.step(run.run_id):
            pass
        beatless.advance(61)
        beatless.verify()


class TestNamespaces:
    def test_runs_of_every_namespace_count_as_started(self, beatless: Kit):
        theirs = beatless.app.client_for("acme").start_run("two_steps", {"n": 1})
        with pytest.raises(AssertionError, match="1 runs of two_steps"):
            beatless.assert_started("two_steps", count=0)
        beatless.assert_started("two_steps", namespace="default", count=0)
        ours = beatless.start_run("two_steps")
        assert beatless.assert_started("two_steps", count=2) == [theirs, ours]
        assert beatless.assert_started("two_steps", namespace="acme") == [theirs]

    def test_a_run_of_another_namespace_is_driven_and_waited_for_by_its_id(self, beatless: Kit):
        run_id = beatless.app.client_for("acme").start_run("two_steps", run_id="x").run_id
        assert run_id == "acme~x"
        assert beatless.step(run_id)
        assert beatless.work_until_idle() == 1
        assert beatless.wait_for_run_completion(run_id).result == "one two"
        beatless.wait_for_outbox_flush(run_id)
        assert beatless.wait_for_event(run_id, "RunFinished").seq == 6
        assert [event.type for event in beatless.collect_stream(run_id)] == (
            beatless.event_types(run_id)
        )
        assert beatless.describe(run_id).startswith("run acme~x at ")


class TestWaits:
    def test_an_event_is_found_by_type_step_and_seq(self, beatless: Kit):
        run = beatless.start_run("two_steps")
        beatless.work_until_idle()
        assert beatless.wait_for_event(run.run_id, "StepFinished").seq == 3
        assert beatless.wait_for_event(run.run_id, "StepFinished", step="second").seq == 5
        assert beatless.wait_for_event(run.run_id, step="second").type == "StepStarted"
        assert beatless.wait_for_event(run.run_id, seq=6).type == "RunFinished"

    def test_a_run_that_ended_without_it_or_does_not_get_there_says_so(self, beatless: Kit):
        run = beatless.start_run("two_steps")
        with pytest.raises(
            AssertionError, match=r"still runs after 0.05 s, without an event type=StepFailed\n"
        ):
            beatless.wait_for_event(run.run_id, "StepFailed", timeout=0.05)
        beatless.work_until_idle()
        with pytest.raises(AssertionError, match=r"has ended, without an event .* seq=9\n.*run "):
            beatless.wait_for_event(run.run_id, "StepFailed", seq=9)

    def test_a_worker_without_a_relay_is_heard_of_all_the_same(
        self, beatless: Kit, monkeypatch: pytest.MonkeyPatch
    ):
        """Nobody announces what it does; a stream looks by itself only each 15 s: here, never."""
        monkeypatch.setitem(Streams.__init__.__kwdefaults__, "head_check", 3600.0)
        beatless.worker_process(APP)
        run = beatless.start_run("two_steps")
        beatless.drain_outbox_once()
        with closing(Kit(App(beatless.app.settings, []))) as kit:
            assert kit.wait_for_run_completion(run.run_id).result == "one two"

    def test_where_everything_stands_is_said_without_what_is_in_it(self, beatless: Kit):
        secret = "s3cret" * 10_000
        done = beatless.start_run("two_steps", {"large": secret})
        beatless.client.cancel_run(beatless.start_run("two_steps", secret).run_id)
        beatless.work_until_idle()
        said = beatless.describe(done.run_id)
        assert "s3cret" not in said
        assert re.search(
            r"last drained: {'events': \d+, 'tasks': \d, 'rows': \d+, 'messages': \d}\n", said
        )
        assert f"this process, last claimed: {{'lease': '{done.run_id}'}}" in said
        assert len(said) < 3000
        with pytest.raises(AssertionError, match="newest runs are") as raised:
            beatless.assert_started("two_steps", count=9)
        assert len(str(raised.value)) < 1000


class Stuck(Relay):
    """A relay that cannot be stopped."""

    def stop(self) -> None:
        super().stop()
        raise RuntimeError("stuck")


def test_what_cannot_be_closed_does_not_keep_the_rest_open(beatless_app: App):
    kit = Kit(App(beatless_app.settings, list(beatless_app.plans.values())))
    kit.start_run("two_steps")
    kit.relay.__class__ = Stuck
    assert kit.app.engine.pool.checkedin() > 0
    with pytest.raises(RuntimeError, match="stuck"):
        kit.close()
    assert kit.app.engine.pool.checkedin() == 0


class TestCrashes:
    def test_of_the_relay_leave_the_worker_alone(self, beatless: Kit):
        beatless.start_run("two_steps")
        worker = beatless.executor()
        with beatless.crash(at="relay.after_publish"):
            beatless.work_until_idle()
            raise AssertionError("what follows the crash in the block is not executed")
        assert beatless.executor() is worker
        assert beatless.drain_outbox_once() > 0  # published once more, as nobody noted it
        with beatless.crash(at="claim.committed"):
            beatless.work_until_idle()
        assert beatless.executor() is not worker


def shop(app: App) -> list[str]:
    """Registers ordinary tasks with the app; what they note."""
    noted: list[str] = []

    @app.celery.task(name="shop.mail", shared=False)
    def mail(to: str, *, times: int = 1) -> None:
        noted.extend([to] * times)

    @app.celery.task(name="shop.nightly", shared=False)
    def nightly() -> None:
        app.client.start_run("two_steps")

    @app.celery.task(name="shop.breaks", shared=False)
    def breaks() -> None:
        raise ValueError("no such shop")

    @app.celery.task(name="shop.again", shared=False, bind=True, default_retry_delay=3600)
    def again(self) -> None:
        noted.append(f"try {self.request.retries}")
        if self.request.retries < 2:
            raise self.retry()

    return noted


class TestOtherTasks:
    """Ordinary tasks of the same Celery app, executed in this thread as a worker would."""

    def test_are_executed_and_counted(self, beatless: Kit):
        noted = shop(beatless.app)
        beatless.app.celery.tasks["shop.mail"].delay("you", times=2)
        assert beatless.work_once()
        assert noted == ["you", "you"]
        assert not beatless.work_once()

    def test_start_runs_that_are_executed_then(self, beatless: Kit):
        shop(beatless.app)
        beatless.app.celery.tasks["shop.nightly"].delay()
        assert beatless.work_until_idle() == 2
        assert beatless.assert_started("two_steps")[0].state is RunState.COMPLETED

    def test_wait_for_no_countdown_and_are_retried(self, beatless: Kit):
        noted = shop(beatless.app)
        beatless.app.celery.tasks["shop.again"].apply_async(countdown=60)
        assert beatless.work_until_idle() == 3
        assert noted == ["try 0", "try 1", "try 2"]

    def test_fail_as_in_a_worker(self, beatless: Kit, caplog: pytest.LogCaptureFixture):
        shop(beatless.app)
        beatless.app.celery.tasks["shop.breaks"].delay()
        beatless.start_run("two_steps")
        with caplog.at_level(logging.ERROR):
            assert beatless.work_until_idle() == 2
        assert "no such shop" in caplog.text

    def test_of_another_app_are_named(self, beatless: Kit):
        beatless.app.celery.send_task("elsewhere.mail")
        with pytest.raises(AssertionError, match=r"task 'elsewhere\.mail' waits, which this app"):
            beatless.work_once()


class TestTheQueueOfAPlan:
    @pytest.fixture
    def beatless_plans(self):
        return [Plan("mails", [step(name="mail")(lambda ctx: None)], queue="slow")]

    def test_is_asked_for_tasks_before_there_is_a_run(self, beatless: Kit):
        noted = shop(beatless.app)
        slow = f"{beatless.app.settings.prefix}.slow"
        beatless.app.celery.tasks["shop.mail"].apply_async(("you",), queue=slow)
        assert beatless.work_until_idle() == 1
        assert noted == ["you"]


class TestABrokerThatWaitsForAcknowledgements:
    """As RabbitMQ does, and Redis as Celery uses it by default."""

    @pytest.fixture(autouse=True)
    def _acknowledged_late(self, beatless_app: App):
        beatless_app.celery.conf.task_acks_late = True
        beatless_app.celery.conf.broker_transport_options.pop("ack_emulation", None)

    def waiting(self, kit: Kit) -> int:
        with kit.app.celery.connection_for_read() as broker:
            queue = worker_queue(kit.app.settings.prefix, "default")(broker.default_channel)
            return queue.queue_declare().message_count

    @pytest.mark.parametrize("point", sorted(p for p in POINTS if p.startswith(("step", "task"))))
    def test_delivers_again_what_a_dead_worker_held(self, beatless: Kit, point: str):
        run = beatless.start_run("two_steps")
        with beatless.crash(at=point):
            beatless.work_until_idle()
        assert self.waiting(beatless) == 1
        done = point == "task.before_ack"
        assert (beatless.client.get_run(run.run_id).state is RunState.COMPLETED) == done
        assert beatless.work_until_idle() == 0  # its run is done, or leased
        assert self.waiting(beatless) == 0

    def test_keeps_nothing_of_what_was_done_or_has_failed(self, beatless: Kit):
        shop(beatless.app)
        beatless.app.celery.tasks["shop.breaks"].delay()
        beatless.start_run("fatally")
        assert beatless.work_until_idle() == 2
        beatless.forget_worker()
        assert self.waiting(beatless) == 0

    def test_keeps_the_task_that_this_app_does_not_have(self, beatless: Kit):
        beatless.app.celery.send_task("elsewhere.mail")
        with pytest.raises(AssertionError, match=r"elsewhere\.mail"):
            beatless.work_once()
        beatless.forget_worker()
        assert self.waiting(beatless) == 1


def test_a_worker_is_forgotten_without_a_session_of_its_own_for_it(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    beatless.start_run("two_steps")
    beatless.work_until_idle()
    opened = []
    connect = psycopg.Connection.connect

    def noting(*args: Any, **options: Any) -> psycopg.Connection:
        opened.append(args)
        return connect(*args, **options)

    monkeypatch.setattr(psycopg.Connection, "connect", noting)
    beatless.forget_worker()
    assert opened == []


def test_a_kit_is_idle_after_the_drain_behind_its_last_run(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained = []
    drain = beatless.relay.drain_once
    monkeypatch.setattr(beatless.relay, "drain_once", lambda run: drained.append(drain(run)))

    assert beatless.work_until_idle() == 0
    assert drained == [0]

    run = beatless.start_run("two_steps")
    assert beatless.work_until_idle() == 1
    before, behind = drained[1:]
    assert before == 2  # RunStarted, and the task message
    assert behind > 0
    beatless.wait_for_outbox_flush(run.run_id)
