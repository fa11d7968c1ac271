"""The command line, in this process: what it prints, and its exit status."""

import io
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from beatless import App
from beatless.cli import run
from beatless.orchestrator.errors import RunNotFound
from beatless.testing import Kit


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def documents(self) -> list[dict]:
        """Standard output as JSON, one document a line."""
        return [json.loads(line) for line in self.out.splitlines()]


Beatless = Callable[..., Said]


class Terminal(io.StringIO):
    """The standard input of a person."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def command(
    beatless_app: App,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Beatless:
    """Runs one command with the settings of the test's app."""
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        status = run(list(arguments))
        return Said(status, *capsys.readouterr())

    return call


def refused(said: Said, status: int, *words: str) -> None:
    """One line on standard error, nothing on standard output."""
    assert said.status == status
    assert said.out == ""
    assert said.err.startswith("beatless: ")
    assert said.err.count("\n") == 1
    for word in words:
        assert word in said.err


def test_start_prints_the_id_of_the_stored_run(command: Beatless, beatless_app: App) -> None:
    said = command("start", "agents.run", "--input", '{"device": "d1"}', "--tag", "a=b")

    stored = beatless_app.client.get_run(said.out.strip())
    assert said.status == 0
    assert stored.input == {"device": "d1"}
    assert stored.tags == {"a": "b"}


def test_start_takes_every_option(command: Beatless) -> None:
    said = command(
        *("start", "agents.run", "--json", "--run-id", "mine", "--key", "k", "--queue", "default"),
        *("--delay", "5m", "--priority", "3", "--deadline", "1h"),
    )

    (run,) = said.documents
    assert (run["run_id"], run["key"], run["queue"], run["priority"]) == ("mine", "k", "default", 3)
    assert run["state"] == "queued"
    assert run["not_before"] is not None
    assert run["deadline_at"] is not None


@pytest.mark.parametrize("place", ["before", "after"])
def test_json_is_understood_before_and_after_the_command(command: Beatless, place: str) -> None:
    words = ["--json", "runs"] if place == "before" else ["runs", "--json"]
    command("start", "agents.run", "--run-id", "r")

    assert [run["run_id"] for run in command(*words).documents] == ["r"]


def test_input_comes_from_a_file_and_from_standard_input(
    command: Beatless, beatless_app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "input.json").write_text('{"device": "file"}')
    with (tmp_path / "input.json").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        piped = command("start", "agents.run", "--input", "-").out.strip()
    read = command("start", "agents.run", "--input", "@input.json").out.strip()

    for run_id in (piped, read):
        assert beatless_app.client.get_run(run_id).input == {"device": "file"}


BAD_INPUT = [
    (["start", "nosuch"], ["'nosuch'", "agents.run"]),
    (["start", "it's"], ['"it\'s"', "agents.run"]),
    (["start"], ["PLAN", "beatless start --help"]),
    (["start", "agents.run", "--bogus"], ["--bogus"]),
    (["start", "agents.run", "--input", '{"a":'], ["not JSON", "column"]),
    (["start", "agents.run", "--input", "NaN"], ["nan"]),
    (["start", "agents.run", "--input", "[" * 100_000], ["nested too deeply"]),
    (["start", "agents.run", "--input", "[" * 200 + "]" * 200], ["input", "100 levels"]),
    (["start", "agents.run", "--input", r'{"a": "\u0000"}'], ["input.a", "NUL"]),
    (["start", "agents.run", "--input", r'["\ud800"]'], ["input[0]", "surrogate"]),
    (["start", "agents.run", "--input", '"' + "x" * 10**7 + '"'], ["input", "BEATLESS_MAX"]),
    (["start", "agents.run", "--run-id", "'; DROP TABLE runs; --"], ["run_id is"]),
    (["start", "agents.run", "--run-id", "x\r\nid: 9\r\n\r\n"], ["run_id is"]),
    (["start", "agents.run", "--input", "@nowhere"], ["nowhere"]),
    (["start", "agents.run", "--run-id", "a b"], ["run_id"]),
    (["start", "agents.run", "--queue", "a b"], ["queue"]),
    (["start", "agents.run", "--key", ""], ["key"]),
    (["start", "agents.run", "--key", "\udcff"], ["UTF-8"]),
    (["start", "agents.run", "--delay", "5x"], ["5x", "30s"]),
    (["start", "agents.run", "--delay", "5s", "--at", "2030-01-01"], ["delay"]),
    (["start", "agents.run", "--at", "soon"], ["soon"]),
    (["start", "agents.run", "--tag", "x"], ["'x'"]),
    (["start", "agents.run", "--priority", "10"], ["10"]),
    (["show", "nobody"], ["nobody"]),
    (["events", "nobody"], ["nobody"]),
    (["events", "nobody", "--follow"], ["nobody"]),
    (["cancel", "nobody"], ["nobody"]),
    (["verify", "nobody"], ["nobody"]),
    (["verify"], ["--all"]),
    (["runs", "--state", "asleep"], ["asleep"]),
    (["runs", "--app", "plans"], ["module:attribute"]),
    (["runs", "--app", "no.such.module:app"], ["no.such.module"]),
    (["runs", "--app", "json:nothing"], ["nothing"]),
    (["runs", "--app", "json:dumps"], ["not an App"]),
    (["nonsense"], ["nonsense"]),
]
"""Arguments of the command, and words of what it says."""


def test_bad_input_is_one_line_and_status_2(command: Beatless, subtests: pytest.Subtests) -> None:
    for number, (arguments, words) in enumerate(BAD_INPUT):
        with subtests.test(number=number, words=words):
            refused(command(*arguments), 2, *words)


def test_an_id_used_twice_with_other_content_is_refused(command: Beatless) -> None:
    first = command("start", "agents.run", "--run-id", "r", "--input", "{}")
    again = command("start", "agents.run", "--run-id", "r", "--input", "{}")
    other = command("start", "agents.run", "--run-id", "r", "--input", "[]")

    assert (first.status, again.status) == (0, 0)
    refused(other, 2, "r", "input")


def test_unknown_settings_are_refused(command: Beatless, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEATLESS_REDIS_ULR", "redis://127.0.0.1")

    refused(command("runs"), 2, "BEATLESS_REDIS_ULR")


def test_without_settings_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BEATLESS_DATABASE_URL", "BEATLESS_REDIS_URL", "BEATLESS_APP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    refused(Said(run(["runs"]), *capsys.readouterr()), 2, "BEATLESS_DATABASE_URL", "beatless dev")


@pytest.mark.parametrize("arguments", [["runs"], ["start", "agents.run"], ["migrate"], ["relay"]])
def test_an_absent_postgres_is_one_line_and_status_3(
    command: Beatless, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    for name in ("DATABASE", "LISTEN"):
        monkeypatch.setenv(f"BEATLESS_{name}_URL", "postgresql://nobody@127.0.0.1:1/nothing")

    refused(command(*arguments), 3, "Postgres cannot be reached")


def test_an_absent_redis_stops_a_relay_with_status_3_and_a_start_not_at_all(
    command: Beatless, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("BEATLESS_BROKER_URL", "redis://127.0.0.1:1/0")

    assert command("start", "agents.run").status == 0
    refused(command("relay"), 3, "Redis cannot be reached")


def test_an_app_whose_module_raises_is_named(command: Beatless, tmp_path: Path) -> None:
    (tmp_path / "app_that_raises.py").write_text("1 / 0")

    refused(command("runs", "--app", "app_that_raises:app"), 1, "ZeroDivisionError")
    refused(command("runs", "--app", "nosuch.place:app"), 2, "--app names the module nosuch.place")


def test_follow_streams_the_13_events_and_ends(command: Beatless, beatless: Kit) -> None:
    command("start", "agents.run", "--run-id", "r")
    beatless.work_until_idle()

    said = command("events", "r", "--follow", "--json")

    assert said.status == 0
    assert [event["seq"] for event in said.documents] == list(range(1, 14))
    assert said.documents == command("events", "r", "--json").documents
    assert [e["seq"] for e in command("events", "r", "--from-seq", "11", "--json").documents] == [
        12,
        13,
    ]


def test_follow_of_a_failed_run_ends_with_status_1(command: Beatless, beatless: Kit) -> None:
    beatless.start_run("fatally", run_id="r")
    beatless.work_until_idle()

    said = command("events", "r", "--follow")

    assert said.status == 1
    assert "RunFinished      failed: no use trying again" in said.out


def test_a_stream_that_outlives_its_timeout_ends_with_status_1(command: Beatless) -> None:
    said = command("start", "agents.run", "--follow", "--timeout", "200ms", "--json")

    assert said.status == 1
    assert [event["type"] for event in said.documents] == ["RunStarted"]
    assert "did not end within 0.2 s" in said.err.splitlines()[-1]


def test_a_start_into_a_queue_that_nobody_knows_says_so(command: Beatless) -> None:
    said = command("start", "agents.run", "--queue", "lsow")
    assert "no plan names the queue lsow, and no worker consumes it now" in said.err
    assert command("start", "agents.run", "--queue", "default").err == ""


def test_a_failed_run_is_one_line_of_the_dead_letters(command: Beatless, beatless: Kit) -> None:
    beatless.start_run("agents.run", 7, run_id="r")
    beatless.work_until_idle()
    error = json.dumps({"type": "DatabaseError", "message": "one\ntwo\x1b[2J"})
    with beatless.app.engine.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE {beatless.app.settings.schema}.runs SET error = %(error)s", {"error": error}
        )
    (line,) = command("dead-letters").out.splitlines()
    assert line.endswith("DatabaseError: one two\ufffd[2J")


def test_a_signal_is_sent_once_for_its_key(command: Beatless) -> None:
    command("start", "agents.run", "--run-id", "r")
    signal = ["signal", "r", "paid", "--key", "psp:1"]
    assert command(*signal, "--data", '{"amount": 12}').out == "paid is sent to r\n"
    assert command(*signal, "--data", '{"amount": 12}').out == "paid was sent before to r\n"
    assert command(*signal, "--data", "{").status == 2
    assert command("signal", "nobody", "paid").status != 0


def test_cancel_ends_a_waiting_run(command: Beatless) -> None:
    command("start", "agents.run", "--run-id", "r")

    assert command("cancel", "r", "--reason", "changed my mind").out == "r is cancelled\n"
    assert command("show", "r", "--json").documents[0]["state"] == "cancelled"
    assert "cancel_reason       changed my mind\n" in command("show", "r").out
    assert command("cancel", "r").status == 0


def test_show_and_runs_are_readable(command: Beatless, beatless: Kit) -> None:
    command("start", "agents.run", "--run-id", "r:key:x")
    command("start", "agents.run", "--run-id", "r" * 128, "--input", "7")
    beatless.work_until_idle()

    sheet = command("show", "r" * 128).out
    assert "state               failed\n" in sheet
    assert "claims              1\n" in sheet
    table = command("runs").out.splitlines()
    assert len(table) == 3
    assert table[1].split()[:3] == ["r" * 128, "failed", "agents.run"]


def test_runs_filters(command: Beatless) -> None:
    command("start", "agents.run", "--run-id", "a", "--tag", "team=x")
    command("start", "agents.run", "--run-id", "b")
    command("cancel", "b")

    assert [r["run_id"] for r in command("runs", "--json", "--tag", "team=x").documents] == ["a"]
    assert [r["run_id"] for r in command("runs", "--json", "--state", "cancelled").documents] == [
        "b"
    ]
    assert command("runs", "--json", "--plan", "code_census").documents == []


def test_migrate_says_where_the_schema_is(command: Beatless, beatless_app: App) -> None:
    schema = beatless_app.settings.schema

    assert command("migrate", "--json").documents[0]["schema"] == schema
    assert command("migrate", "--check").status == 0
    assert f'CREATE SCHEMA IF NOT EXISTS "{schema}"' in command("migrate", "--sql").out


def test_sql_since_a_revision_that_there_is_not_is_refused(
    command: Beatless, subtests: pytest.Subtests
) -> None:
    for since in ("9999", "head", "1", "0001:0002", "", "-1"):
        with subtests.test(repr(since)):
            refused(command("migrate", "--sql", "--since", since), 2, "--since", "0001, 0002")


def test_migrate_check_fails_on_an_empty_schema(
    command: Beatless, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_SCHEMA", "nothing_here")

    refused(command("migrate", "--check"), 1, "nothing_here", "beatless migrate")
    refused(command("start", "agents.run"), 1, "nothing_here", "beatless migrate")


@pytest.mark.parametrize(
    "arguments",
    [
        ["token", "ls"],
        ["token", "create", "--scope", "admin"],
        ["token", "create", "--scope", "admin", "--unless-any"],
        ["token", "revoke", "none"],
        ["verify", "--all"],
        ["plan", "check"],
        ["explain", "none"],
    ],
    ids=" ".join,
)
def test_commands_on_a_schema_that_is_not_migrated_ask_for_that(
    command: Beatless, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("BEATLESS_SCHEMA", "nothing_here")

    refused(command(*arguments), 1, "nothing_here", "run `beatless migrate`")


def test_what_a_run_carries_cannot_command_the_terminal(command: Beatless, beatless: Kit) -> None:
    command(
        "start", "agents.run", "--run-id", "r", "--input", '{"device": "\\u001b[31m[red]:key:"}'
    )
    beatless.work_until_idle()

    out = command("events", "r").out
    assert "\x1b" not in out
    assert "[red]:key:" in out


def test_a_json_document_is_one_line_for_every_reader_of_lines(
    command: Beatless, beatless: Kit
) -> None:
    ends = "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r\n"
    run_id = beatless.start_run("two_steps", {"text": ends}).run_id

    for arguments in (["show", run_id], ["runs"]):
        (line,) = command("--json", *arguments).out.splitlines()
        assert ends in list(walked(json.loads(line)))


def walked(value: Any) -> Iterator[str]:
    """The texts in a JSON value."""
    match value:
        case dict():
            for each in value.values():
                yield from walked(each)
        case list():
            for each in value:
                yield from walked(each)
        case str():
            yield value


def test_clean_counts_and_then_takes_away(command: Beatless, beatless: Kit) -> None:
    beatless.start_run("two_steps")
    beatless.work_until_idle()
    beatless.advance(2 * 86_400)
    arguments = ["clean", "--state", "completed", "--older-than", "1d"]

    said = command(*arguments, "--dry-run")
    assert said.out == "1 runs with 6 events\n", said.err
    (counted,) = command(*arguments, "--dry-run", "--json").documents
    assert counted == {"runs": 1, "events": 6}
    assert command(*arguments).out == "1\n"
    assert command(*arguments, "--dry-run").out == "0 runs with 0 events\n"


@pytest.mark.parametrize("age", ["5", "0", "1.5"])
def test_an_age_to_clean_by_has_a_unit(command: Beatless, beatless: Kit, age: str) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    beatless.advance(10)

    said = command("clean", "--state", "completed", "--older-than", age)

    refused(said, 2, f"--older-than is '{age}', without a unit", "5m or 7d")
    assert beatless.client.get_run(run.run_id)


def test_obliterate_asks_on_a_terminal_and_says_how_much_is_gone(
    command: Beatless, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = beatless.start_run("two_steps", queue="gone").run_id
    beatless.start_run("two_steps", queue="gone")
    beatless.work_until_idle()
    terminal = Terminal("n\n")
    monkeypatch.setattr("sys.stdin", terminal)

    said = command("obliterate", "gone")

    assert "Take away queue gone, 2 runs and their events?" in said.err
    assert said.err.endswith("nothing is removed\n")
    assert (said.status, said.out) == (1, "")
    assert beatless.client.get_run(run_id)
    said = command("obliterate", "gone", "--yes")
    assert said.out == "2\n"
    assert said.err == "queue gone is removed, and its runs with their events: 2\n"
    with pytest.raises(RunNotFound):
        beatless.client.get_run(run_id)


def test_a_dry_obliterate_counts_and_takes_nothing_away(
    command: Beatless, beatless: Kit, beatless_app: App
) -> None:
    ended, running = (beatless.start_run("two_steps", queue="gone") for _ in range(2))
    beatless_app.client_for("acme").start_run("two_steps", queue="gone")
    while beatless.step(ended.run_id):
        pass
    with beatless.crash("step.effect_done"):
        beatless.step(running.run_id)

    said = command("obliterate", "gone", "--dry-run")

    assert said.out == "3 runs, 1 of them running\n"
    assert said.err == "while they are running it is refused without --force\n"
    (counted,) = command("--json", "obliterate", "gone", "--dry-run", "--force").documents
    assert counted == {"runs": 3, "running": 1}
    assert len(beatless.client.list_runs(queue="gone")) == 2
    refused(command("obliterate", "gnoe", "--dry-run"), 2, "queue is 'gnoe', which no plan names")


def test_queues_say_that_they_count_the_runs_of_all_namespaces(
    command: Beatless, beatless: Kit, beatless_app: App
) -> None:
    beatless.start_run("two_steps")
    assert command("queues").err == ""
    beatless_app.client_for("acme").start_run("two_steps")
    assert " ".join(command("queues").err.split()) == (
        "these are the runs of all namespaces, acme too; `beatless runs` has those of default"
    )


def test_drain_counts_or_asks_before_it_deletes(
    command: Beatless, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = beatless.start_run("two_steps", queue="full").run_id
    beatless.work_until_idle()
    beatless.start_run("two_steps", queue="full")

    assert command("drain", "full", "--dry-run").out == "1 run\n"
    beatless.start_run("two_steps", queue="full", delay=3600)
    (counted,) = command("--json", "drain", "full", "--dry-run").documents
    assert counted == {"runs": 2}
    refused(command("drain", "flul", "--dry-run"), 2, "queue is 'flul', which no plan names")
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    said = command("drain", "full")
    assert "Delete 2 runs of queue full and their events?" in said.err
    assert (said.status, said.out) == (1, "")
    assert len(beatless.client.list_runs(queue="full")) == 3
    assert command("drain", "full", "--yes").out == "2\n"
    assert [run.run_id for run in beatless.client.list_runs(queue="full")] == [ended]


def test_drain_without_a_terminal_asks_nothing(
    command: Beatless, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    beatless.start_run("two_steps", queue="full")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command("--json", "drain", "full").documents == [{"removed": 1}]


def test_dev_of_an_app_that_is_not_there_starts_nothing(
    command: Beatless, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, problem in (
        ("absent_shop.app:app", "names the module absent_shop.app, which cannot be found from"),
        ("absent_shop", "is 'absent_shop', which is not module:attribute"),
    ):
        refused(command("--app", name, "dev"), 2, problem)
    assert list(tmp_path.iterdir()) == []


def test_obliterate_without_a_terminal_asks_nothing(
    command: Beatless, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    beatless.start_run("two_steps", queue="gone")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert command("--json", "obliterate", "gone").documents == [{"removed": 1}]


def test_an_input_without_its_option_is_told_where_it_goes(command: Beatless) -> None:
    refused(command("start", "agents.run", "{}"), 2, "unexpected argument '{}'", "--input JSON")


def test_a_number_that_is_no_dead_letter_is_not_taken_for_a_run(command: Beatless) -> None:
    for verb in ("discard", "requeue", "show"):
        said = command("dead-letters", verb, "99999")
        refused(said, 2, "99999 is neither the number of a message nor the id of a run")
    refused(command("dead-letters", "discard", "nine"), 2, "no run has id 'nine'")


@pytest.mark.parametrize("pool", ["prefork", "async"])
def test_a_worker_whose_metrics_port_is_taken_does_not_start(
    command: Beatless, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    monkeypatch.setenv("BEATLESS_METRICS_PORT", "0")  # the option writes it, and it goes at the end
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = command("worker", "--pool", pool, "--metrics-port", port)
    refused(
        said, 2, f"BEATLESS_METRICS_PORT is {port}", "cannot be served: Address already in use;"
    )


def test_a_worker_of_a_queue_that_no_plan_names_says_so(
    command: Beatless, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumed: list[dict[str, int]] = []

    def run_worker(*_: object, queues: dict[str, int], **__: object) -> int:
        consumed.append(queues)
        return 0

    monkeypatch.setattr("beatless.worker.run.run_worker", run_worker)
    said = command("worker", "--queues", "default,fsat=2")
    assert "no plan names the queue fsat: its runs are those that are started with it" in said.err
    assert "the queue default" not in said.err
    assert consumed == [{"default": 1, "fsat": 2}]


@pytest.mark.parametrize(
    "given", [["-Q", "slow"], ["-Qslow"], ["--", "-Q", "slow"], ["--", "--queues=slow"]]
)
def test_the_queues_option_of_celery_is_refused_for_ours(
    command: Beatless, given: list[str]
) -> None:
    refused(command("worker", *given), 2, "is Celery's: use --queues slow")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--", "--pool", "async"], ["--pool is Celery's", "no pool async: give it before any --"]),
        (["--", "-P", "gevent"], ["-P has 'gevent'", "use prefork, threads, solo or async"]),
        (["--", "--pool=eventlet"], ["--pool has 'eventlet'", "which executes no runs"]),
    ],
)
def test_a_pool_of_celery_that_executes_no_runs_is_refused(
    command: Beatless, given: list[str], told: list[str]
) -> None:
    refused(command("worker", *given), 2, *told)


def test_the_events_of_a_pruned_run_are_refused_in_a_line(
    command: Beatless, beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    beatless.advance(31 * 86_400)
    (retention,) = beatless_app.chores()
    with beatless_app.direct_connection() as session:
        retention.step(session)

    for arguments in (["events", run.run_id], ["events", run.run_id, "--follow"]):
        refused(command(*arguments), 1, run.run_id, "were removed after the retention time")
    assert command("show", run.run_id).status == 0
    assert "events 1 to 6 were removed" in command("explain", run.run_id).out


def give_up(postgres: psycopg.Connection, run_ids: list[str]) -> None:
    """As if the last attempts of these runs had failed."""
    error = {"type": "Fatal", "message": "with one", "traceback": "in half_second"}
    postgres.execute(
        """
WITH failed AS (
  UPDATE runs SET state = 'failed', finished_at = clock_timestamp(), error = %s,
                  last_seq = last_seq + 1
   WHERE run_id = ANY(%s) RETURNING run_id, last_seq
)
INSERT INTO run_events (run_id, seq, type, source, data)
SELECT run_id, last_seq, 'RunFinished', 'worker', '{"outcome": "failed"}' FROM failed""",
        (json.dumps(error), run_ids),
    )


def test_failed_runs_are_dead_letters_until_they_are_retried_or_removed(
    command: Beatless, beatless_app: App, postgres: psycopg.Connection
) -> None:
    client = beatless_app.client
    runs = [
        client.start_run("agents.run", queue=queue).run_id for queue in ("slow", "default", "slow")
    ]
    for run_id in runs:
        give_up(postgres, [run_id])

    listed = command("--json", "dead-letters").documents
    assert [(letter["kind"], letter["run_id"]) for letter in listed] == [
        ("run", run_id) for run_id in runs
    ]
    assert f"{runs[1]}  run of agents.run  queue default" in command("dead-letters", "ls").out
    for filters, chosen in (
        (("--queue", "slow"), [runs[0], runs[2]]),
        (("--error", "FATAL: with ONE"), runs),
        (("--plan", "agents.run", "--limit", "1"), runs[:1]),
        (("--error", "something else"), []),
        (("--within", "1h"), runs),
    ):
        said = command("--json", "dead-letters", "ls", *filters)
        assert [letter["run_id"] for letter in said.documents] == chosen, filters
    assert command("dead-letters", "show", runs[0]).out == "in half_second\n"

    (new,) = command("dead-letters", "requeue", runs[1]).out.split()
    assert client.get_run(new).retry_of == runs[1]
    both = command("dead-letters", "requeue", "--all", "--queue", "slow").out.split()
    assert [client.get_run(run_id).retry_of for run_id in both] == [runs[0], runs[2]]
    assert command("--json", "dead-letters").documents == []

    give_up(postgres, [new, *both])
    assert command("dead-letters", "discard", new).status == 0
    left = [letter["run_id"] for letter in command("--json", "dead-letters").documents]
    assert sorted(left) == sorted([runs[1], *both])  # its retry is gone, so it waits again
    assert command("dead-letters", "requeue").status == 2
    assert command("dead-letters", "requeue", runs[1], "--queue", "slow").status == 2


def test_requeue_all_says_that_no_run_failed_and_how_many_messages_there_are(
    command: Beatless, beatless_app: App, postgres: psycopg.Connection
) -> None:
    requeue = ["dead-letters", "requeue", "--all"]
    assert command(*requeue).err == "no failed runs\n"
    run = beatless_app.client.start_run("agents.run")
    postgres.execute(
        "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES"
        """ ('event', %s, 'NOPERM', '{"shard": 1, "from_seq": 1, "to_seq": 1}')""",
        [run.run_id],
    )
    assert command(*requeue).err == "no failed runs; 1 message: --messages\n"
    assert command(*requeue, "--queue", "slow").err == "no failed runs that the options choose\n"


def test_many_messages_are_requeued(
    command: Beatless, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless_app.client.start_run("agents.run")
    for reason in ("NOPERM", "too large", "noperm"):
        postgres.execute(
            "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES"
            """ ('event', %s, %s, '{"shard": 1, "from_seq": 1, "to_seq": 1}')""",
            [run.run_id, reason],
        )
    requeue = ("dead-letters", "requeue", "--messages")
    assert command(*requeue, "--error", "NoPerm").out == "2\n"
    assert command("--json", *requeue).documents == [{"requeued": 1}]
    assert command(*requeue, "--queue", "q").status == 2
    assert command(*requeue, "--all").status == 2


def test_requeue_tells_which_runs_cannot_be_retried(
    command: Beatless, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless_app.client.start_run("agents.run")
    give_up(postgres, [run.run_id])
    postgres.execute("UPDATE runs SET plan = 'gone'")

    said = command("dead-letters", "requeue", "--all")

    assert (said.status, said.out) == (1, "")
    assert "gone" in said.err
    assert [one.run_id for one in beatless_app.client.failed_runs()] == [run.run_id]


def test_a_command_that_is_mistyped_is_told(command: Beatless) -> None:
    said = command("rusn")
    assert said.status == 2
    assert "'rusn'" in said.err
    assert "'runs'" in said.err


def test_tables_and_advice_are_never_cut_off(
    command: Beatless, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("20", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        queue = "a-queue-whose-name-is-as-long-as-it-may-be-and-even-longer-12345"
        beatless.start_run("agents.run", queue=queue)
        beatless.client.pause_queue(queue)

        head, row, *_ = command("queues").out.splitlines()
        counts = ["queued", "delayed", "waiting", "active", "completed", "failed", "cancelled"]
        assert head.split() == [
            "queue",
            "age",
            "after",
            *counts,
            "oldest",
            "per",
            "minute",
            "workers",
        ]
        assert row.startswith(f"{queue}  paused")
        assert row.endswith("0")
        assert "…" not in row

        head, row, *_ = command("runs").out.splitlines()
        assert head.split() == ["run", "state", "plan", "queue", "events", "age"]
        assert queue in row

        told = command("doctor", "--check", "relays").out
        assert "→ start `beatless relay`, two of them on different machines\n" in told


def test_a_check_of_doctor_that_there_is_not_is_refused(command: Beatless) -> None:
    refused(command("doctor", "--check", "relay"), 2, "'relay'", "postgres", "relays", "canary")


def test_people_can_tell_that_the_database_is_a_copy(command: Beatless, beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    epoch = beatless.client.epoch()

    assert command("migrate").status == 0
    assert beatless.client.epoch() == epoch
    restored = command("migrate", "--restored")
    assert restored.status == 0
    assert restored.out.rstrip().endswith(", and a new history has begun")

    after = beatless.client.epoch()
    assert after.rpartition("t")[0] != epoch.rpartition("t")[0]
    assert after.rpartition("t")[2] == epoch.rpartition("t")[2]
    assert len(beatless.collect_stream(run.run_id)) == 6


def test_a_whole_id_names_the_namespace_of_its_run(
    command: Beatless, beatless: Kit, beatless_app: App
) -> None:
    acme = beatless_app.client_for("acme")
    run_id = acme.start_run("agents.run", {"device": "d1"}).run_id
    for name in ("show", "events", "explain", "verify"):
        assert command(name, run_id).status == 0
    assert command("cancel", run_id).err == ""
    assert acme.get_run(run_id).state == "cancelled"
    again = command("retry", run_id).out.strip()
    assert acme.get_run(again).retry_of == run_id
    assert command("remove", run_id).status == 0
    refused(command("show", run_id), 2, f"no run has id '{run_id}'")


def test_runs_of_a_namespace_are_started_listed_and_cleaned(
    command: Beatless, beatless_app: App
) -> None:
    run_id = command("start", "agents.run", "--namespace", "acme", "--run-id", "x").out.strip()
    assert run_id == "acme~x"
    nothing = command("runs", "--json")
    assert nothing.documents == []
    assert "runs of namespace default; there are runs in others, as --namespace acme" in nothing.err
    assert "--namespace acme" in command("runs", "--namespace", "zeta").err
    assert command("runs", "--namespace", "acme", "--state", "failed").err == ""
    (listed,) = command("runs", "--namespace", "acme", "--json").documents
    assert listed["run_id"] == run_id
    assert command("cancel", run_id).status == 0
    older = ("clean", "--state", "cancelled", "--older-than", "0s")
    assert command(*older).out == "0\n"
    assert command(*older, "--namespace", "acme").out == "1\n"
    refused(command("runs", "--namespace", "Acme Corp"), 2, "namespace is 'Acme Corp'")


def test_failed_runs_of_a_namespace_are_dead_letters_of_it(
    command: Beatless, beatless_app: App, postgres: psycopg.Connection
) -> None:
    acme = beatless_app.client_for("acme")
    run_id = acme.start_run("agents.run").run_id
    give_up(postgres, [run_id])
    assert command("dead-letters", "ls").out == ""
    assert command("dead-letters", "ls", "--namespace", "acme").out.startswith(run_id)
    assert command("dead-letters", "show", run_id).status == 0
    new = command("dead-letters", "requeue", "--all", "--namespace", "acme").out.strip()
    assert acme.get_run(new).retry_of == run_id


def test_a_pause_of_a_queue_that_nothing_knows_says_so(command: Beatless) -> None:
    paused = command("pause", "defualt").err
    assert "no plan names the queue defualt" in paused
    assert "`beatless resume defualt`" in paused
    assert command("pause", "default").err == "queue default is paused\n"
    command("start", "agents.run", "--queue", "mail")
    assert command("pause", "mail").err == "queue mail is paused\n"


def test_a_cancel_tells_what_ends_the_run(
    command: Beatless, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_APP", "tests.plans:app")
    run_id = beatless.start_run("compensated").run_id
    beatless.step(run_id)
    said = command("cancel", run_id).out
    assert said == (
        f"{run_id} will end when it is undone: by the on_cancel step of its plan, or of its steps\n"
    )
