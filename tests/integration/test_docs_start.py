"""The projects of docs/start.md and docs/tutorial.md are made as they are printed, and tested."""

import re
from pathlib import Path

import pytest

from beatless.testing.servers import Services

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "app", "files"),
    [
        ("start.md", "shop.runs:app", ["models", "tasks", "runs", "orders"]),
        ("tutorial.md", "shop.delivery:app", ["delivery", "webhook"]),
    ],
)
def test_the_project_of_the_page_works(
    pytester: pytest.Pytester,
    beatless_services: Services,
    monkeypatch: pytest.MonkeyPatch,
    page: str,
    app: str,
    files: list[str],
) -> None:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    # What else is installed here would take the inner session seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    blocks = re.findall(
        r"^```python\n# (\S+)\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE
    )
    *sources, tests = blocks
    assert [name for name, _ in sources] == [f"shop/{name}.py" for name in files]
    for name, text in blocks:
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (settings,) = re.findall(
        r"^```toml\n# pyproject.toml\n(.*?)^```",
        (DOCS / page).read_text(),
        re.DOTALL | re.MULTILINE,
    )
    assert f'"{app}"' in settings
    pytester.makepyprojecttoml(settings)

    result = pytester.runpytest_subprocess(
        "-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"
    )

    result.assert_outcomes(passed=tests[1].count("def test_"))
