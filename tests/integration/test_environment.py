"""Processes in somebody else's container: its variables and its logging are not ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from beatless import App, RunState
from beatless.testing import Kit
from tests.child_logs import await_line

APP = "tests.plans:app"

ANOTHER_CELERY = {
    "APP": "shop",
    "BROKER_URL": "redis://127.0.0.1:1/0",
    "CELERY_BROKER_READ_URL": "redis://127.0.0.1:1/0",
    "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
    "CELERY_BROKER_WRITE_URL": "redis://127.0.0.1:1/0",
    "CELERY_CONFIG_MODULE": "no_such_module",
    "CELERY_LOADER": "no_such_loader",
    "CELERY_RESULT_BACKEND": "no-such-backend",
    "CONFIG_MODULE": "settings.production",
    "LOADER": "shop",
    "NO_COLOR": "please",
    "RESULT_BACKEND": "no-such-backend",
    "SKIP_CHECKS": "whatever",
    "CELERY_WORKER_CONCURRENCY": "none",
    "CELERY_WORKER_POOL": "nothing",
    "CELERY_WORKER_QUEUES": "elsewhere",
    "CELERY_WORKER_TIME_LIMIT": "0.001",
}

SILENCING = """
import logging.config

from tests.plans import app

logging.config.dictConfig({
    "version": 1,
    "formatters": {"theirs": {"format": "theirs %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "theirs"}},
    "root": {"handlers": ["console"], "level": "INFO"},
})
"""


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"grace_seconds": 0.2}


@pytest.mark.slow
def test_worker_and_relay_use_their_own_broker_whatever_another_celery_has_set(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ANOTHER_CELERY.items():
        monkeypatch.setenv(name, value)
    relay = beatless.relay_process(APP)
    worker = beatless.worker_process(APP)
    run_id = beatless.start_run("two_steps", {}).run_id

    assert beatless.wait_for_run_completion(run_id).state == RunState.COMPLETED
    for child in (relay, worker):
        said = child.log.read_text()
        assert said.count("variables of another Celery are ignored") == 1
        assert " CELERY_BROKER_URL " in said


@pytest.mark.slow
def test_celerys_own_command_takes_nothing_of_our_worker_from_the_environment(
    beatless: Kit, beatless_app: App, tmp_path: Path
) -> None:
    (tmp_path / "fleet.py").write_text("from tests.plans import app\ncelery = app.celery\n")
    path = {"BEATLESS_APP": APP, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environ = os.environ | beatless_app.settings.to_env() | path | ANOTHER_CELERY
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [Path(sys.executable).with_name("celery"), "-A", "fleet:celery", "worker", "-c1"],
            # These two it refuses by itself, before it asks for any app.
            env=environ | {"NO_COLOR": "1", "SKIP_CHECKS": "1"},
            stdout=output,
            stderr=output,
        ) as worker,
    ):
        try:
            beatless.relay_process(APP)
            run_id = beatless.start_run("two_steps", {}).run_id
            run = beatless.wait_for_run_completion(run_id)
        finally:
            worker.terminate()
            worker.wait(60)

    assert run.state == RunState.COMPLETED, log.read_text()
    assert "CELERY_WORKER_QUEUES" in log.read_text()


@pytest.mark.slow
def test_logging_that_the_apps_module_configures_silences_no_process(
    beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "silencing.py").write_text(SILENCING)
    monkeypatch.syspath_prepend(str(tmp_path))
    relay = beatless.relay_process("silencing:app")
    worker = beatless.worker_process("silencing:app", log_format="json")
    run_id = beatless.start_run("two_steps", {}).run_id
    beatless.wait_for_run_completion(run_id)

    assert "relay listens" in relay.log.read_text()
    told = [json.loads(line) for line in await_line(worker, "run finished").splitlines()]
    assert "run finished" in [line["message"] for line in told if line.get("run_id") == run_id]
    assert any(line["logger"].startswith("celery.") for line in told)


CONFIGURING_AT_START = """
import logging.config

from beatless import App, Plan, Settings, step
from celery import signals

logger = logging.getLogger("shop.steps")
off = logging.getLogger("shop.off")
off.disabled = True


@SIGNAL.connect
def configure(**_):
    logging.config.dictConfig({
        "version": 1,
        "formatters": {"theirs": {"format": "theirs %(name)s %(message)s"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "theirs"}},
        "root": {"handlers": ["console"], "level": "ERROR"},
    })


@step
def first(ctx):
    logger.info("reserved")
    off.info("not to be seen")


@step
def second(ctx): ...


app = App(Settings.from_env(), plans=[Plan("two_steps", [first, second])])
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["worker_init", "setup_logging", "worker_process_init"])
def test_logging_that_a_project_configures_while_a_worker_starts_silences_no_step(
    sent: str, beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CONFIGURING_AT_START.replace("SIGNAL", f"signals.{sent}")
    (tmp_path / "configuring.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    beatless.relay.start()
    worker = beatless.worker_process("configuring:app", log_format="json")
    run_id = beatless.start_run("two_steps", {}).run_id
    beatless.wait_for_run_completion(run_id)

    told = [json.loads(line) for line in await_line(worker, "run finished").splitlines()]
    of_run = [line["message"] for line in told if line.get("run_id") == run_id]
    assert of_run == ["run claimed", "reserved", "run finished"]


PROJECT = """
from celery import Celery, shared_task
from beatless import App, Plan, Settings, step

shop = Celery("shop")


@shared_task(name="shop.notify")
def notify(): ...


@step
def first(ctx):
    return notify.app.main


@step
def second(ctx):
    return ctx.results["first"]


app = App(Settings.from_env(), plans=[Plan("two_steps", [first, second])])
"""


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_shared_tasks_of_the_project_are_its_own_in_a_step_too(
    pool: str, beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(str(tmp_path))
    beatless.relay.start()
    beatless.worker_process("shop:app", arguments=["--", "--pool", pool])
    run_id = beatless.start_run("two_steps", {}).run_id

    assert beatless.wait_for_run_completion(run_id).result == "shop"
