"""The example of the README does what it says, and its test, on the page about tests."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import beatless as package
from beatless import StepContext, step
from beatless.testing import Kit
from beatless.testing.servers import Services

README = Path(__file__).parents[2] / "README.md"
TESTING = README.parent / "docs" / "testing.md"


TESTS = """
import pytest
from shop import app, order
from sqlalchemy import orm


@pytest.fixture(autouse=True)
def reservations(beatless_app):
    with app.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE reservations (number int PRIMARY KEY)")


def test_the_example_runs_once_the_callers_transaction_has_committed(beatless):
    with orm.Session(app.engine) as session:
        order(session, 1)
        session.rollback()
    assert beatless.work_until_idle() == 0

    with orm.Session(app.engine) as session:
        run_id = order(session, 1)
        session.commit()
    with beatless.crash(at="step.committed"):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    run = app.client.get_run(run_id)
    assert run.state == "completed"
    assert run.result == {"charged": 1, "key": f"{run_id}:charge"}
    beatless.verify()


def test_a_function_that_commits_by_itself_starts_its_run_in_the_test(beatless):
    run = app.client.start_run("checkout", {"order": 2}, key="order:2")
    assert beatless.assert_started("checkout", key="order:2") == [run]
"""


@pytest.mark.slow
def test_the_natural_tests_of_the_example_pass(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its App reads the environment, and `order` uses the client of that App."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    source = re.search(r"```python\n(# shop.py\n.*?)```", README.read_text(), re.DOTALL)
    test = re.search(r"```python\n(# test_shop.py, .*?)```", TESTING.read_text(), re.DOTALL)
    pytester.makeini("[pytest]\nbeatless_app = shop:app")
    pytester.makepyfile(shop=source[1], test_shop=test[1], test_more=TESTS)

    result = pytester.runpytest_subprocess(
        "-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"
    )

    result.assert_outcomes(passed=3)


@dataclass
class Order:
    lines: list[int]


@step
def release(ctx: StepContext) -> str:
    return "released"


@step
def pack(ctx: StepContext, line: int) -> str:
    return f"parcel {line}"


@pytest.mark.parametrize("signal", ["paid", "refused"])
def test_the_function_waits_for_its_signal(beatless: Kit, signal: str) -> None:
    (block,) = re.findall(r"```python\n(@plan.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, Any] = {
        name: getattr(package, name) for name in ("plan", "RunContext", "days")
    }
    names |= {"Order": Order, "release": release, "pack": pack, "__name__": "delivery"}
    exec(block, names)
    beatless.app.plans["delivery"] = names["delivery"]
    run_id = beatless.start_run("delivery", {"lines": [7, 8]}).run_id
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).state == "waiting"

    beatless.signal(run_id, signal)
    beatless.work_until_idle()

    packed = {"parcels": ["parcel 7", "parcel 8"]}
    assert beatless.client.get_run(run_id).result == (packed if signal == "paid" else "released")
    beatless.verify()
