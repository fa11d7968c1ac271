"""docs/python.md names everything; its recipes and those of docs/adopting.md work as they stand."""

import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from beatless import (
    AsyncStepContext,
    BadSetting,
    Plan,
    RunContext,
    RunState,
    StepContext,
    Unreachable,
    step,
)
from beatless.api import create_api
from beatless.client import Client
from beatless.testing import Kit
from beatless.testing.servers import Services

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "python.md").read_text()
BLOCKS = {
    match[1]: match[0]
    for page in ("python.md", "adopting.md")
    for match in re.findall(
        r"```python\n(# (\S+?\.py)\b.*?)```", (DOCS / page).read_text(), re.DOTALL
    )
}


def members(kind: type) -> list[str]:
    found = [name for name in dir(kind) if not name.startswith("_")]
    if kind is not Client:
        source = inspect.getsource(kind.__init__)
        found += re.findall(r"self\.([a-z]\w*)[:=, ]", source)
    return sorted(set(found))


@pytest.mark.parametrize(
    ("kind", "prefix"), [(StepContext, "ctx."), (RunContext, "run."), (Client, "")]
)
def test_every_member_is_named(kind: type, prefix: str) -> None:
    missing = [
        name for name in members(kind) if not re.search(rf"`{re.escape(prefix)}{name}\b", TEXT)
    ]
    assert missing == []


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(String, default="new")


class TestOrm:
    @pytest.fixture
    def beatless_plans(self) -> list[Plan]:
        names: dict[str, Any] = {"step": step, "Order": Order}
        names |= {"StepContext": StepContext, "AsyncStepContext": AsyncStepContext}
        recipes = []
        for module in ("orm", "ext.asyncio"):
            pattern = rf"```python\n(from sqlalchemy.{module} import \w+\n\n\n@step.*?)```"
            (block,) = re.findall(pattern, TEXT, re.DOTALL)
            exec(block, names)
            recipes.append(names["reserve"])

        @step(transactional=True)
        def fail(ctx: StepContext) -> None:
            with Session(bind=ctx.connection) as session:
                session.merge(Order(number=ctx.input["order"], state="lost"))
                session.commit()
            raise ValueError("the step fails after its commit")

        ordinary, asynchronous = recipes
        return [Plan("reserve", [ordinary]), Plan("async", [asynchronous]), Plan("fails", [fail])]

    @pytest.fixture
    def beatless_tables(self) -> Any:
        return Base.metadata.create_all

    @pytest.mark.parametrize(
        ("plan", "ended", "state"),
        [
            ("reserve", RunState.COMPLETED, "reserved"),
            ("async", RunState.COMPLETED, "reserved"),
            ("fails", RunState.FAILED, "new"),
        ],
    )
    def test_a_session_commits_with_the_step(
        self, plan: str, ended: RunState, state: str, beatless: Kit
    ) -> None:
        with Session(beatless.app.engine) as session, session.begin():
            session.add(Order(number=7))
            run = beatless.app.client.start_run(plan, {"order": 7}, connection=session)
        beatless.work_until_idle()

        assert beatless.client.get_run(run.run_id).state == ended
        with Session(beatless.app.engine) as session:
            assert session.scalars(select(Order.state)).all() == [state]


class TestFastAPI:
    """The recipe for a route that commits before it answers."""

    @pytest.fixture
    def beatless_plans(self) -> list[Plan]:
        return [Plan("checkout", [step(name="reserve")(lambda _: None)])]

    @pytest.mark.parametrize("recipe", ["routes.py", "async_routes.py"])
    def test_a_run_is_there_when_its_answer_is_sent(
        self, recipe: str, beatless: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shop = ModuleType("shop")
        shop.app = beatless.app  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "shop", shop)
        names: dict[str, Any] = {"__name__": recipe.removesuffix(".py")}
        exec(BLOCKS[recipe], names)
        states = []

        async def told(scope: Any, receive: Any, send: Any) -> None:
            async def see(message: Any) -> None:
                if message.get("body"):
                    run_id = json.loads(message["body"])["run_id"]
                    states.append(beatless.client.get_run(run_id).state)
                await send(message)

            await names["host"](scope, receive, see)

        with TestClient(told) as browser:
            assert browser.post("/orders/7").status_code == 200
        assert states == [RunState.QUEUED]


class TestErrorsInRoutes:
    """The recipes for errors of beatless in routes of one's own."""

    @pytest.fixture
    def beatless_plans(self) -> list[Plan]:
        return [Plan("checkout", [step(name="reserve")(lambda _: None)])]

    def test_the_answers_are_those_of_the_mounted_api(
        self, beatless: Kit, caplog: pytest.LogCaptureFixture
    ) -> None:
        names: dict[str, Any] = {"__name__": "errors"}
        exec(BLOCKS["errors.py"], names)
        host: FastAPI = names["host"]
        host.mount("/jobs", create_api(beatless.app, is_open=True))

        @host.get("/runs/{run_id}")
        def show(run_id: str) -> None:
            beatless.client.get_run(run_id)

        @host.post("/runs")
        async def start() -> None:
            await beatless.client.astart_run("lost")

        @host.get("/away")
        def away() -> None:
            raise Unreachable("Postgres", "10.0.0.7 refuses")

        @host.get("/ours")
        def ours() -> None:
            raise BadSetting("BEATLESS_SCHEMA", "is empty", "beatless")

        with TestClient(host, raise_server_exceptions=False) as browser:
            for by_route, by_api in (
                (browser.get("/runs/none"), browser.get("/jobs/v1/runs/none")),
                (browser.post("/runs"), browser.post("/jobs/v1/runs", json={"plan": "lost"})),
            ):
                assert by_route.status_code == by_api.status_code == 404
                assert by_route.headers["content-type"] == by_api.headers["content-type"]
                assert by_route.json().items() <= by_api.json().items()
            lost, bug = browser.get("/away"), browser.get("/ours")
        assert (lost.status_code, lost.headers["retry-after"]) == (503, "2")
        assert "10.0.0.7" not in lost.text
        (told,) = [each for each in caplog.records if each.name == "beatless.problem"]
        assert "10.0.0.7 refuses" in vars(told)["reason"]
        assert (bug.status_code, bug.text) == (500, "Internal Server Error")

    def test_flask_answers_by_the_same_documents(self, beatless: Kit) -> None:
        names: dict[str, Any] = {"__name__": "flask_errors"}
        exec(BLOCKS["flask_errors.py"], names)
        host = names["host"]

        @host.get("/runs/<run_id>")
        def show(run_id: str) -> None:
            beatless.client.get_run(run_id)

        @host.get("/ours")
        def ours() -> None:
            raise BadSetting("BEATLESS_SCHEMA", "is empty", "beatless")

        browser = host.test_client()
        found = browser.get("/runs/none")
        assert (found.status_code, found.content_type) == (404, "application/problem+json")
        assert found.json["detail"] == "no run has id 'none'"
        others = [browser.get(path) for path in ("/nowhere", "/ours")]
        assert [(each.status_code, each.mimetype) for each in others] == [
            (404, "text/html"),
            (500, "text/html"),
        ]


PROCESSES = """
import subprocess
import sys

CODE = "from store.tasks import celery; print(celery.connection_for_write().transport_cls)"


def test_a_process_that_a_test_starts_sends_to_nobody():
    assert subprocess.check_output([sys.executable, "-c", CODE], text=True) == "memory\\n"
"""


@pytest.mark.slow
def test_the_recipes_for_a_service_with_an_engine_of_its_own_work(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.mkpydir("store")
    pytester.mkdir("tests")
    names = [name for name in BLOCKS if name.startswith(("store/", "tests/"))]
    for name in names:
        (pytester.path / name).write_text(BLOCKS[name])
    (pytester.path / "tests" / "test_processes.py").write_text(PROCESSES)
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    # What else is installed here would take the inner session seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    done = pytester.runpytest_subprocess(
        *("-p", "beatless"),
        *("-o", "beatless_app=store.durable:app", "-o", "pythonpath=."),
        "--beatless-services=external",
        timeout=600,
    )
    assert len(names) == 7
    done.assert_outcomes(passed=3)
