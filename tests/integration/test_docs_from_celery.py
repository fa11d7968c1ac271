"""docs/from-celery.md: its project works, and the command prints what stands there."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import _state
from celery.app import builtins

from beatless import Limit, Plan
from beatless.cli import run
from beatless.testing import Kit

TEXT = (Path(__file__).parents[2] / "docs" / "from-celery.md").read_text()
BLOCKS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE))
PRINTED = TEXT.partition("from-celery store.tasks:celery\n")[2].partition("```")[0]


ODD = {
    "odd/__init__.py": "",
    "odd/main.py": """
from celery import Celery

app = Celery("odd", include=["odd.tasks", "odd.shared"])
SLOW = {"queue": "slow", "priority": 3}
app.conf.task_routes = [lambda name, *_, **__: SLOW if name == "slowly" else None]
app.conf.task_soft_time_limit = 60
""",
    "odd/lost.py": """
from celery import Celery

app = Celery("lost", include=["odd.nowhere"])
""",
    "odd/unset.py": """
import os

os.environ["ODD_URL_THAT_IS_UNSET"]
""",
    "odd/unset_tasks.py": """
from celery import Celery

app = Celery("unset", include=["odd.unset"])
""",
    "odd/unrouted.py": """
from celery import Celery

app = Celery("unrouted")
app.conf.task_create_missing_queues = False
app.conf.task_routes = {"odd.unrouted.*": "nowhere"}

@app.task
def one(): ...
""",
    "odd/shared.py": """
from celery import shared_task

@shared_task
def mail(to):
    raise AssertionError("a task is called")
""",
    "odd/tasks.py": """
from celery import Task, group
from odd.main import app

class Told(Task):
    def on_failure(self, *args): ...

@app.task(bind=True, base=Told, max_retries=None, default_retry_delay=7, time_limit=30)
def fetch(self, url):
    raise self.retry(countdown=3)

@app.task(autoretry_for=(Exception,), retry_kwargs={"max_retries": 2, "countdown": 5})
def mail(to):
    def later():
        group(fetch.s(to)).delay()

@app.task(name="slowly", rate_limit=2, expires=60)
def slow(): ...

@app.task(name="odd name/é", rate_limit="0.5/m")
def odd(): ...

class Importer(Task):
    name = "odd.Importer"
    def run(self, path):
        return self.replace(fetch.s(path))

app.register_task(Importer())
""",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package of the page, and that of odd tasks. Once: Celery keeps tasks for later apps."""
    place = tmp_path_factory.mktemp("celery")
    for name, text in (BLOCKS | ODD).items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    shared = _state._on_app_finalizers  # tasks of other tests, which each app would have
    kept = {*shared}
    shared.intersection_update({each for each in kept if each.__module__ == builtins.__name__})
    default, current = _state.default_app, _state._tls.current_app
    sys.path.insert(0, str(place))
    try:
        yield importlib.import_module("store.plans")
    finally:
        sys.path.remove(str(place))
        for name in [each for each in sys.modules if each.partition(".")[0] in ("store", "odd")]:
            del sys.modules[name]
        shared.clear()
        shared.update(kept)
        _state.default_app, _state._tls.current_app = default, current


@pytest.fixture
def beatless_plans(store: Any) -> list[Plan]:
    return store.PLANS


def test_the_plans_of_the_page_do_what_the_canvas_did(beatless: Kit) -> None:
    names: dict[str, Any] = {}
    exec(BLOCKS["tests/test_plans.py"], names)
    names["test_the_chain_and_the_chord_are_plans"](beatless)


def printed(capsys: pytest.CaptureFixture[str], name: str) -> str:
    status, (out, error) = run(["plan", "from-celery", name]), capsys.readouterr()
    assert (status, error.splitlines()) == (0, [])
    return out


def test_the_command_prints_the_draft_of_the_page(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, "store.tasks:celery") == PRINTED


def test_odd_tasks_become_plans_and_what_a_step_lacks_is_named(
    store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "odd.main:app")
    names: dict[str, Any] = {}
    exec(text, names)
    both = {each.name: each for each in names["PLANS"]}  # Celery shares tasks between its apps
    plans = {name: each for name, each in both.items() if not name.startswith("store.")}
    steps = {name: each.steps[0] for name, each in plans.items()}
    assert plans.keys() == {
        "odd.tasks.fetch",
        "odd.tasks.mail",
        "odd.shared.mail",
        "slowly",
        "odd-name-",
        "odd.Importer",
    }
    assert steps["odd.tasks.fetch"].timeout == 30
    assert {each.timeout for name, each in steps.items() if name != "odd.tasks.fetch"} == {60}
    fetch, mail = steps["odd.tasks.fetch"].retry, steps["odd.tasks.mail"].retry
    assert [fetch.max_attempts, fetch.delay(1), fetch.delay(99)] == [float("inf"), 7, 7]
    assert [mail.max_attempts, mail.delay(1), mail.delay(2), mail.delay(3)] == [3, 5, 5, None]
    assert steps["odd.shared.mail"].retry.max_attempts == 1
    assert {name: each.queue for name, each in plans.items() if each.queue != "default"} == {
        "slowly": "slow"
    }
    assert plans["slowly"].limits == (Limit("slowly", rate="2/s"),)
    notes = dict(zip(both, text.split("\n\n")[2:-1], strict=True))
    for name, note in (
        ("odd.tasks.fetch", "its countdown does not count"),
        ("odd.tasks.fetch", "not called: on_failure"),
        ("odd.tasks.mail", "# group: makes a group: run.map"),
        ("odd.tasks.mail", "# delay: sends tasks"),
        ("slowly", "priority 3"),
        ("slowly", "expires"),
        ("odd-name-", "its rate limit '0.5/m' is none of beatless's"),
        ("odd.Importer", "self.replace, which fails the run"),
    ):
        assert note in notes[name]


def test_what_cannot_be_read_is_said(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name, status, message in (
        ("odd.unset:app", 1, "odd.unset cannot be imported: KeyError: 'ODD_URL_THAT_IS_UNSET'"),
        ("odd.unset_tasks:app", 2, "cannot be loaded: KeyError: 'ODD_URL_THAT_IS_UNSET'"),
        ("odd.nowhere:app", 2, "odd.nowhere:app cannot be loaded: No module named 'odd.nowhere'"),
        (":app", 2, "is ':app'; give MODULE:ATTRIBUTE of one"),
        ("odd.lost:app", 2, "its tasks cannot be loaded: No module named 'odd.nowhere'"),
        ("odd.unrouted:app", 2, "task odd.unrouted.one has no route"),
        ("odd.tasks:Told", 2, "is no Celery app; give MODULE:ATTRIBUTE of one"),
    ):
        assert run(["plan", "from-celery", name]) == status
        assert message in capsys.readouterr().err
