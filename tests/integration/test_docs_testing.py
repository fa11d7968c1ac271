"""The examples of docs/testing.md are executed as they are printed."""

import re
from pathlib import Path

import pytest

from beatless.outbox.faults import POINTS
from beatless.testing import Kit
from beatless.testing.servers import Services

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


@pytest.mark.slow
def test_every_example_of_the_page_passes(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    # What else is installed here would take the inner session seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    blocks = re.findall(r"^```python\n(?!# )(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    source = "\n\n".join(blocks)
    pytester.makepyfile(source)

    result = pytester.runpytest_subprocess(
        "-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"
    )

    result.assert_outcomes(passed=source.count("def test_"))


@pytest.mark.slow
def test_the_host_of_the_page_about_http_is_tested_as_the_page_says(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    modules = {}
    for page, name in (
        (PAGE.parents[1] / "README.md", "shop"),
        (PAGE.parent / "http.md", "web"),
        (PAGE, "test_web"),
    ):
        fenced = rf"^```python\n(# {name}\.py.*?)^```"
        block = re.search(fenced, page.read_text(), re.DOTALL | re.MULTILINE)
        modules[name] = block[1]
    pytester.makeini("[pytest]\nbeatless_app = shop:app\npythonpath = .")
    pytester.makepyfile(**modules)

    result = pytester.runpytest_subprocess(
        "-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"
    )

    result.assert_outcomes(passed=1)


def test_every_helper_is_on_the_page() -> None:
    helpers = {name for name in vars(Kit) if not name.startswith("_")} - {"close"}
    named = set(re.findall(r"`(\w+)(?:\(|`)", PAGE.read_text()))
    assert helpers <= named, helpers - named


def test_every_crash_point_is_on_the_pages_that_list_them() -> None:
    listed = re.findall(r"^\| `(\w+\.\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(POINTS)
    page = (PAGE.parent / "architecture.md").read_text()
    section = page.partition("## Crash points")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", section)) == POINTS
