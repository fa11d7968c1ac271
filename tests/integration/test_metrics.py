"""What Prometheus reads equals what the journal holds."""

import re
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from beatless import App, Plan, StepContext
from beatless import step as declare
from beatless.api import create_api
from beatless.client import Client
from beatless.observe.counts import LocalCounts, SharedCounts
from beatless.observe.families import LEASE_LOST, MAX_QUEUE_SERIES, QUEUE_WAIT, RUN_DURATION
from beatless.observe.gauges import CACHE_S, PostgresGauges
from beatless.orchestrator.leased_writer import LeasedWriter
from beatless.orchestrator.queues import Presence, QueueStatements
from beatless.testing import Kit
from tests.child_logs import await_line
from tests.integration.test_groups import Together, be_patient
from tests.integration.test_relay import lose_messages

APP = "tests.plans:app"
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
AUTOSCALE = (
    Path(__file__).parents[2]
    / "deploy"
    / "kubernetes"
    / "overlays"
    / "production"
    / "autoscale.yaml"
)

Sample = tuple[str, tuple[tuple[str, str], ...]]


class Scrape(dict[Sample, float]):
    """The samples of one exposition, by name and labels."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(
            ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        )

    def value(self, name: str, **labels: str) -> float | None:
        return self.get((name, tuple(sorted(labels.items()))))


def scrape(registry: CollectorRegistry) -> Scrape:
    return Scrape(generate_latest(registry).decode())


def fetch(url: str) -> Scrape:
    with urllib.request.urlopen(url, timeout=60) as response:
        return Scrape(response.read().decode())


def test_after_a_start_of_postgres_workers_that_have_not_told_are_not_known(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago that was."""
    monkeypatch.setattr("beatless.observe.gauges.TIMEOUT_S", 60.0)
    for queue in ("mail", "slow"):
        beatless.start_run("two_steps", queue=queue)
    with beatless_app.engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO {beatless_app.settings.schema}.workers"
            " (worker, hostname, queues, processes, version, seen_at)"
            " VALUES ('w', 'here', '{slow}', 1, '1', pg_postmaster_start_time() - interval '1 min')"
        )
    for unheard_s, known in ((1e9, {"mail": 0}), (0.0, {"mail": 0, "slow": 0})):
        monkeypatch.setattr("beatless.observe.gauges.UNHEARD_S", unheard_s)
        gauges = PostgresGauges(
            beatless_app.engine, beatless_app.settings.schema, wanted=lambda: True
        )
        (found,) = (each for each in gauges.collect() if each.name == "beatless_queue_workers")
        assert {each.labels["queue"]: each.value for each in found.samples} == known


def test_runs_of_a_group_are_counted_one_by_one(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch)
    together = Together(beatless)
    ids = [beatless.start_run("two_steps").run_id for _ in range(3)]
    assert together.deliver(ids[0])
    together.executor.disconnect()
    found = scrape(beatless_app.metrics.registry)
    name = "beatless_runs_finished_total"
    assert found.value(name, plan="two_steps", outcome="completed") == 3
    for step in ("first", "second"):
        name = "beatless_step_attempts_total"
        assert found.value(name, plan="two_steps", step=step, outcome="finished") == 3
    assert found.value("beatless_queue_wait_seconds_count", queue="default") == 3


class TestCancels:
    @pytest.fixture
    def beatless_plans(self) -> list[Plan]:
        @declare
        def ends(ctx: StepContext) -> None:
            self.client.cancel_run(ctx.run_id)
            while True:
                ctx.raise_if_cancelled()

        return [Plan("ends", [ends])]

    client: Client

    def test_a_step_that_a_cancel_ends_has_not_failed(self, beatless: Kit) -> None:
        self.client = beatless.client
        run = beatless.start_run("ends")
        beatless.work_until_idle()
        assert beatless.client.get_run(run.run_id).state == "cancelled"
        assert "StepFailed" in [event.type for event in beatless.client.events(run.run_id)]

        found = scrape(beatless.app.metrics.registry)

        name = "beatless_step_attempts_total"
        for outcome, count in (("cancelled", 1), ("failed", 0)):
            assert found.value(name, plan="ends", step="ends", outcome=outcome) == count


def test_everything_of_one_process_equals_the_journal(beatless: Kit, beatless_app: App) -> None:
    beatless_app.metrics.relay.active = True
    create_api(beatless_app)
    done = [beatless.start_run("two_steps") for _ in range(3)]
    beatless.start_run("fatally")
    beatless.start_run("retries", {"failures": 1})
    beatless.start_run("sleepy", {"wake": "/nonexistent"})
    waiting = beatless.start_run("two_steps", delay=3600)
    beatless.start_run("two_steps", queue="slow", delay=3600)
    beatless.work_until_idle()
    beatless.client.cancel_run(waiting.run_id)
    beatless.work_until_idle()
    assert len(beatless.collect_stream(done[0].run_id)) == 6
    unpublished = beatless.start_run("two_steps")

    found = scrape(beatless_app.metrics.registry)

    runs = beatless.client.list_runs(limit=100)
    events = [event for run in runs for event in beatless.client.events(run.run_id)]
    published = [event for event in events if event.run_id != unpublished.run_id]
    started = Counter((run.plan, run.queue) for run in runs if run != unpublished)
    for (plan, queue), count in started.items():
        assert found.value("beatless_runs_started_total", plan=plan, queue=queue) == count
    ended = Counter((run.plan, run.state.value) for run in runs if run.state.final)
    assert ended == {
        ("two_steps", "completed"): 3,
        ("two_steps", "cancelled"): 1,
        ("fatally", "failed"): 1,
    }
    for (plan, outcome), count in ended.items():
        assert found.value("beatless_runs_finished_total", plan=plan, outcome=outcome) == count
    for plan, step, outcome, count in (
        ("two_steps", "first", "finished", 3),
        ("two_steps", "second", "finished", 3),
        ("two_steps", "second", "failed", 0),
        ("fatally", "fatal", "failed", 1),
        ("retries", "flaky", "failed", 1),
        ("sleepy", "doze", "snoozed", 1),
    ):
        name = "beatless_step_attempts_total"
        assert found.value(name, plan=plan, step=step, outcome=outcome) == count, step
    name = "beatless_step_duration_seconds_count"
    assert found.value(name, plan="two_steps", step="first") == 3
    assert found.value("beatless_run_duration_seconds_count") == 4
    assert found.value("beatless_queue_wait_seconds_count", queue="default") == 6
    assert found.value("beatless_outbox_published_total", kind="event") == len(published)
    assert found.value("beatless_outbox_published_total", kind="task") == 6
    assert (found.value("beatless_outbox_publish_latency_seconds_count") or 0) > 0
    assert found.value("beatless_outbox_pending") == 1
    assert (found.value("beatless_outbox_oldest_age_seconds") or 0) > 0
    assert found.value("beatless_dead_letters") == 0
    assert found.value("beatless_pg_notify_queue_usage_ratio") is not None
    assert found.value("beatless_runs_active", queue="default", state="delayed") == 2
    assert found.value("beatless_runs_active", queue="slow", state="delayed") == 1
    assert found.value("beatless_runs_active", queue="default", state="queued") == 1
    assert found.value("beatless_streams_open") == 0
    assert found.value("beatless_stream_gaps_total") == 0
    assert found.value("beatless_stream_backfill_events_total", reason="start") == 6
    assert "beatless_build_info{" in found.text


def test_a_retry_counts_as_a_redispatch_with_its_reason(beatless: Kit, beatless_app: App) -> None:
    beatless_app.metrics.relay.active = True
    beatless.start_run("retries", {"failures": 1})
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()
    lost = beatless.start_run("two_steps")
    beatless.drain_outbox_once(lost.run_id)
    lose_messages(beatless_app)
    beatless.advance(60)
    beatless.drain_outbox_once(lost.run_id)

    found = scrape(beatless_app.metrics.registry)

    assert found.value("beatless_redispatch_total", reason="retry") == 1
    assert found.value("beatless_redispatch_total", reason="unclaimed") == 1


def test_a_lost_lease_is_counted(beatless: Kit, beatless_app: App) -> None:
    run, plan = beatless.start_run("two_steps"), beatless_app.plans["two_steps"]
    second, settle = beatless_app.executors.new(), beatless_app.journal.settle

    def overtaken(*arguments: Any) -> Any:
        beatless_app.journal.settle = settle
        beatless.advance(60)
        assert second.execute(plan, run.run_id, 2)
        assert scrape(beatless_app.metrics.registry).value("beatless_lease_lost_total") == 0
        return settle(*arguments)

    beatless_app.journal.settle = overtaken
    beatless.executor().execute(plan, run.run_id, 1)
    second.disconnect()

    found = scrape(beatless_app.metrics.registry)
    assert found.value("beatless_lease_lost_total") == 1
    name = "beatless_runs_finished_total"
    assert found.value(name, plan="two_steps", outcome="completed") == 1


@pytest.mark.parametrize("plan", ["two_steps", "transactional"])
def test_what_is_committed_is_counted_though_its_answer_was_lost(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    plan: str,
) -> None:
    """Once each, as the journal has them: every boundary of the run, or of its transaction."""
    postgres.execute("CREATE TABLE effects (key text)")
    settle, within = beatless_app.journal.settle, LeasedWriter.settle_within
    commit, losing, lost = psycopg.Connection.commit, [False], []

    def unanswered(connection: Any, *arguments: Any) -> Any:
        found = settle(connection, *arguments)
        if not isinstance(connection, psycopg.Connection):
            return found  # of a step's transaction: its commit is still to come
        lost.append("boundary")
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    def in_transaction(*arguments: Any, **options: Any) -> Any:
        losing[0] = True
        return within(*arguments, **options)

    def committed_and_lost(connection: psycopg.Connection) -> None:
        commit(connection)
        if losing[0]:
            losing[0] = False
            lost.append("transaction")
            connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(beatless_app.journal, "settle", unanswered)
    monkeypatch.setattr(LeasedWriter, "settle_within", in_transaction)
    monkeypatch.setattr(psycopg.Connection, "commit", committed_and_lost)
    run = beatless.start_run(plan, {"table": f"{beatless_app.settings.schema}.effects"})
    beatless.work_until_idle()

    assert ("transaction" if plan == "transactional" else "boundary") in lost
    found = scrape(beatless_app.metrics.registry)
    finished = Counter(
        event.step for event in beatless.client.events(run.run_id) if event.type == "StepFinished"
    )
    assert set(finished.values()) == {1}
    for step in finished:
        name = "beatless_step_attempts_total"
        assert found.value(name, plan=plan, step=step, outcome="finished") == 1
        assert found.value("beatless_step_duration_seconds_count", plan=plan, step=step) == 1
    name = "beatless_runs_finished_total"
    assert found.value(name, plan=plan, outcome="completed") == 1
    postgres.execute("DROP TABLE effects")


def test_a_publisher_that_refuses_is_counted(beatless_app: App) -> None:
    settings = replace(
        beatless_app.settings,
        redis_url="redis://127.0.0.1:1/0",
        broker_url=beatless_app.settings.redis_url,
    )
    app = App(settings, list(beatless_app.plans.values()))
    app.metrics.relay.active = True
    app.client.start_run("two_steps")
    relay = app.relay()
    relay.drain_once()
    relay.stop()
    app.close()

    found = scrape(app.metrics.registry)

    # On a slow machine the back-off is over while the drain still goes on.
    assert (found.value("beatless_outbox_publish_failures_total", kind="event") or 0) >= 1
    assert found.value("beatless_outbox_publish_failures_total", kind="task") == 0
    assert found.value("beatless_outbox_published_total", kind="event") == 0
    assert found.value("beatless_outbox_published_total", kind="task") == 1


def test_scrapes_do_not_load_postgres_and_an_old_answer_is_not_given(
    beatless: Kit, beatless_app: App
) -> None:
    gauges = PostgresGauges(beatless_app.engine, beatless_app.settings.schema, wanted=lambda: True)

    def pending() -> float:
        found = {metric.name: metric.samples for metric in gauges.collect()}
        return found["beatless_outbox_pending"][0].value

    assert pending() == 0
    beatless.start_run("two_steps")

    assert pending() == 0
    gauges.forget()
    assert pending() == 1
    nowhere = PostgresGauges(beatless_app.engine, "nowhere", wanted=lambda: True)
    assert list(nowhere.collect()) == []
    assert CACHE_S < 15  # the usual time between two scrapes


def test_counts_of_children_outlive_them_and_their_places_are_taken_over() -> None:
    counts = SharedCounts([(LEASE_LOST, ()), (RUN_DURATION, ())], QUEUE_WAIT)
    for place, seconds in ((0, 0.004), (1, 7.0), (1, 1e9)):
        counts.take(place)
        counts.add(LEASE_LOST)
        counts.observe(RUN_DURATION, seconds)

    read = counts.read()

    assert read[LEASE_LOST.name, ()] == [3]
    buckets = read[RUN_DURATION.name, ()]
    assert sum(buckets[:-1]) == 3
    assert (buckets[0], buckets[-2], buckets[-1]) == (1, 1, 1e9 + 7.004)


def test_children_count_queues_that_only_they_have_met() -> None:
    counts = SharedCounts([(LEASE_LOST, ())], QUEUE_WAIT)
    counts.take(0)
    counts.observe_queue(1.0, "mail")
    counts.take(1)
    counts.observe_queue(2.0, "slow")
    counts.observe_queue(4.0, "mail")
    counts.take(1)  # by the child that replaces it
    counts.observe_queue(8.0, "slow")

    read = counts.read()
    assert read[QUEUE_WAIT.name, ("mail",)][-1] == 5.0
    assert read[QUEUE_WAIT.name, ("slow",)][-1] == 10.0

    long = "x" * 64
    for number in range(2 * MAX_QUEUE_SERIES):
        counts.observe_queue(1.0, f"{long[:60]}{number:04}")
    names = {labels for name, labels in counts.read() if name == QUEUE_WAIT.name}
    assert len(names) == MAX_QUEUE_SERIES
    assert ("other",) in names
    assert (f"{long[:60]}0001",) in names


def test_every_metric_is_documented(beatless_app: App) -> None:
    create_api(beatless_app)
    beatless_app.metrics.worker.active = beatless_app.metrics.relay.active = True
    names = {metric.name for metric in beatless_app.metrics.collect()}
    documented = set(re.findall(r"`(beatless_[a-z_]+)", DOCUMENT.read_text()))

    assert {name.removesuffix("_total").removesuffix("_info") for name in documented} == names
    assert len(names) == 38


def test_every_source_of_a_waking_is_documented(beatless_app: App) -> None:
    beatless_app.metrics.relay.active = True
    counted = [
        dict(labels)["source"]
        for name, labels in scrape(beatless_app.metrics.registry)
        if name == "beatless_relay_wakeups_total"
    ]
    (row,) = re.findall(r".*`beatless_relay_wakeups_total.*", DOCUMENT.read_text())
    assert sorted(re.findall(r"`([a-z]+)`", row.partition("{source}")[2])) == sorted(counted)


def test_queues_beyond_a_limit_share_a_series(beatless: Kit, beatless_app: App) -> None:
    beatless_app.metrics.relay.active = True
    for number in range(MAX_QUEUE_SERIES + 2):
        beatless.start_run("two_steps", queue=f"q{number}", delay=3600)
    beatless.drain_outbox_once()
    create_api(beatless_app)

    found = scrape(beatless_app.metrics.registry)

    started = [name for name, _ in found if name == "beatless_runs_started_total"]
    assert len(started) == MAX_QUEUE_SERIES + 1
    name = "beatless_runs_started_total"
    assert found.value(name, plan="two_steps", queue="other") == 2
    assert found.value("beatless_runs_active", queue="other", state="delayed") == 2


def test_queues_that_are_paused_or_that_no_worker_consumes_can_be_told_apart(
    beatless: Kit, beatless_app: App
) -> None:
    beatless_app.metrics.relay.active = True
    for queue in ("held", "mail", "slow"):
        beatless.start_run("two_steps", queue=queue)
    beatless.client.pause_queue("held")
    presence = Presence(worker="w", hostname="here", queues=["slow"], processes=8, version="1")
    with beatless_app.engine.begin() as connection:
        QueueStatements(beatless_app.settings.schema).announce(connection, presence)
    create_api(beatless_app)

    found = scrape(beatless_app.metrics.registry)

    states = {"held": "paused", "mail": "queued", "slow": "queued"}
    for queue, state in states.items():
        assert found.value("beatless_runs_active", queue=queue, state=state) == 1
        assert found.value("beatless_queue_workers", queue=queue) == (queue == "slow")
    for reason in ("lease", "unclaimed", "broker_lost", "refused"):
        assert found.value("beatless_redispatch_total", reason=reason) == 0


def test_the_oldest_due_run_of_each_queue_is_told_but_not_of_a_paused_one(
    beatless: Kit, beatless_app: App
) -> None:
    create_api(beatless_app)
    for queue in ("default", "mail", "paused"):
        beatless.start_run("two_steps", queue=queue)
    beatless.start_run("two_steps", queue="later", delay=3600)
    beatless.client.pause_queue("paused")
    beatless.drain_outbox_once()  # a message that was sent is not claimed by that
    beatless.advance(90)
    beatless.start_run("two_steps", queue="mail")

    found = scrape(beatless_app.metrics.registry)

    name = "beatless_queue_oldest_due_seconds"
    assert 90 <= (found.value(name, queue="mail") or 0) < 3600
    assert 90 <= (found.value(name, queue="default") or 0) < 3600
    assert found.value(name, queue="later") == 0
    assert found.value(name, queue="paused") is None
    assert counted_by_the_autoscaler(beatless_app) == 3


def counted_by_the_autoscaler(app: App) -> int:
    """The runs that the query of the production overlay counts."""
    (trigger,) = next(iter(yaml.safe_load_all(AUTOSCALE.read_text())))["spec"]["triggers"]
    query = trigger["metadata"]["query"].replace("beatless.", f"{app.settings.schema}.")
    with app.engine.connect() as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


def test_threads_lose_no_count() -> None:
    counts = LocalCounts()
    counts.add(LEASE_LOST, amount=2)
    counts.observe(RUN_DURATION, 0.2)
    assert counts.read()[LEASE_LOST.name, ()] == [2]


def metrics_url(log: Path) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+/metrics", log.read_text())
    assert found, log.read_text()
    return found[0]


@pytest.mark.slow
def test_relay_and_prefork_worker_serve_what_their_processes_did(beatless: Kit) -> None:
    relay = beatless.relay_process(APP, metrics_port=0)
    worker = beatless.worker_process(APP, concurrency=2, metrics_port=0, lease_seconds=300)
    runs = [beatless.start_run("two_steps") for _ in range(20)]
    ledger = Path(f"{worker.log}.ledger")
    killed = beatless.start_run("ledger", {"ledger": str(ledger), "kills": 1})
    for run in runs:
        beatless.wait_for_run_completion(run.run_id)
    beatless.wait_for_run_completion(killed.run_id)  # long before its lease runs out
    beatless.wait_for_outbox_flush(killed.run_id)

    # The ends of runs are known by Postgres before their workers count them.
    await_line(worker, "run finished", times=21)
    at_worker, at_relay = fetch(metrics_url(worker.log)), fetch(metrics_url(relay.log))

    name = "beatless_runs_finished_total"
    assert at_worker.value(name, plan="two_steps", outcome="completed") == 20
    name = "beatless_step_duration_seconds_count"
    assert at_worker.value(name, plan="two_steps", step="second") == 20
    name = "beatless_step_attempts_total"
    for step in "abc":  # the child that finished `a` was killed in `b`
        assert at_worker.value(name, plan="ledger", step=step, outcome="finished") == 1, step
    assert at_relay.value("beatless_redispatch_total", reason="lease") == 1
    assert at_worker.value("beatless_relay_listener_up") is None
    name = "beatless_runs_started_total"
    assert at_relay.value(name, plan="two_steps", queue="default") == 20
    assert at_relay.value("beatless_relay_listener_up") == 1
    assert at_relay.value("beatless_outbox_pending") == 0
    assert (at_relay.value("beatless_relay_wakeups_total", source="notify") or 0) > 0
    assert at_relay.value(name.replace("started", "finished")) is None
