"""`beatless top`: what a fleet does, once or as a screen."""

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from rich.cells import cell_len
from rich.text import Text
from sqlalchemy import make_url

from beatless import App
from beatless.cli.top import drawn, screen
from beatless.orchestrator.queues import Presence, QueueStatements
from beatless.outbox.sockets import readable
from beatless.testing import Kit
from beatless.testing.servers import Services
from beatless.top import activity
from tests.commands import Command
from tests.proxy import proxy

BACK = "\x1b[?1049l"
"""The terminal shows what it showed before."""


def ended_at(beatless: Kit, interval: str) -> None:
    """Move the ends of all runs away from now: whatever the test takes, they are so old."""
    with beatless.app.engine.begin() as connection:
        connection.execute(
            sqlalchemy.text(
                f"UPDATE {beatless.app.settings.schema}.run_events SET ts = now() + '{interval}' "
                "WHERE type = 'RunFinished'"
            )
        )


def test_what_ended_within_a_minute_is_told_by_plan(beatless: Kit, command: Command) -> None:
    for plan in ("two_steps", "two_steps", "fatally"):
        beatless.start_run(plan)
    beatless.work_until_idle()
    ended_at(beatless, "1 hour")
    beatless.start_run("agents.run")
    first, last = (
        {each["plan"]: each for each in found["plans"]}
        for found in (command.documents("top")[0], command.documents("top", "--once")[0])
    )

    assert first.keys() == last.keys() == {"two_steps", "fatally"}
    counts = ("completed", "failed", "cancelled")
    assert [last["two_steps"][name] for name in counts] == [2, 0, 0]
    assert [last["fatally"][name] for name in counts] == [0, 1, 0]
    assert last["two_steps"]["per_second"] == pytest.approx(2 / 60)


def test_what_ended_earlier_is_told_as_a_failure_only(beatless: Kit, command: Command) -> None:
    runs = [beatless.start_run("fatally", run_id=f"f{n}") for n in range(7)]
    beatless.start_run("two_steps")
    beatless.work_until_idle()
    ended_at(beatless, "-2 minutes")
    (found,) = command.documents("top")

    assert found["plans"] == []
    assert len(found["failures"]) == 5
    assert {each["run_id"] for each in found["failures"]} <= {run.run_id for run in runs}
    assert {each["error"]["message"] for each in found["failures"]} == {"no use trying again"}


def test_a_look_takes_as_many_statements_for_many_runs_as_for_few(
    beatless: Kit, beatless_app: App, tmp_path: Path
) -> None:
    def cost() -> int:
        """Of a look on new connections, with what opens and ends their transactions."""
        beatless_app.engine.dispose()
        with (tmp_path / "trace").open("w+") as file:

            def trace(driver: psycopg.Connection, _record: object) -> None:
                driver.pgconn.trace(file.fileno())

            sqlalchemy.event.listen(beatless_app.engine, "connect", trace)
            activity(beatless_app, beatless_app.engine)
            sqlalchemy.event.remove(beatless_app.engine, "connect", trace)
            beatless_app.engine.dispose()
            return len(re.findall(r"F\t\d+\t(?:Execute|Query)", (tmp_path / "trace").read_text()))

    beatless.start_run("two_steps")
    few = cost()
    for n in range(4):
        beatless.start_run("two_steps", queue=f"q{n}")
        beatless.start_run("fatally")
    beatless.work_until_idle()
    beatless.start_run("two_steps")

    assert 8 <= few <= 14
    assert cost() == few


def test_without_a_terminal_it_is_printed_once(beatless: Kit, command: Command) -> None:
    beatless.client.pause_queue("parcels")
    beatless.start_run("fatally", run_id="broken")
    beatless.work_until_idle()
    beatless.start_run("two_steps", queue="parcels")

    said = command("top")

    assert said.startswith("beatless ")
    assert "parcels" in said
    assert "paused" in said
    assert "broken" in said
    assert "no use trying again" in said


def test_queues_and_top_have_the_same_queues(
    beatless: Kit, beatless_app: App, command: Command
) -> None:
    beatless.start_run("two_steps", queue="ended")
    beatless_app.client_for("acme").start_run("two_steps", queue="of_acme")
    beatless.work_until_idle()
    ended_at(beatless, "-2 minutes")
    beatless.start_run("two_steps", queue="queued")
    beatless.client.pause_queue("paused")
    beatless.client.set_age_after("set", 60)
    consumed = Presence(
        worker="w", hostname="celery@w", queues=["consumed"], processes=1, version="0.1.0"
    )
    with beatless_app.engine.begin() as connection:
        QueueStatements(beatless_app.settings.schema).announce(connection, consumed)
        connection.execute(  # however long this test takes, the worker is there
            sqlalchemy.text(
                f"UPDATE {beatless_app.settings.schema}.workers SET seen_at = now() + '1 hour'"
            )
        )

    found = activity(beatless_app, beatless_app.engine)

    names = ["consumed", "ended", "of_acme", "paused", "queued", "set"]
    assert [state.name for state in found.queues] == names
    assert [state["name"] for state in command.documents("queues")] == names
    shown = [Text.from_markup(line).plain for line in screen(found, width=None, height=None)]
    assert [line.split()[0] for line in shown[3 : 3 + len(names)]] == ["queued"] + [
        name for name in names if name != "queued"
    ]


def test_a_low_and_narrow_window_shows_what_fits(beatless: Kit, beatless_app: App) -> None:
    for n in range(20):
        beatless.client.pause_queue(f"queue-{n:02}")
    found = activity(beatless_app, beatless_app.engine)

    wide = [Text.from_markup(line).plain for line in screen(found, width=None, height=None)]
    low = [Text.from_markup(line).plain for line in screen(found, width=45, height=12)]

    assert "delayed" in wide[2]
    assert "queue-19" in wide[22]
    assert "delayed" not in low[2]
    assert "queued" in low[2]
    assert len(low) == 12
    assert max(map(cell_len, low[1:])) <= 45
    assert low[-1] == "and 12 more"
    assert drawn(found, 45, 12).no_wrap


def test_an_outage_is_told_above_what_was_found_before(beatless_app: App) -> None:
    found = activity(beatless_app, beatless_app.engine)
    lines = drawn(found, 60, 12, problem="Postgres [cannot] be\nreached").plain.splitlines()

    assert lines[0] == "Postgres [cannot] be reached; this is from before"
    assert lines[1:] == drawn(found, 60, 11).plain.splitlines()


class Terminal:
    """A terminal: its own end, and the one of the program in it."""

    def __init__(self) -> None:
        self._own, self.descriptor = pty.openpty()
        self.shown = ""

    @property
    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.descriptor)

    def press(self, key: str) -> None:
        os.write(self._own, key.encode())

    def wait_for(self, text: str, pidfd: int | None = None) -> None:
        """Read until this was shown; fails if the process has ended without it."""
        while text not in self.shown:
            own = [self._own]
            ready = readable([*own, *([] if pidfd is None else [pidfd])], 60)
            assert self._own in ready, self.shown
            self.shown += os.read(self._own, 65536).decode(errors="replace")

    def forget(self) -> None:
        """What was shown until now."""
        self.shown = ""

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._own)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    found = Terminal()
    yield found
    found.close()


def test_q_ends_the_screen_and_leaves_the_terminal_as_it_was(
    beatless: Kit, command: Command, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    beatless.start_run("two_steps", queue="parcels")
    before = terminal.modes
    terminal.press("xq")  # is there when the screen first looks for keys
    with (
        open(terminal.descriptor, closefd=False) as stdin,
        open(terminal.descriptor, "w", closefd=False) as stdout,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout)
        command("top")
    assert terminal.modes == before
    terminal.wait_for(BACK)
    assert "parcels" in terminal.shown


IN_A_TERMINAL = """
import os, sys
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the terminal that sends it signals
os.execv(sys.executable, [sys.executable, "-m", "beatless", "top"])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("heeded")
def test_the_screen_is_drawn_anew_until_ctrl_c_also_while_postgres_is_away(
    beatless: Kit, beatless_app: App, beatless_services: Services, terminal: Terminal
) -> None:
    before = terminal.modes
    beatless.start_run("two_steps", queue="parcels")
    with proxy(make_url(beatless_services.database_url).port or 5432) as way:
        url = make_url(beatless_app.settings.database_url).set(host="127.0.0.1", port=way.port)
        environ = beatless_app.settings.to_env() | {
            "BEATLESS_DATABASE_URL": url.render_as_string(hide_password=False)
        }
        screen = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL],
            env=os.environ | environ,
            stdin=terminal.descriptor,
            stdout=terminal.descriptor,
            stderr=terminal.descriptor,
            start_new_session=True,
        )
        pidfd = os.pidfd_open(screen.pid)
        try:
            terminal.wait_for("parcels", pidfd)
            beatless.start_run("two_steps", queue="letters")
            terminal.press(" ")  # looks at once, however long the looks before have taken
            terminal.wait_for("letters", pidfd)
            way.cut_after = lambda: 1  # of each answer one byte comes, and no more
            way.cut()
            terminal.press(" ")
            terminal.wait_for("Postgres cannot be reached", pidfd)
            terminal.forget()
            way.cut_after = None
            beatless.start_run("two_steps", queue="cards")
            terminal.press(" ")
            terminal.wait_for("cards", pidfd)
            terminal.press("\x03")
            terminal.wait_for(BACK)
            assert screen.wait(60) == 0
        finally:
            screen.kill()
            screen.wait(60)
            os.close(pidfd)
    assert terminal.modes == before
