"""Flower as a process: what it knows of runs, who may see it and who may change something."""

import base64
import http.client
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import redis
from sqlalchemy import exc

from beatless import App
from beatless.flower import FleetState, Listener
from beatless.local.child import Child
from beatless.local.errors import NotReady
from beatless.local.valkey import EmbeddedValkey
from beatless.namespaces import id_prefix
from beatless.orchestrator.events import Event
from beatless.testing import Kit
from beatless.worker import canary
from tests.child_logs import await_line
from tests.integration.test_groups import Together, be_patient
from tests.valkeys import until

PASSWORD = "operator:secret"


class FlowerClient:
    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, *, password: str = PASSWORD, method: str = "GET") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            secret = base64.b64encode(password.encode()).decode()
            connection.request(method, path, headers={"Authorization": f"Basic {secret}"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def tasks_when(self, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Flower's tasks once they are what the test waits for."""
        deadline = monotonic() + 60
        while not enough(found := json.loads(self.get("/api/tasks?limit=1000")[1])):
            assert monotonic() < deadline, found
        return found


@pytest.fixture
def flower(beatless_app: App, tmp_path: Path) -> Iterator[Callable[..., FlowerClient]]:
    children: list[Child] = []

    def start(*arguments: str, app: str = "tests.plans:app") -> FlowerClient:
        child = Child(
            "flower",
            ["flower", "--port", "0", "--basic-auth", PASSWORD, *arguments],
            environ=os.environ | beatless_app.settings.to_env() | {"BEATLESS_APP": app},
            log=tmp_path / "flower.log",
        )
        children.append(child)
        child.start()
        child.wait_ready()
        (port,) = re.findall(r"flower on http://127\.0\.0\.1:(\d+)", child.log.read_text())
        return FlowerClient(int(port))

    yield start
    for child in children:
        child.terminate()
        child.reap(monotonic() + 5)


@pytest.mark.long
def test_a_task_below_a_prefix_links_to_the_run_page(
    beatless: Kit, flower: Callable[..., FlowerClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_URL_PREFIX", "tasks")
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    client = flower("--page-url", "http://page.example/")
    until(lambda: client.get(f"/tasks/task/{run.run_id}")[0] == 200)
    status, page = client.get(f"/tasks/task/{run.run_id}")
    assert (status, f"http://page.example/#/run/{run.run_id}" in page) == (200, True)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_asked_though_its_broker_is_gone(
    beatless_app: App, tmp_path: Path, number: signal.Signals
) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as valkey:
        child = Child(
            "flower",
            ["flower", "--port", "0", "--basic-auth", PASSWORD],
            environ=os.environ
            | replace(beatless_app.settings, redis_url=valkey.url, broker_url="").to_env()
            | {"BEATLESS_APP": "tests.plans:app"},
            log=tmp_path / "flower.log",
        )
        child.start()
        child.wait_ready()
        with redis.Redis.from_url(valkey.url) as client:  # it hears Celery's events, and ours
            until(lambda: client.pubsub_numpat() >= 2)
    await_line(child, "Failed to capture events")
    os.kill(child.pid, number)
    try:
        until(lambda: not child.alive)
    finally:
        child.reap(monotonic())


@pytest.mark.long
def test_beyond_this_machine_it_asks_for_a_password_or_oauth(
    beatless_app: App, tmp_path: Path
) -> None:
    def start(**environ: str) -> Child:
        child = Child(
            "flower",
            ["flower", "--port", "0", "--host", "0.0.0.0"],
            environ=os.environ | beatless_app.settings.to_env() | environ,
            log=tmp_path / "flower.log",
        )
        child.start()
        return child

    oauth = {
        "FLOWER_AUTH": "operator@example.com",
        "FLOWER_AUTH_PROVIDER": "flower.views.auth.GoogleAuth2LoginHandler",
        "FLOWER_OAUTH2_KEY": "key",
        "FLOWER_OAUTH2_SECRET": "secret",
        "FLOWER_OAUTH2_REDIRECT_URI": "https://flower.example/login",
    }
    for given in ({}, {"FLOWER_AUTH": oauth["FLOWER_AUTH"]}):
        child = start(**given)
        with pytest.raises(NotReady, match="can be reached by others"):
            child.wait_ready()
        child.reap(monotonic() + 5)
    child = start(**oauth)
    child.wait_ready()
    child.terminate()
    child.reap(monotonic() + 5)


@pytest.mark.slow
def test_runs_are_tasks_and_steps_their_children(
    beatless: Kit, flower: Callable[..., FlowerClient], tmp_path: Path
) -> None:
    before = beatless.start_run("two_steps", {"card": "4111"}).run_id
    beatless.work_until_idle()
    client = flower("--page-url", "http://page.example/", "--read-only", "--log-format", "json")
    until(lambda: '"logger": "kombu.mixins"' in (tmp_path / "flower.log").read_text())
    client.tasks_when(lambda tasks: tasks.get(before, {}).get("state") == "SUCCESS")

    ended = beatless.start_run("half", {"card": "4111"}).run_id
    beatless.work_until_idle()
    tasks = client.tasks_when(lambda tasks: tasks.get(ended, {}).get("state") == "FAILURE")
    assert {name: (task["name"], task["state"]) for name, task in tasks.items()} == {
        before: ("two_steps", "SUCCESS"),
        f"{before}:first": ("two_steps/first", "SUCCESS"),
        f"{before}:second": ("two_steps/second", "SUCCESS"),
        ended: ("half", "FAILURE"),
        f"{ended}:first": ("half/first", "SUCCESS"),
        f"{ended}:half_second": ("half/half_second", "FAILURE"),
    }
    assert tasks[ended]["exception"] == "Fatal: with one"
    step = tasks[f"{ended}:first"]
    assert (step["root_id"], step["parent_id"]) == (ended, ended)
    assert "4111" not in json.dumps(tasks)

    page = client.get(f"/task/{ended}")[1]
    assert f'href="http://page.example/#/run/{ended}"' in page
    assert f'href="/task/{ended}%3Ahalf_second"' in page
    assert client.get(f"/task/{ended}", password="operator:wrong")[0] == 401
    assert client.get(f"/api/task/revoke/{ended}", method="POST")[0] == 403
    assert "flower_events_total" in client.get("/metrics")[1]


HIDING = """
from beatless import App
from tests import plans

def hide(what, value):
    return value | {"message": f"hidden {what}"} if what == "error" else None

app = App(plans.app.settings, list(plans.app.plans.values()), redact=hide)
"""


@pytest.mark.long
def test_tasks_show_of_an_error_what_redact_lets_through(
    beatless: Kit,
    flower: Callable[..., FlowerClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "hiding.py").write_text(HIDING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    client = flower(app="hiding:app")
    run_id = beatless.start_run("half").run_id
    beatless.work_until_idle()
    tasks = client.tasks_when(lambda tasks: tasks.get(run_id, {}).get("state") == "FAILURE")
    assert tasks[run_id]["exception"] == "Fatal: hidden error"
    assert "with one" not in json.dumps(tasks)


@pytest.mark.slow
def test_without_steps_flower_shows_what_celery_tells(
    beatless: Kit, flower: Callable[..., FlowerClient]
) -> None:
    client = flower("--no-steps")
    run_id = beatless.start_run("two_steps").run_id
    beatless.work_until_idle()
    delivery = f"{run_id}.1"

    def heard(tasks: dict[str, Any]) -> bool:
        # Again and again: what is sent before Flower listens is lost, as Celery's events are.
        with (
            beatless.app.celery.connection_for_write() as broker,
            beatless.app.celery.events.Dispatcher(broker, hostname="w1@host") as worker,
        ):
            worker.send("task-received", uuid=delivery, name="two_steps")
        return delivery in tasks

    assert list(client.tasks_when(heard)) == [delivery]


def said(type: str, uuid: str, worker: str = "w1@host", **fields: Any) -> dict[str, Any]:
    """What a worker says of a delivery, as Celery hands it on."""
    return {
        "type": type,
        "uuid": uuid,
        "hostname": worker,
        "timestamp": 1000.0,
        "local_received": 1000.0,
        "clock": 1,
        "pid": 1,
        "utcoffset": 0,
        **fields,
    }


def event(seq: int, type: str, step: str | None = None, **data: Any) -> Event:
    return Event(
        run_id="r", seq=seq, ts=1_000_000 + seq, type=type, source="worker", step=step, attempt=1,
        data=data or None,
    )  # fmt: skip


@pytest.mark.parametrize("worker_first", [True, False])
def test_a_worker_and_the_journal_tell_of_the_same_task(worker_first: bool) -> None:
    state = FleetState(plans={"plan"})
    told = [
        lambda: state.event(said("task-received", "r.1", name="plan", root_id="r.1")),
        lambda: state.event(said("task-started", "r.1")),
        lambda: state.event(said("task-succeeded", "r.1", result="None", runtime=9.0)),
    ]
    journal = [
        event(1, "RunStarted", plan="plan", queue="q"),
        event(2, "StepStarted", "a"),
        event(3, "StepFailed", "a", error={"type": "ValueError", "message": "no"}, retry_at=None),
        event(4, "RunFinished", outcome="failed", error={"type": "ValueError", "message": "no"}),
    ]
    if worker_first:
        for tell in told:
            tell()
    for one in journal:
        state.journal(one)
    if not worker_first:
        for tell in told:
            tell()
    run, step = state.tasks["r"], state.tasks["r:a"]
    assert (run.name, run.state, run.root_id) == ("plan", "FAILURE", "r")
    assert (step.name, step.state, step.parent_id) == ("plan/a", "FAILURE", "r")
    assert run.worker.hostname == step.worker.hostname == "w1@host"
    assert {child.uuid for child in run.children} == {"r:a"}
    assert sorted(state.tasks) == ["r", "r:a"]
    assert state.counter["w1@host"] == {"task-received": 1, "task-started": 1, "task-failed": 1}


@pytest.mark.parametrize("undone", [False, True])
def test_a_step_that_ended_by_the_cancel_is_revoked_as_its_run(undone: bool) -> None:
    state = FleetState(plans={"plan"})
    error = {"type": "RunCancelled", "message": "the run was cancelled"}
    state.journal(event(1, "RunStarted", plan="plan"))
    state.journal(event(2, "StepStarted", "a"))
    final = {"final": True} if undone else {}
    state.journal(event(3, "StepFailed", "a", error=error, retry_at=None, **final))
    state.journal(event(4, "RunFinished", outcome="cancelled", error=error))
    assert {uuid: task.state for uuid, task in state.tasks.items()} == {
        "r": "REVOKED",
        "r:a": "REVOKED",
    }


def test_each_run_of_a_group_is_a_task_with_its_steps(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery tells of one task, whose worker is known; the journal tells of all."""
    be_patient(monkeypatch)
    together = Together(beatless)
    ids = [beatless.start_run("two_steps").run_id for _ in range(3)]
    assert together.deliver(ids[0])
    together.executor.disconnect()
    state = FleetState(plans={"two_steps"})
    for type in ("task-received", "task-started", "task-succeeded"):
        state.event(said(type, f"{ids[0]}.1", name="two_steps"))
    ended = threading.Event()

    def tell(event: Event) -> None:
        state.journal(event)
        if all(run_id in state.tasks and state.tasks[run_id].ready for run_id in ids):
            ended.set()

    listener = Listener(beatless_app, tell)
    listener.start()
    assert ended.wait(60)
    listener.stop()
    beatless.drain_outbox_once()  # it waits for some message
    assert {(state.tasks[run_id].name, state.tasks[run_id].state) for run_id in ids} == {
        ("two_steps", "SUCCESS")
    }
    for run_id in ids:
        steps = {child.uuid for child in state.tasks[run_id].children}
        assert steps == {f"{run_id}:first", f"{run_id}:second"}


def test_a_lost_worker_is_a_retry_of_the_run() -> None:
    state = FleetState(plans={"plan"})
    state.journal(event(1, "RunStarted", plan="plan"))
    state.event(said("task-received", "r.1", name="plan"))
    state.event(said("task-started", "r.1"))
    state.event(said("task-failed", "r.1", exception="WorkerLostError()"))
    assert state.tasks["r"].state == "RETRY"
    state.event(said("task-received", "r.2", "w2@host", name="plan"))
    state.event(said("task-started", "r.2", "w2@host"))
    assert state.tasks["r"].state == "STARTED"
    state.journal(event(2, "RunFinished", outcome="completed"))
    state.event(said("task-failed", "r.1", exception="WorkerLostError()"))
    assert state.tasks["r"].state == "SUCCESS"
    assert state.counter["w2@host"]["task-succeeded"] == 1


def test_canaries_of_doctor_are_in_no_list() -> None:
    state = FleetState(plans={"plan", canary.NAME})
    run_id = f"{id_prefix(canary.NAMESPACE)}canary-1"
    for kind in ("task-received", "task-started", "task-succeeded"):
        state.event(said(kind, f"{run_id}.1", name=canary.NAME))
    state.journal(replace(event(1, "RunStarted", plan=canary.NAME), run_id=run_id))
    state.journal(replace(event(2, "RunFinished", outcome="completed"), run_id=run_id))
    assert not state.tasks
    assert canary.NAME not in state._seen_types


@pytest.mark.parametrize("uuid", ["0190-other", "order.123"])
def test_tasks_that_are_no_runs_stay_as_they_are(uuid: str) -> None:
    state = FleetState(plans={"plan"})
    state.event(said("task-received", "order", name="other"))
    state.event(said("task-received", uuid, name="other"))
    state.event(said("task-failed", uuid, exception="ValueError()"))
    assert state.tasks[uuid].state == "FAILURE"


def test_a_task_whose_beginning_was_not_heard_is_a_run_if_the_journal_knows_it() -> None:
    state = FleetState(plans={"plan"})
    state.journal(event(1, "RunStarted", plan="plan"))
    state.event(said("task-started", "r.1"))
    state.event(said("task-started", "order.123"))
    assert {uuid: task.state for uuid, task in state.tasks.items()} == {
        "r": "STARTED",
        "order.123": "STARTED",
    }


def test_a_run_of_a_plan_that_flower_does_not_know_is_one_task_all_the_same() -> None:
    state = FleetState(plans={"plan"})
    state.journal(event(1, "RunStarted", plan="newer"))
    state.event(said("task-received", "r.1", name="newer"))
    state.event(said("task-received", "order.123", name="newer"))
    assert set(state.tasks) == {"r", "order.123"}


def test_the_listener_survives_strange_messages_and_a_pool_that_has_nothing(
    beatless: Kit, beatless_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []
    ended = threading.Event()

    def tell(event: Event) -> None:
        heard.append(event)
        if event.final:
            ended.set()

    connect, refused = beatless_app.engine.connect, threading.Event()

    def none_left() -> None:
        refused.set()
        beatless_app.engine.connect = connect
        raise exc.TimeoutError("QueuePool limit of size 5 overflow 10 reached")

    beatless_app.engine.connect = none_left
    listener = Listener(beatless_app, tell)
    listener.start()
    assert refused.wait(60)
    run_id = beatless.start_run("two_steps").run_id
    client = beatless_app.redis()
    channel = beatless_app.streams.channel(run_id)

    def seen() -> int:
        return sum(getattr(r, "action", "") == "strange_message" for r in caplog.records)

    for strange in (b"hello", b"[]", b'{"seq": 1}', b"\xff"):
        before = seen()

        def heeded(strange: bytes = strange, before: int = before) -> bool:
            # Again and again: nobody hears what comes before it listens, or while it starts over.
            client.publish(channel, strange)
            return seen() > before

        until(heeded)
    assert listener._thread.is_alive()

    beatless.work_until_idle()

    assert ended.wait(60)
    assert [event.seq for event in heard] == [1, 2, 3, 4, 5, 6]
    listener.stop()
    client.publish(channel, b"")  # it waits for some message
    listener._thread.join(60)
    client.close()


def test_a_flower_that_lives_through_a_restore_hears_the_runs_after_it(
    beatless: Kit, beatless_app: App
) -> None:
    heard: list[int] = []
    run_id = beatless.start_run("two_steps").run_id
    listener = Listener(beatless_app, lambda event: heard.append(event.seq), look_s=0.01)
    listener.start()
    until(lambda: heard == [1])
    other = App(beatless_app.settings, plans=list(beatless_app.plans.values()))
    with other.engine.begin() as connection:
        other.journal.renew(connection)

    until(lambda: heard == [1, 1])  # of the new history everything is new
    beatless.work_until_idle()  # published in the new history
    until(lambda: heard == [1, 1, 2, 3, 4, 5, 6])
    assert beatless.client.get_run(run_id).state.final
    listener.stop()
    listener._thread.join(60)
    other.close()
