"""A Redis with TLS of its own and the documented users: processes and viewers on the host."""

import shlex
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from beatless import App
from beatless.local.ports import free_port
from beatless.redis_urls import RedisUrl
from beatless.testing import Kit

ROOT = Path(__file__).parents[2]
CERTIFICATES = ROOT / "tests" / "certificates"
TLS = """
--port 0 --tls-port {port} --bind 127.0.0.1 --tls-auth-clients no --tls-replication yes
--tls-cert-file /c/server.pem --tls-key-file /c/server.key --tls-ca-cert-file /c/ca.pem"""
SERVER = f"redis-server {TLS} --save '' --requirepass admins-secret"
SENTINEL = f"""
sh -c "printf '%s\\n' 'sentinel monitor main 127.0.0.1 {{master}} 1' 'sentinel auth-pass main
admins-secret' 'requirepass sentinels-secret' > /tmp/s.conf &&
exec redis-server /tmp/s.conf --sentinel {TLS}" """


def url(port: int, user: str, password: str) -> str:
    ca = CERTIFICATES / "ca.pem"
    return f"rediss://{user}:{password}@localhost:{port}/0?ssl_ca_certs={ca}"


@contextmanager
def container(line: str) -> Iterator[None]:
    """A server in the network of the host, with our certificates."""
    command = ["docker", "run", "--detach", "--rm", "--network", "host", "--user", "root"]
    program, *arguments = shlex.split(line.replace("\n", " "))
    command += ["--volume", f"{CERTIFICATES}:/c:ro", "--entrypoint", program, "redis:8", *arguments]
    started = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield
    finally:
        subprocess.run(["docker", "stop", started], check=True, capture_output=True)


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    with container(SERVER.format(port=port)):
        yield port


@pytest.fixture
def admin(port: int) -> Iterator["redis.Redis"]:
    with RedisUrl.parse(url(port, "", "admins-secret")).client(socket_timeout=5) as client:
        answers(client)
        yield client


def answers(client: "redis.Redis") -> None:
    """Wait until the server is there."""
    ticking = threading.Event()
    for _ in range(1200):
        try:
            client.ping()
            return
        except redis.RedisError:
            ticking.wait(0.1)
    client.ping()


def test_runs_over_tls_with_users_that_may_do_no_more_than_they_need(
    beatless_app: App, admin: "redis.Redis", port: int, tmp_path: Path
) -> None:
    prefix = beatless_app.settings.prefix
    newest = "setinfo" in str(admin.execute_command("COMMAND LIST", "FILTERBY", "PATTERN", "cl*"))
    for line in (ROOT / "docs" / "settings.md").read_text().splitlines():
        if line.startswith("ACL SETUSER "):
            rules = (
                line.replace("beatless:", f"{prefix}:")
                .replace("beatless.", f"{prefix}.")
                .replace("PASSWORD", "secret")
            )
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


@pytest.mark.usefixtures("admin")
def test_sentinels_and_the_master_they_name_are_reached_over_tls(
    beatless_app: App, port: int, tmp_path: Path
) -> None:
    sentinel = free_port()
    with container(SENTINEL.format(master=port, port=sentinel)):
        through = f"sentinel://:admins-secret@127.0.0.1:{sentinel}/0?master_name=main"
        through += f"&sentinel_password=sentinels-secret&ssl_ca_certs={CERTIFICATES / 'ca.pem'}"
        with RedisUrl.parse(through).client(socket_timeout=5) as client:
            answers(client)
        settings = replace(beatless_app.settings, redis_url=through, broker_url=through)
        kit = Kit(App(settings, list(beatless_app.plans.values())), directory=tmp_path)
        try:
            kit.relay_process("tests.plans:app")
            kit.worker_process("tests.plans:app")
            run = kit.start_run("agents.run")
            assert [event.seq for event in kit.collect_stream(run.run_id)] == list(range(1, 14))
            kit.verify()
        finally:
            kit.close()
