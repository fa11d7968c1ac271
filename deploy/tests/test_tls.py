"""A Redis with TLS of its own and the documented users: processes and viewers on the host."""

import shlex
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from jobs import App
from jobs.redis_urls import RedisUrl
from jobs.services import free_port
from jobs.testing import Kit

ROOT = Path(__file__).parents[2]
CERTIFICATES = ROOT / "tests" / "certificates"
SERVER = """
redis-server --port 0 --tls-port {port} --bind 127.0.0.1 --save '' --requirepass admins-secret
 --tls-cert-file /c/server.pem --tls-key-file /c/server.key --tls-ca-cert-file /c/ca.pem
 --tls-auth-clients no"""


def url(port: int, user: str, password: str) -> str:
    ca = CERTIFICATES / "ca.pem"
    return f"rediss://{user}:{password}@localhost:{port}/0?ssl_ca_certs={ca}"


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    command = ["docker", "run", "--detach", "--rm", "--network", "host", "--user", "root"]
    command += ["--volume", f"{CERTIFICATES}:/c:ro", "--entrypoint", "redis-server", "redis:8"]
    command += shlex.split(SERVER.format(port=port))[1:]
    container = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield port
    finally:
        subprocess.run(["docker", "stop", container], check=True, capture_output=True)


@pytest.fixture
def admin(port: int) -> Iterator["redis.Redis"]:
    with RedisUrl.parse(url(port, "", "admins-secret")).client(socket_timeout=5) as client:
        ticking = threading.Event()
        for _ in range(300):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                ticking.wait(0.1)
        yield client


def test_runs_over_tls_with_users_that_may_do_no_more_than_they_need(
    beatless_app: App, admin: "redis.Redis", port: int, tmp_path: Path
) -> None:
    prefix = beatless_app.settings.prefix
    newest = "setinfo" in str(admin.execute_command("COMMAND LIST", "FILTERBY", "PATTERN", "cl*"))
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        if line.startswith("ACL SETUSER "):
            rules = line.replace("beatless:", f"{prefix}:").replace("PASSWORD", "secret")
            words = rules.split()[2:]
            if not newest:  # Redis < 7.2, as the page says
                words.remove("+client|setinfo")
            admin.execute_command("ACL SETUSER", *words)

    def kit(user: str) -> Kit:
        settings = replace(
            beatless_app.settings,
            redis_url=url(port, user, "secret"),
            broker_url=url(port, "broker", "secret"),
        )
        return Kit(App(settings, list(beatless_app.plans.values())), directory=tmp_path)

    relay, viewer = kit("relay"), kit("viewer")
    try:
        relay.relay_process("tests.plans:app")
        viewer.worker_process("tests.plans:app")
        for _ in range(3):
            run = viewer.start_run("agents.run")
            assert [event.seq for event in viewer.collect_stream(run.run_id)] == list(range(1, 14))
        viewer.verify()
    finally:
        relay.close()
        viewer.close()
    assert admin.acl_log() == []
