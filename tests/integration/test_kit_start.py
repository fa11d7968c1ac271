"""How the pytest plugin starts: what it costs who does not use it, and what new users meet."""

import pytest


@pytest.fixture(autouse=True)
def _only_our_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of the inner sessions: what else is installed here would take them seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """A session in a process of its own, with the settings of the project's own directory."""
    if not (project.path / "pytest.ini").exists():
        project.makeini("[pytest]")
    return project.runpytest_subprocess("-p", "beatless", "-p", "no:cacheprovider", *arguments)


def test_a_session_that_does_not_use_the_plugin_imports_nothing_of_beatless(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            found = {"jobs", "orchestrator", "outbox", "celery", "sqlalchemy", "redis", "psycopg"}
            assert found & sys.modules.keys() == set()
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_the_fixtures_are_listed_with_what_they_give(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--fixtures")
    for name in ("beatless", "beatless_app", "beatless_plans", "beatless_settings"):
        result.stdout.re_match_lines([rf"{name} -- .*pytest_beatless\.py:\d+", r"    \w+"])
    result.stdout.fnmatch_lines(["beatless_services [[]session scope[]] -- *"])
