"""Everything but the relay's own sessions through a PgBouncer in transaction mode."""

import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

import psycopg
import pytest
from sqlalchemy.engine import make_url

from beatless import App
from beatless.doctor import Doctor, Status
from beatless.http import Client as HttpClient
from beatless.local.errors import NotReady
from beatless.local.ports import free_port
from beatless.local.privileges import server_user
from beatless.testing import Kit
from tests.serving import serving

FEW = 4
"""Sessions of PgBouncer: those of its many clients change with each transaction."""


def answers(url: str, pooler: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError as error:
            if pooler.poll() is not None or monotonic() > deadline:
                raise AssertionError(f"{error}; {log.read_text()}") from error
            threading.Event().wait(0.05)


@pytest.fixture
def pooler_url(beatless_app: App, tmp_path: Path) -> Iterator[str]:
    direct = make_url(beatless_app.settings.database_url)
    pooled = direct.set(host="127.0.0.1", port=free_port(), query={})
    users = tmp_path / "users"
    users.write_text(f'"{direct.username}" "{direct.password}"\n')
    config = tmp_path / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host={direct.host} port={direct.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {pooled.port}\n"
        f"auth_type = plain\nauth_file = {users}\npool_mode = transaction\n"
        f"default_pool_size = {FEW}\nmax_client_conn = 200\nunix_socket_dir =\n"
    )
    log = tmp_path / "pgbouncer.log"
    with log.open("ab") as output:
        pooler = subprocess.Popen(
            ["pgbouncer", str(config)],
            stdout=output,
            stderr=output,
            preexec_fn=server_user().become,  # it refuses root
        )
    url = pooled.render_as_string(hide_password=False)
    try:
        answers(url, pooler, log)
        yield url
    finally:
        pooler.kill()
        pooler.wait()


@pytest.fixture
def kit_behind(beatless_app: App, tmp_path: Path) -> Iterator[list[Kit]]:
    kits: list[Kit] = []
    yield kits
    for kit in kits:
        kit.close()


def behind(beatless_app: App, kits: list[Kit], directory: Path, url: str, listen_url: str) -> Kit:
    settings = replace(beatless_app.settings, database_url=url, listen_url=listen_url)
    kits.append(Kit(App(settings, list(beatless_app.plans.values())), directory=directory))
    return kits[-1]


def finding(app: App, check: str) -> tuple[Status, str]:
    [found] = Doctor(app).examine([check])
    return found.status, f"{found.text} {found.advice}"


def test_clients_workers_and_the_api_work_through_it(
    beatless_app: App, kit_behind: list[Kit], tmp_path: Path, pooler_url: str
) -> None:
    direct = beatless_app.settings.listen_url
    kit = behind(beatless_app, kit_behind, tmp_path, pooler_url, direct)
    kit.relay_process("tests.plans:app")
    for _ in range(2):
        kit.worker_process("tests.plans:app", concurrency=2)
    # More often than psycopg takes to prepare a statement, and more clients than sessions.
    runs = [kit.start_run("agents.run") for _ in range(30)]
    with kit.app.engine.begin() as connection:
        runs.append(kit.start_run("agents.run", connection=connection))
    for run in runs:
        kit.wait_for_run_completion(run.run_id, timeout=120)
    with serving(kit.app) as api, HttpClient(api.url) as client:
        run = client.start_run("agents.run")
        assert len(list(client.stream_run(run.run_id))) == 13
        assert len(client.list_runs()) == len(runs) + 1
        client.pause_queue("default")
        client.resume_queue("default")
    for check in ("postgres", "sessions", "listen", "rows"):
        assert finding(kit.app, check)[0] is Status.OK
    kit.verify()


def test_it_is_refused_as_the_listen_url_with_what_to_do(
    beatless_app: App, kit_behind: list[Kit], tmp_path: Path, pooler_url: str
) -> None:
    kit = behind(beatless_app, kit_behind, tmp_path, pooler_url, pooler_url)
    with pytest.raises(NotReady, match="set BEATLESS_LISTEN_URL to a direct connection"):
        kit.relay_process("tests.plans:app")
    status, told = finding(kit.app, "listen")
    assert status is Status.PROBLEM
    assert "set BEATLESS_LISTEN_URL to a direct connection" in told
