"""Passwords that change while processes live: asked for at each connect."""

import asyncio
import shlex
import threading
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import make_url

from beatless import App, BadSetting, Settings, Unreachable
from beatless.credentials import PasswordUnavailable, from_command
from beatless.outbox.backoff import Backoff
from beatless.outbox.observer import Drained, Signal
from beatless.redis_urls import RedisUrl
from beatless.testing import Kit

COMMANDS = ("database", "redis", "broker")


class Vault:
    """Where the passwords of a user are, in Postgres and in Redis."""

    def __init__(self, app: App, file: Path) -> None:
        self.user = f"t_{uuid.uuid4().hex[:8]}"
        self.file = file
        self.asked = 0
        self._app = app
        with app.engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE ROLE {self.user} SUPERUSER LOGIN")
        self.rotate("first")

    def rotate(self, password: str) -> None:
        """From now on this is the password, and sessions of before are over."""
        self.password = password
        self.file.write_text(password + "\n")
        with self._app.engine.begin() as connection:
            connection.exec_driver_sql(f"ALTER ROLE {self.user} PASSWORD '{password}'")
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                f"WHERE usename = '{self.user}'"
            )
        with self._app.redis() as client:
            client.acl_setuser(
                self.user, enabled=True, reset_passwords=True, passwords=[f"+{password}"],
                keys=["*"], channels=["*"], commands=["+@all"],
            )  # fmt: skip
            client.execute_command("CLIENT", "KILL", "USER", self.user)

    def ask(self) -> str:
        self.asked += 1
        return self.password

    def remove(self) -> None:
        with self._app.engine.begin() as connection:
            connection.exec_driver_sql(f"DROP ROLE {self.user}")
        with self._app.redis() as client:
            client.acl_deluser(self.user)


@pytest.fixture
def vault(beatless_app: App, tmp_path: Path) -> Iterator[Vault]:
    found = Vault(beatless_app, tmp_path / "password")
    yield found
    found.remove()


def without_passwords(settings: Settings, user: str, **more: object) -> Settings:
    url = make_url(settings.database_url).set(username=user)
    database = url._replace(password=None).render_as_string(hide_password=False)
    host, port = RedisUrl.parse(settings.redis_url).hosts[0]
    redis = f"redis://{user}@{host}:{port}/{RedisUrl.parse(settings.redis_url).db}"
    return replace(
        settings,
        database_url=database,
        listen_url=database,
        redis_url=redis,
        broker_url=redis,
        **more,
    )


async def ping(app: App) -> None:
    async with app.aredis() as client:
        await client.ping()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["function", "command"])
def test_everything_goes_on_when_the_passwords_have_changed(
    beatless_app: App, vault: Vault, tmp_path: Path, how: str
) -> None:
    more = (
        {"database_password": vault.ask, "redis_password": vault.ask}
        if how == "function"
        else {
            f"{name}_password_command": f"cat {shlex.quote(str(vault.file))}" for name in COMMANDS
        }
    )
    settings = without_passwords(beatless_app.settings, vault.user, **more)
    kit = Kit(App(settings, list(beatless_app.plans.values())), directory=tmp_path)
    drained = threading.Event()

    def observe(signal: Signal) -> None:
        if isinstance(signal, Drained):
            drained.set()

    relay = kit.app.relay(observer=observe, backoff=Backoff(initial=0.01, cap=0.05))
    relay.start()
    try:
        for password in ("second", "third", "fourth"):
            run = kit.client.start_run("two_steps")
            while kit.client.get_run(run.run_id).attempt == 0:
                assert drained.wait(60)
                drained.clear()
                message = kit._inbox.take()  # what a worker does
                if message is not None:
                    kit._execute(message)
            assert kit.client.get_run(run.run_id).state == "completed"
            assert len(kit.collect_stream(run.run_id)) == 6
            asyncio.run(ping(kit.app))
            vault.rotate(password)
            kit.forget_worker()
        assert vault.asked > 5 or how == "command"
    finally:
        relay.stop()
        kit.close()


def test_a_password_that_cannot_be_had_is_an_absent_server(beatless_app: App, vault: Vault) -> None:
    def fail() -> str:
        raise KeyError("the vault is sealed")

    settings = without_passwords(beatless_app.settings, vault.user, database_password=fail)
    app = App(settings, [])
    with pytest.raises(Unreachable, match="password could not be had: 'the vault is sealed'"):
        app.client.epoch()
    app.close()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("false", "false ended with status 1$"),
        ("no-such-command-here", "could not be run"),
        ("true", "printed nothing"),
    ],
)
def test_a_command_that_gives_no_password_says_why(command: str, reason: str) -> None:
    with pytest.raises(PasswordUnavailable, match=reason):
        from_command(command)()


@pytest.mark.parametrize("printed", ["secret", "secret\\n", "secret\\r\\nuntil noon\\n"])
def test_the_password_is_the_first_line_that_the_command_prints(printed: str) -> None:
    assert from_command(f"printf '{printed}'")() == "secret"


def test_commands_come_from_the_environment_and_functions_do_not() -> None:
    urls = {"BEATLESS_DATABASE_URL": "postgresql://db/app", "BEATLESS_REDIS_URL": "redis://r"}
    given = {f"BEATLESS_{name.upper()}_PASSWORD_COMMAND": "printf 's ecret'" for name in COMMANDS}
    settings = Settings.from_env(urls | given)
    assert {settings.password(name)() for name in COMMANDS} == {"s ecret"}
    assert Settings.from_env(settings.to_env()) == settings
    redis_only = Settings.from_env(
        urls | {"BEATLESS_REDIS_PASSWORD_COMMAND": "printf x"}, database_password=lambda: "d"
    )
    assert redis_only.password("broker")() == "x"
    assert redis_only.password("database")() == "d"
    elsewhere = replace(redis_only, broker_url="amqp://rabbit//")
    assert elsewhere.password("broker") is None
    with pytest.raises(BadSetting, match="is not a setting"):
        Settings.from_env(urls | {"BEATLESS_DATABASE_PASSWORD": "secret"})
    with pytest.raises(BadSetting, match="BEATLESS_REDIS_PASSWORD_COMMAND is no command"):
        Settings.from_env(urls | {"BEATLESS_REDIS_PASSWORD_COMMAND": "printf '"})


def test_the_environment_of_libpq_is_not_asked_for_the_password(
    beatless_app: App, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", "of something else")
    settings = without_passwords(beatless_app.settings, vault.user, database_password=vault.ask)
    app = App(settings, [])
    with (
        app.engine.connect() as connection,
        app.executors.connect() as worker,
        app.direct_connection() as relay,
    ):
        assert connection.exec_driver_sql("SELECT current_user").scalar() == vault.user
        assert worker.info.user == vault.user
        assert relay.info.user == vault.user
    app.close()
