"""Arguments of a wrong type: the error is raised by beatless, and says what to give."""

import linecache
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

import beatless
from beatless import App, Goto, Plan, RunRequest, Settings, plan, retry, step, wait
from beatless.api import create_api
from beatless.cli import run
from beatless.cli.environment import load
from beatless.errors import BadRequest, BadSetting
from beatless.http import Client as HttpClient
from beatless.orchestrator.outcomes import PlanError

PACKAGE = Path(beatless.__file__).resolve().parents[1]

celery = Celery("shop")


@celery.task(shared=False)
def send_mail(order: int) -> None: ...


@step
def charge(ctx: Any) -> None: ...


@step
def undo(ctx: Any) -> None: ...


def fulfil(run: Any) -> None: ...


checkout = Plan("checkout", [charge])
SETTINGS = Settings(
    database_url="postgresql://shop@db.example/shop", redis_url="redis://redis.example:6379/0"
)


@pytest.fixture
def app() -> Iterator[App]:
    made = App(SETTINGS, plans=[checkout])
    yield made
    made.close()


OTHERS = {
    "None": None,
    "a number": 7,
    "text": "checkout",
    "an object": object(),
    "a function": fulfil,
    "a step": undo,
    "a plan": checkout,
    "a class": Plan,
    "a task": send_mail,
    "a Celery app": celery,
    "a moment": datetime(2030, 1, 1, tzinfo=UTC),
    "a list of functions": [fulfil],
    "a list of texts": ["checkout"],
    "a list of None": [None],
    "a list of steps": [undo],
    "a list of tasks": [send_mail],
    "a mapping": {"charge": 7},
    "a mapping of numbers": {1: [2]},
}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "App": (App, {"settings": SETTINGS, "plans": []}, "settings plans on_failure redact"),
    "Plan": (
        Plan,
        {"name": "p", "steps": [charge]},
        "name steps routes queue on_cancel default_input renamed",
    ),
    "step": (
        lambda function=fulfil, **options: step(**options)(function),
        {},
        "function name timeout retry",
    ),
    "plan": (
        lambda name="p", function=fulfil, **options: plan(name, **options)(function),
        {},
        "name function input version on_cancel default_input renamed",
    ),
    "Plan.task": (Plan.task, {"task": send_mail}, "task name arguments timeout retry"),
    "retry": (retry, {}, "max_attempts backoff initial cap jitter max_crashes"),
    "wait": (
        lambda signal="paid", **options: wait(signal, **options),
        {},
        "signal timeout on_timeout name",
    ),
    "create_api": (create_api, {"app": None}, "app"),
    "Settings": (
        Settings,
        {"database_url": SETTINGS.database_url, "redis_url": SETTINGS.redis_url},
        "database_url redis_url broker_url schema prefix lease_seconds retention_days metrics_port",
    ),
    "RunRequest": (RunRequest, {"plan": "checkout"}, "plan"),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_a_wrong_type_is_refused_by_beatless_itself(name: str) -> None:
    call, rest, arguments = CALLS[name]
    found = {
        f"{argument} is {kind}": refused_elsewhere(partial(call, **{**rest, argument: given}))
        for argument in arguments.split()
        for kind, given in OTHERS.items()
    }
    assert {case: where for case, where in found.items() if where} == {}


def refused_elsewhere(act: Callable[[], object]) -> str:
    """The error that is none of ours, or not raised by our code; "" if there is none."""
    try:
        act()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        ours = isinstance(error, (TypeError, ValueError, beatless.JobsError))
        if not (
            ours and PACKAGE in Path(last.filename).resolve().parents and line.startswith("raise")
        ):
            return f"{error!r} of: {line}"
    return ""


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (lambda: App(SETTINGS, plans=[fulfil]), r"decorate the function with @plan\(\"fulfil\"\)"),
        (lambda: App(SETTINGS, plans="checkout"), r"give a list: App\(settings, plans=\["),
        (lambda: App(SETTINGS, plans=[charge]), r'into a plan: Plan\("charge", \[charge\]\)'),
        (lambda: App(SETTINGS, plans=[send_mail]), r"a step of a plan: .*Plan\.task"),
        (lambda: App(SETTINGS, plans=["checkout"]), "which is no plan: give it a Plan"),
        (lambda: App("postgresql://shop@db.example/shop", plans=[]), r"App\(Settings\.from_env"),
        (lambda: Plan.task(fulfil), r"no task of Celery's; .* by @step, .* by @celery\.task"),
        (lambda: Plan.task(charge), "a step already"),
        (lambda: step(send_mail), r"Plan\.task\(send_mail\)"),
        (lambda: Plan("p", [send_mail]), r"put Plan\.task\(send_mail\) in its place"),
        (lambda: Plan("p", [charge], on_cancel=send_mail), r"put Plan\.task\(send_mail\)"),
        (lambda: plan("p")(send_mail), r"is a task of Celery's: .*Plan\.task"),
        (lambda: Plan("p", [checkout]), r'is a plan; .* child\("checkout", …\)'),
        (lambda: Plan("p", charge), r"is no list of steps: Plan\(\"p\", \["),
        (
            lambda: Plan("p", [Plan.task(send_mail), Plan.task(send_mail)]),
            r'two steps called send_mail; give one another name: .*Plan\.task\(task, name="…"\)',
        ),
        (lambda: retry(max_attempts="3"), "max_attempts is '3', which is not a number of 1"),
        (lambda: create_api(celery), r"give it the App itself, as in create_api\(app\)"),
    ],
)
def test_the_error_says_what_to_give(wrong: Callable[[], Any], advice: str) -> None:
    with pytest.raises((TypeError, ValueError), match=advice):
        wrong()


def test_a_list_of_plans_may_be_anything_that_gives_them() -> None:
    made = App(SETTINGS, plans=(each for each in [checkout]))
    assert list(made.plans) == ["checkout"]
    made.close()


def test_a_task_of_celery_is_no_step_by_a_partial_or_a_name_either() -> None:
    for given in (partial(send_mail, 7), partial(partial(send_mail))):
        with pytest.raises(PlanError, match=r"Plan\.task\(send_mail\)"):
            step(name="mail")(given)


def test_the_function_of_a_task_may_be_a_step() -> None:
    """`run` is the function alone, without Celery's request."""
    assert step(name="mail")(send_mail.run).name == "mail"


@pytest.mark.parametrize("given", [checkout, plan("fulfil")(fulfil), 7, None, ["checkout"]])
def test_a_run_is_started_by_the_name_of_its_plan(app: App, given: Any) -> None:
    with pytest.raises(BadRequest, match=r"plan is .*; give the name of one, as in start_run\("):
        app.client.start_run(given)
    with pytest.raises(BadRequest, match=r"plan is .*; give the name of one"):
        RunRequest(plan=given)


def test_an_option_that_start_run_does_not_have_is_named_with_those_it_has(app: App) -> None:
    told = r"start_run has no option idempotency_key; it has: run_id, key, .*priority, tags"
    for client in (app.client, HttpClient("http://127.0.0.1:9")):
        with pytest.raises(TypeError, match=told):
            client.start_run("checkout", idempotency_key="order:1")


def test_a_session_is_for_connection_where_start_run_has_it(app: App) -> None:
    with pytest.raises(TypeError, match=r"session; it has: .*, connection \(.*takes a session too"):
        app.client.start_run("checkout", session=None)
    with pytest.raises(TypeError, match=r"conection \(did you mean connection\?\); it has: run_id"):
        app.client.start_run("checkout", conection=None)
    with pytest.raises(TypeError) as raised:
        HttpClient("http://127.0.0.1:9").start_run("checkout", session=None)
    assert "connection" not in str(raised.value)


@pytest.mark.parametrize("given", ["checkout", checkout, [checkout], ["checkout"], 7])
def test_many_runs_are_started_by_requests(app: App, given: Any) -> None:
    with pytest.raises(TypeError, match="start_runs takes a list of RunRequest"):
        app.client.start_runs(given)


@pytest.mark.parametrize("name", ["delay", "deadline"])
@pytest.mark.parametrize("given", ["5m", datetime(2030, 1, 1, tzinfo=UTC), Goto("x")])
def test_a_duration_is_seconds_or_a_timedelta(app: App, name: str, given: Any) -> None:
    with pytest.raises(BadRequest, match=rf"{name} is .*: give seconds, as 90, or a timedelta"):
        app.client.start_run("checkout", **{name: given})


@pytest.mark.parametrize("setting", ["--app", "BEATLESS_APP", "beatless_app"])
@pytest.mark.parametrize("name", ["shop", "no_such_module:app", "json:shop", "json:dumps"])
def test_a_name_that_is_no_app_is_an_error_of_the_setting_that_gave_it(
    setting: str, name: str
) -> None:
    with pytest.raises(BadSetting, match=f"^{setting} .*; for example {setting}=myproject"):
        load(name, setting)


def test_the_celery_app_in_place_of_the_app_is_told_from_it() -> None:
    with pytest.raises(BadSetting, match="it is a Celery app, and the App is what"):
        load(f"{__name__}:celery", "--app")


def test_the_option_is_named_also_where_the_environment_names_another_app(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BEATLESS_APP", "beatless.demo:nothing")
    assert run(["--app", "json:dumps", "plan", "show", "checkout"]) == 2
    assert "--app names json:dumps" in capsys.readouterr().err
    assert run(["plan", "show", "checkout"]) == 2
    assert "BEATLESS_APP names beatless.demo:nothing" in capsys.readouterr().err
