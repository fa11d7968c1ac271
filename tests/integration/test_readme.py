"""The example of the README does what it says."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import orm

from jobs import App, Plan, RunState
from jobs.testing import Kit

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module `shop.py` of the README, as Python would import it."""
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://not-used-here/")
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://not-used-here/")
    source = re.search(r"```python\n(# shop.py\n.*?)```", README.read_text(), re.DOTALL)
    module = ModuleType("shop")
    exec(compile(source[1], "shop.py", "exec"), module.__dict__)
    return module


@pytest.fixture
def beatless_plans(shop: ModuleType) -> Sequence[Plan]:
    return list(shop.app.plans.values())


def test_the_example_runs_once_the_callers_transaction_has_committed(
    beatless: Kit, beatless_app: App, shop: ModuleType
) -> None:
    with beatless_app.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE reservations (number int PRIMARY KEY)")
    shop.app = beatless_app
    with orm.Session(beatless_app.engine) as session:
        shop.order(session, 1)
        session.rollback()
    assert beatless.work_until_idle() == 0

    with orm.Session(beatless_app.engine) as session:
        run_id = shop.order(session, 1)
        session.commit()
    with beatless.crash(at="step.committed"):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    run = beatless.client.get_run(run_id)
    assert run.state is RunState.COMPLETED
    assert run.result == {"charged": 1, "key": f"{run_id}:charge"}
    beatless.verify()
