"""The example of the README does what it says."""

import re
from pathlib import Path

import pytest

from beatless.testing.servers import Services

README = Path(__file__).parents[2] / "README.md"


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


def test_the_natural_tests_of_the_example_pass(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its App reads the environment, and `order` uses the client of that App."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    source = re.search(r"```python\n(# shop.py\n.*?)```", README.read_text(), re.DOTALL)
    test = re.search(r"```python\n(# test_shop.py, .*?)```", README.read_text(), re.DOTALL)
    pytester.makeini("[pytest]\nbeatless_app = shop:app")
    pytester.makepyfile(shop=source[1], test_shop=test[1], test_more=TESTS)

    result = pytester.runpytest_subprocess(
        "-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"
    )

    result.assert_outcomes(passed=3)
