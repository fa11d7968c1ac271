"""The compose deployment at work: runs with viewers, while services are restarted and killed."""

import contextlib
import http.client
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beatless.demo import agents_run
from beatless.local.ports import free_port
from tests.valkeys import until

DEPLOY = Path(__file__).parents[1]
RUNS = 200
PATIENCE = 180


class Fleet:
    """The stack of compose.yaml under a name of its own."""

    def __init__(self, name: str) -> None:
        self.api_port, self.flower_port = free_port(), free_port()
        self._environ = os.environ | {
            "POSTGRES_PASSWORD": "postgres-secret",
            "REDIS_PASSWORD": "redis-secret",
            "FLOWER_AUTH": "operator:flower-secret",
            "API_PORT": str(self.api_port),
            "FLOWER_PORT": str(self.flower_port),
        }
        legacy = shutil.which("docker-compose")
        self._command = [*([legacy] if legacy else ["docker", "compose"]), "-p", name]
        self.token = ""

    def compose(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=DEPLOY,
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.api_port, timeout=60)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def wait_ready(self) -> None:
        ticking = threading.Event()
        for _ in range(PATIENCE):
            try:
                if self.request("GET", "/readyz")[0] == 200:
                    return
            except OSError:
                pass
            ticking.wait(1)
        raise AssertionError(self.compose("logs", "api"))

    def wait_healthy(self) -> None:
        """Until every service that is asked whether it does its work has said so."""
        ticking = threading.Event()
        states: dict[str, str] = {}
        for _ in range(PATIENCE):
            for service in ("postgres", "valkey", "relay", "worker", "api", "flower"):
                for container in self.containers(service):
                    asked = ["docker", "inspect", "-f", "{{.State.Health.Status}}", container]
                    said = subprocess.run(asked, capture_output=True, text=True, check=True)
                    states[f"{service} {container[:8]}"] = said.stdout.strip()
            if set(states.values()) == {"healthy"}:
                return
            seen, states = states, {}
            ticking.wait(1)
        raise AssertionError(seen)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    found = Fleet(f"beatless-test-{os.getpid()}")
    try:
        found.compose("up", "-d", "--no-build", "--scale", "worker=2", "--scale", "relay=2")
        found.wait_ready()
        logs = found.compose("logs", "--no-color", "token").split()
        found.token = next(word for word in logs if word.startswith("bl_"))
        yield found
    finally:
        found.compose("down", "-v", "--timeout", "5")


class Viewer(threading.Thread):
    """Follows one run as a browser would: on any error it comes again with its last id."""

    def __init__(self, fleet: Fleet, run_id: str) -> None:
        super().__init__(daemon=True)
        self.run_id = run_id
        self.events: list[dict] = []
        self.reconnects = 0
        self._fleet = fleet
        self._path = f"/v1/runs/{run_id}/stream"
        self._last_id = ""
        self._pause = threading.Event()

    def run(self) -> None:
        while not (self.events and self.events[-1]["type"] == "RunFinished"):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._follow()
            self.reconnects += 1
            self._pause.wait(0.5)

    def _follow(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._fleet.api_port, timeout=60)
        headers = {"Authorization": f"Bearer {self._fleet.token}"}
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        try:
            connection.request("GET", self._path, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                return
            for line in response:
                name, _, value = line.decode().rstrip("\r\n").partition(": ")
                if name == "id":
                    self._last_id = value
                elif name == "data" and value:
                    self.events.append(json.loads(value))
        finally:
            connection.close()


def is_whole(events: list[dict]) -> None:
    """Each step of the run has finished once, in its last attempt.

    A worker that was killed has left an attempt; one that was restarted, or was busy with another
    run of its group, has given one back, which begins again under its number.
    """
    first, *between, last = events
    assert (first["type"], last["type"]) == ("RunStarted", "RunFinished")
    assert last["data"]["outcome"] == "completed"
    finished = [event["step"] for event in between if event["type"] == "StepFinished"]
    assert finished == [step.name for step in agents_run.steps]
    step, attempt = "", 0
    for event in between:
        if event["type"] == "StepStarted":
            again = event["step"] == step
            assert event["attempt"] in ({attempt, attempt + 1} if again else {1})
            step, attempt = event["step"], event["attempt"]
        assert event["type"] in ("StepStarted", "DebugTrace", "StepFinished")
        assert (event["step"], event["attempt"]) == (step, attempt)


def test_every_run_is_exact_while_the_fleet_is_restarted_and_killed(fleet: Fleet) -> None:
    viewers = []
    started = 0

    def start(count: int, delay: float = 0) -> None:
        nonlocal started
        due = (datetime.now(UTC) + timedelta(seconds=delay)).isoformat()
        for _ in range(count):
            body = {"plan": "agents.run", "key": f"run-{started}", "not_before": due}
            started += 1
            status = 0
            while status not in (200, 201):  # the API may be away: the key makes it once
                try:
                    status, answer = fleet.request("POST", "/v1/runs", body)
                except (OSError, http.client.HTTPException):
                    threading.Event().wait(0.5)
            viewers.append(Viewer(fleet, json.loads(answer)["run_id"]))
            viewers[-1].start()

    start(1, delay=3600)
    lasting = viewers.pop()  # lives through everything below
    until(lambda: lasting.events, PATIENCE)
    start(RUNS // 5, delay=45)
    start(RUNS // 5)
    subprocess.run(["docker", "kill", fleet.containers("worker")[0]], check=True)
    start(RUNS // 5)
    subprocess.run(["docker", "kill", fleet.containers("relay")[0]], check=True)
    start(RUNS // 5)
    for service in ("worker", "relay", "valkey"):
        fleet.compose("restart", "--timeout", "5", service)
    for service in ("postgres", "api", "flower"):
        fleet.compose("restart", "--timeout", "10", service)
    fleet.wait_ready()
    assert fleet.request("POST", f"/v1/runs/{lasting.run_id}/cancel", {})[0] == 202
    lasting.join(PATIENCE)
    types = [event["type"] for event in lasting.events]
    assert types == ["RunStarted", "CancelRequested", "RunFinished"]
    assert lasting.reconnects > 1
    start(RUNS - started)

    for viewer in viewers:
        viewer.join(PATIENCE)
        assert [event["seq"] for event in viewer.events] == list(range(1, len(viewer.events) + 1))
        is_whole(viewer.events)
    fleet.compose("exec", "-T", "relay", "beatless", "verify", "--all")
    fleet.wait_healthy()
    fleet.compose("exec", "-T", "relay", "beatless", "doctor")


def test_flower_asks_for_a_password(fleet: Fleet) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", fleet.flower_port, timeout=60)
    connection.request("GET", "/")
    assert connection.getresponse().status == 401
    connection.close()


def test_the_processes_are_not_root_and_cannot_write(fleet: Fleet) -> None:
    shown = fleet.compose("exec", "-T", "relay", "sh", "-c", "id -u; touch /app/x || echo refused")
    assert shown.split() == ["10001", "refused"]
