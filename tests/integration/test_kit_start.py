"""How the pytest plugin starts: what it costs who does not use it, and what new users meet."""

import os
import shutil
from pathlib import Path

import pytest

import beatless
import pytest_beatless
from beatless.testing.servers import Services


@pytest.fixture(autouse=True)
def _only_our_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of the inner sessions: what else is installed here would take them seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """A session in a process of its own, with the settings of the project's own directory."""
    if not (project.path / "tox.ini").exists():
        project.makeini("[pytest]")
    return project.runpytest_subprocess("-p", "beatless", "-p", "no:cacheprovider", *arguments)


def test_a_session_that_does_not_use_the_plugin_imports_nothing_of_beatless(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_it():
            found = {"beatless", "celery", "sqlalchemy", "redis", "psycopg"}
            assert found & sys.modules.keys() == set()
        """
    )
    run(pytester).assert_outcomes(passed=1)


def test_the_fixtures_are_listed_with_what_they_give(pytester: pytest.Pytester) -> None:
    result = run(pytester, "--fixtures")
    for name in ("beatless", "beatless_app", "beatless_plans", "beatless_settings"):
        result.stdout.re_match_lines([rf"{name} -- .*pytest_beatless\.py:\d+", r"    \w+"])
    result.stdout.fnmatch_lines(["beatless_services [[]session scope[]] -- *"])


PLANS = """
import pytest
from beatless import Plan, step

@pytest.fixture
def beatless_plans():
    return [Plan("greet", [step(name="hello")(lambda ctx: "hello")])]
"""


@pytest.fixture
def temporary(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the inner sessions make the directories of their servers."""
    directory = pytester.mkdir("temporary")
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


@pytest.mark.long
def test_workers_share_servers_that_are_gone_with_the_session(
    pytester: pytest.Pytester, temporary: Path
) -> None:
    """Also without the setting `beatless_app`: nothing but a fixture tells that they are wanted."""
    pytester.makeconftest(PLANS)
    pytester.makepyfile(
        """
        import pathlib, pytest

        @pytest.mark.parametrize("number", range(2))
        def test_it(beatless, worker_id, number):
            settings = beatless.app.settings
            pathlib.Path(f"servers-{worker_id}").write_text(
                f"{settings.database_url.partition('?')[0]} {settings.redis_url}"
            )
        """
    )

    run(pytester, "-p", "xdist", "-n", "2", "--dist=each").assert_outcomes(passed=4)

    used = [path.read_text() for path in sorted(pytester.path.glob("servers-*"))]
    assert len(used) == 2
    assert len(set(used)) == 1
    assert list(temporary.glob("beatless-test-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_no_server_is_started_before_a_test_asks(
    pytester: pytest.Pytester, temporary: Path, workers: str
) -> None:
    pytester.makeini("[pytest]\nbeatless_app = shop:app")
    pytester.makepyfile(
        """
        import pathlib, tempfile

        def test_it():
            assert list(pathlib.Path(tempfile.gettempdir()).glob("beatless-test-*")) == []
        """
    )
    run(pytester, "-p", "xdist", "-n", workers).assert_outcomes(passed=1)


WRONG = {
    "embedded": "*--beatless-services=embedded: Postgres did not start: *no_such_setting*",
    "external": "*--beatless-services=external: BEATLESS_DATABASE_URL is not set; for example *",
    "testcontainers": "*--beatless-services=testcontainers: *testcontainers*pip install*",
    "line": "*beatless_embedded_settings: 'work_mem' is not name=value, as in work_mem=64MB",
    "unreachable": "*--beatless-services=external: Postgres cannot be reached: *",
    "directory": "*--beatless-directory=/nobody/has/this: No such file or directory*",
}


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "workers"), [(name, str(int(name == "line"))) for name in WRONG])
def test_a_wrong_set_up_is_told_in_a_sentence(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, wrong: str, workers: str
) -> None:
    for name in ("BEATLESS_DATABASE_URL", "BEATLESS_REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    if wrong == "unreachable":
        monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/nothing")
        monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://127.0.0.1:1/0")
    pytester.makeini(
        "[pytest]\nbeatless_embedded_settings = "
        + ("work_mem" if wrong == "line" else "no_such_setting=1")
    )
    pytester.makeconftest(
        PLANS + "import sys; sys.modules['testcontainers'] = None  # as if not installed"
    )
    pytester.makepyfile("def test_it(beatless): ...")
    services = {"line": "embedded", "unreachable": "external", "directory": "embedded"}
    options = [f"--beatless-services={services.get(wrong, wrong)}"]
    if wrong == "directory":
        options.append("--beatless-directory=/nobody/has/this")

    result = run(pytester, "-p", "xdist", "-n", workers, *options)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([WRONG[wrong]])
    said = result.stdout.str()
    assert "INTERNALERROR" not in said
    assert "Traceback" not in said
    assert ".py:" not in said.partition("ERROR at setup")[2].partition("short test summary")[0]
    assert "secret" not in said


@pytest.mark.slow
def test_a_folder_that_stands_in_for_ours_is_named_by_the_first_test_that_needs_it(
    pytester: pytest.Pytester,
) -> None:
    pytester.mkpydir("beatless")
    pytester.makepyfile("def test_other(): ...\n\ndef test_it(beatless): ...")

    result = run(pytester)

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [f"`import beatless` finds {pytester.path}/beatless, which stands in*"]
    )


@pytest.mark.slow
def test_an_installation_of_links_is_not_taken_for_a_stand_in(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of links to files, as setuptools' strict editable mode, Bazel and uv make them."""
    links = pytester.mkdir("links")
    here = Path(pytest_beatless.__file__)
    links.joinpath(here.name).symlink_to(here)
    shutil.copytree(Path(beatless.__file__).parent, links / "beatless", copy_function=os.symlink)
    monkeypatch.setenv("PYTHONPATH", str(links))
    pytester.makepyfile(
        """
        import pathlib, pytest_beatless

        def test_it():
            assert pathlib.Path(pytest_beatless.__file__).is_symlink()
            with pytest_beatless.told():
                pytest_beatless.implementation()
        """
    )
    run(pytester).assert_outcomes(passed=1)


SHOP = """
from beatless import App, Plan, Settings, step

app = App(Settings.from_env(), [Plan("greet", [step(name="hello")(lambda ctx: "hello")])])

def greet():
    return app.client.start_run("greet").run_id
"""


@pytest.fixture
def shop(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """A project whose App reads the environment, tested on the servers of this session."""
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    pytester.makeini("[pytest]\nbeatless_app = shop:app\naddopts = --beatless-services=external")
    pytester.makepyfile(shop=SHOP)
    return pytester


@pytest.mark.slow
def test_the_app_of_the_project_acts_as_that_of_each_test_and_of_nobody_otherwise(
    shop: pytest.Pytester,
) -> None:
    """It is imported by the conftest, by the test's module, and by a test of other plans."""
    shop.makeconftest("import shop")
    shop.makepyfile(
        """
        import pytest
        from beatless import Plan, Unreachable, step
        from shop import app, greet

        @pytest.mark.parametrize("turn", [1, 2])
        def test_one(beatless, turn):
            run_id = greet()
            beatless.work_until_idle()
            assert [run.run_id for run in beatless.client.list_runs()] == [run_id]
            assert app.settings == beatless.app.settings

        class TestOther:
            @pytest.fixture
            def beatless_plans(self):
                return [Plan("greet", [step(name="hello")(lambda ctx: "other")])]

            def test_other_plans(self, beatless):
                run_id = greet()
                beatless.work_until_idle()
                assert app.client.get_run(run_id).result == "other"

        def test_without():
            with pytest.raises(Unreachable, match=r"the-fixture-beatless-has-servers\\.invalid"):
                greet()
        """
    )
    run(shop).assert_outcomes(passed=4)


@pytest.mark.slow
def test_ordinary_tasks_of_the_project_are_sent_and_executed_in_each_test(
    shop: pytest.Pytester,
) -> None:
    """Made with the Celery app of the module, before there was a test."""
    shop.makepyfile(
        mails="""
        from shop import app

        sent = []

        @app.celery.task
        def mail(to):
            sent.append(to)

        @app.celery.task(bind=True)
        def mail_later(self, to):
            if self.request.retries == 0:
                self.retry(countdown=0)
            mail.delay(to)
        """,
        test_mails="""
        import pytest
        from mails import mail, mail_later, sent

        @pytest.mark.parametrize("to", ["you", "her"])
        def test_it(beatless, to):
            sent.clear()
            mail.delay(to)
            assert beatless.work_until_idle() == 1
            assert sent == [to]
            mail_later.delay("them")
            assert beatless.work_until_idle() == 3
            assert sent == [to, "them"]
        """,
    )
    run(shop).assert_outcomes(passed=2)


def test_the_environment_is_nobodys_only_while_tests_are_imported(shop: pytest.Pytester) -> None:
    shop.makepyfile(
        """
        import os
        imported = os.environ["BEATLESS_DATABASE_URL"]

        def test_it():
            assert imported == "postgresql://the-fixture-beatless-has-servers.invalid/"
            assert "invalid" not in os.environ["BEATLESS_DATABASE_URL"]
        """
    )
    run(shop).assert_outcomes(passed=1)


@pytest.mark.slow
def test_servers_that_a_conftest_names_are_those_of_the_tests(
    shop: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis, of which it says nothing, stays as the environment has it."""
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://127.0.0.1:1/of_the_shell")
    url = beatless_services.database_url
    shop.makeconftest(f"import os\nos.environ['BEATLESS_DATABASE_URL'] = {url!r}")
    shop.makepyfile(
        f"""
        import os
        import shop
        imported = os.environ["BEATLESS_DATABASE_URL"]

        def test_it(beatless):
            assert imported == "postgresql://the-fixture-beatless-has-servers.invalid/"
            assert os.environ["BEATLESS_DATABASE_URL"] == {url!r}
            assert beatless.client.list_runs() == []
        """
    )
    run(shop).assert_outcomes(passed=1)


@pytest.mark.slow
def test_without_the_setting_the_error_of_an_import_says_so(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BEATLESS_DATABASE_URL", raising=False)
    pytester.makepyfile(shop=SHOP, test_shop="from shop import greet")

    result = run(pytester)

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*BEATLESS_DATABASE_URL is not set*", "Set beatless_app = *"])


@pytest.mark.slow
def test_an_app_that_cannot_be_imported_is_told_in_a_sentence_and_no_test_costs_a_schema(
    shop: pytest.Pytester,
) -> None:
    """Each asks for it, also where the plans are given otherwise."""
    shop.makeconftest(PLANS)
    shop.makepyfile(
        shop="1 / 0",
        test_shop="""
        def test_one(beatless): ...

        def test_other(beatless): ...

        def test_what_is_there(_beatless_isolation):
            name = rf"s\\_{_beatless_isolation.name.worker}\\_%"
            rows = _beatless_isolation.connection.execute(
                "SELECT nspname FROM pg_namespace WHERE nspname LIKE %s", (name,)
            )
            assert rows.fetchall() == []
        """,
    )

    result = run(shop)

    result.assert_outcomes(errors=2, passed=1)
    result.stdout.fnmatch_lines(["beatless_app = shop:app: shop cannot be imported: ZeroDivision*"])
    assert ".py:" not in result.stdout.str().partition("ERROR at setup")[2].partition("====")[0]


@pytest.mark.long
def test_processes_find_the_modules_that_pytest_finds_and_run_the_plans_of_their_app(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pytest's setting `pythonpath`, which is in no environment."""
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    pytester.makeini(
        "[pytest]\npythonpath = src\nbeatless_app = shop:app\n"
        "addopts = --beatless-services=external"
    )
    pytester.mkdir("src").joinpath("shop.py").write_text(SHOP)
    pytester.makepyfile(
        """
        import pytest
        from beatless import Plan, step
        from shop import greet

        @pytest.fixture
        def beatless_plans():
            return [Plan("greet", [step(name="hello")(lambda ctx: "of the test")])]

        def test_it(beatless):
            beatless.relay_process("shop:app")
            beatless.worker_process("shop:app")
            assert beatless.wait_for_run_completion(greet()).result == "hello"
        """
    )
    run(pytester).assert_outcomes(passed=1)
