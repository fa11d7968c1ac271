"""The examples of docs/schedules.md are executed as they are printed."""

import re
from pathlib import Path

import pytest

from beatless.testing.servers import Services

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"

OF_CUSTOMERS = """
from shop.customers import add_customer, remove_customer


def test_a_customer_has_a_schedule(beatless):
    with beatless.app.engine.begin() as session:
        add_customer(session, "ada")
    assert beatless.schedules.keys() == {"sync-ada"}
    with beatless.app.engine.begin() as session:
        remove_customer(session, "ada")
    assert beatless.schedules == {}
"""


def test_the_project_of_the_page_works(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    blocks = re.findall(
        r"^```python\n# (\S+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert [name for name, _ in blocks] == [
        "shop/app.py",
        "shop/customers.py",
        "tests/test_report.py",
    ]
    for name, text in (
        *blocks,
        ("shop/__init__.py", ""),
        ("tests/test_customers.py", OF_CUSTOMERS),
    ):
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    pytester.makeini("[pytest]\nbeatless_app = shop.app:app\npythonpath = .\n")

    result = pytester.runpytest_subprocess(
        *("-p", "no:cacheprovider", "-p", "no:docker_tools", "-p", "no:valkey", "-p", "no:celery"),
        *("-p", "no:randomly", "-p", "no:schemathesis"),
        "--beatless-services=external",
    )

    result.assert_outcomes(passed=2)
