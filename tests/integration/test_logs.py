"""Log lines: each of them parses, says whose it is, and gives nothing away."""

import io
import json
import logging
import logging.config
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from beatless import Plan, StepContext, step
from beatless.observe.logs import JsonLines, LogScope, TextLines, configure, masked
from beatless.orchestrator.lease import Lease
from beatless.testing import Kit

APP = "tests.plans:app"
SECRET = "a-password-that-must-not-be-seen"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What this process logs as JSON during the test."""
    stream = io.StringIO()
    restore = configure("json", stream)
    yield stream
    restore()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_is_told_line_by_line(written: io.StringIO, beatless: Kit) -> None:
    run = beatless.start_run("retries", {"failures": 1, "secret": SECRET})
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    told = [line for line in lines(written.getvalue()) if line.get("run_id") == run.run_id]

    assert [(line["message"], line.get("state")) for line in told] == [
        ("run stored", "queued"),
        ("run claimed", None),
        ("step failed", None),
        ("run waits", "queued"),
        ("run claimed", None),
        ("run finished", "completed"),
    ]
    seqs = [line["seq"] for line in told if "seq" in line]
    assert seqs == sorted(seqs)
    failed = told[2]
    assert (failed["step"], failed["attempt"], failed["level"]) == ("flaky", 1, "warning")
    assert "ValueError: attempt 1 fails" in failed["exception"]
    assert SECRET not in written.getvalue()


def test_the_users_own_lines_in_a_step_say_whose_they_are(
    written: io.StringIO, beatless: Kit
) -> None:
    run = beatless.start_run("two_steps")
    lease = Lease(run=run, token=1, trace_context={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})

    with LogScope(lease, None, 1, nullcontext()), LogScope(lease, "first", 2, nullcontext()):
        logging.getLogger("my.app").info("charging %s", "Ada", extra={"amount": 3})
    logging.getLogger("my.app").info("outside")

    inside, outside = lines(written.getvalue())[-2:]
    assert inside["message"] == "charging Ada"
    assert {name: inside[name] for name in ("run_id", "step", "attempt", "amount", "trace_id")} == {
        "run_id": run.run_id,
        "step": "first",
        "attempt": 2,
        "amount": 3,
        "trace_id": "a" * 32,
    }
    assert "run_id" not in outside


def test_passwords_and_structures_are_not_written() -> None:
    record = logging.makeLogRecord(
        {
            "msg": "no answer from postgresql://ada:%s@db/app",
            "args": (SECRET,),
            "reason": f"host=db password={SECRET} user=ada",
            "input": {"card": SECRET},
            "levelname": "ERROR",
            "name": "jobs",
        }
    )

    for form in (JsonLines(), TextLines()):
        text = form.format(record)
        assert SECRET not in text
        assert "postgresql://ada:***@db/app" in text


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("redis://:x@h redis://h/0 https://h/a:b@c", "redis://:***@h redis://h/0 https://h/a:b@c"),
        ("postgresql://ada:a@b/c@db/app", "postgresql://ada:***@db/app"),
        ("sentinel://u:p@w@one;sentinel://u:p@two", "sentinel://u:***@one;sentinel://u:***@two"),
        (
            "sentinel://one?sentinel_password=a@b&master_name=m",
            "sentinel://one?sentinel_password=***&master_name=m",
        ),
        (r"password = 'a \' b' host=db", "password = *** host=db"),
        ("host=db password=it's,a&b user=ada", "host=db password=*** user=ada"),
        ("PGPASSWORD=x psql", "PGPASSWORD=*** psql"),
        ("'host=db password=x', 5", "'host=db password=***', 5"),
        ("{'password': 'a b', 'port': 5}", "{'password': ***, 'port': 5}"),
        ("{'password': b'a b', 'port': 5}", "{'password': ***, 'port': 5}"),
        (repr({"password": "a \"b'"}), "{'password': ***}"),
        ("connect(password='a, b', port=5)", "connect(password=***, port=5)"),
        (json.dumps({"passwd": 'a " b', "port": 5}), '{"passwd": ***, "port": 5}'),
        (
            'password authentication failed for user "ada"',
            'password authentication failed for user "ada"',
        ),
        ("wrong password: see the manual", "wrong password: see the manual"),
    ],
)
def test_passwords_are_masked_however_they_are_written(said: str, told: str) -> None:
    assert masked(said) == told


def test_text_is_one_line_with_its_facts() -> None:
    record = logging.makeLogRecord(
        {"msg": "run finished", "levelname": "INFO", "name": "jobs", "seq": 13, "seconds": 0.25}
    )
    assert TextLines().format(record).endswith("INFO    jobs  run finished  seq=13  seconds=0.25")


def test_json_is_one_line_for_every_reader_of_lines() -> None:
    ends = "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r\n"
    record = logging.makeLogRecord({"msg": ends, "levelname": "INFO", "name": ends, "fact": ends})
    (line,) = JsonLines().format(record).splitlines()
    told = json.loads(line)
    assert (told["message"], told["logger"], told["fact"]) == (ends, ends, ends)


@step
def configures(ctx: StepContext) -> None:
    """As an import in its body may, or `django.setup()`."""
    logging.config.dictConfig({"version": 1, "root": {"level": "ERROR"}} | ctx.input)


@step
def says(ctx: StepContext) -> None:
    logging.getLogger("beatless.tests").info("said")


class TestLoggingThatAStepConfigures:
    @pytest.fixture
    def beatless_plans(self) -> list[Plan]:
        return [Plan("configures", [configures, says])]

    @pytest.fixture(params=[True, False])
    def disables(self, request: pytest.FixtureRequest) -> Iterator[bool]:
        loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict)]
        before = [each.disabled for each in loggers]
        yield request.param
        for each, disabled in zip(loggers, before, strict=True):
            each.disabled = disabled

    def test_silences_no_line_behind_it(
        self, written: io.StringIO, beatless: Kit, disables: bool
    ) -> None:
        run = beatless.start_run("configures", {"disable_existing_loggers": disables})
        beatless.work_until_idle()

        told = [line for line in lines(written.getvalue()) if line.get("run_id") == run.run_id]
        assert [line["message"] for line in told][-2:] == ["said", "run finished"]


@pytest.mark.slow
def test_a_whole_fleet_writes_json_and_nothing_else(beatless: Kit) -> None:
    children = [
        beatless.relay_process(APP, log_format="json"),
        beatless.worker_process(APP, log_format="json"),
        beatless._processes.start(APP, ["serve", "--port", "0"], {"log_format": "json"}),
    ]
    run = beatless.start_run("retries", {"failures": 1, "secret": SECRET})
    beatless.wait_for_event(run.run_id, "StepFailed")
    served = lines(children[2].log.read_text())[-1]
    with urllib.request.urlopen(served["url"] + "/livez", timeout=60) as response:
        assert response.status == 200
    for child in children:
        child.terminate()
    for child in children:
        child.reap(float("inf"))

    told = [line for child in children for line in lines(child.log.read_text())]

    assert {"run claimed", "step failed", "run waits", "relay listens"} <= {
        line["message"] for line in told
    }
    assert any(line["logger"].startswith("celery") for line in told)
    assert all({"ts", "level", "logger", "message"} <= line.keys() for line in told)
    assert SECRET not in "".join(child.log.read_text() for child in children)
