"""docs/flask.md is a project that works as it is printed."""

import re
from pathlib import Path

import pytest

from beatless.testing.servers import Services

PAGE = Path(__file__).parents[2] / "docs" / "flask.md"


@pytest.mark.slow
def test_the_project_of_the_page_works(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    blocks = re.findall(
        r"^```(?:python|toml)\n# ([\w.]+)(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    files = dict(blocks)
    assert list(files) == ["shop.py", "web.py", "pyproject.toml", "conftest.py", "test_shop.py"]
    for name, text in blocks:
        (pytester.path / name).write_text(f"# {name}{text}")

    result = pytester.runpytest_subprocess(
        *("-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"), timeout=600
    )

    result.assert_outcomes(passed=files["test_shop.py"].count("def test_"))
