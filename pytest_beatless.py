"""The pytest plugin of beatless: its options, and the fixtures for any project's tests.

pytest loads it wherever beatless is installed. So it imports nothing of beatless, which would cost
every session a second, before a test asks for a fixture: their bodies are in the package
`beatless.testing`.
"""

import importlib
import importlib.util
import json
import os
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOWHERE = "the-fixture-beatless-has-servers.invalid"
"""The host of an App that no test works with: named so, because error messages show it."""


UNSET = """\
Set beatless_app = module:attribute in the pytest settings, naming the App of your project. Tests
can then import its module without servers in the environment, and it works with those of a test."""


TWO_DATABASES = """\
The test has the mark django_db, for Django's own test database, and the fixture beatless_django
(perhaps by one of yours, as db), for the kit's: it can have one of them. Remove the mark, to have
the kit's; or take the fixture away, to have Django's, in which no run is executed."""


NO_DJANGO_DATABASE = """\
With beatless_app in the pytest settings, BEATLESS_DATABASE_URL names no server outside of the
fixtures of beatless. Ask for beatless_django (perhaps by one of yours, as db) in place of django_db
or TestCase; or give these a server of their own: docs/django.md of beatless, "Tests"."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beatless")
    group.addoption(
        "--beatless-services",
        choices=("embedded", "testcontainers", "external"),
        default="embedded",
        help="embedded: from wheels; testcontainers: see the image options; external: "
        "BEATLESS_DATABASE_URL and BEATLESS_REDIS_URL.",
    )
    group.addoption(
        "--beatless-broker",
        metavar="URL",
        default="",
        help="another broker for the task messages, such as amqp://guest:guest@localhost/; "
        "default: Redis, which carries the events in any case",
    )
    group.addoption(
        "--beatless-postgres-bin",
        metavar="DIR",
        help="for embedded: the initdb and postgres of this folder, as /usr/lib/postgresql/15/bin",
    )
    group.addoption(
        "--beatless-directory",
        metavar="DIR",
        help="for embedded: the servers make their directories in this folder, as /dev/shm, whose "
        "files are in memory; default: the system's folder for temporary files",
    )
    group.addoption("--beatless-postgres-image", default="postgres:18", help="for testcontainers")
    group.addoption("--beatless-redis-image", default="redis:8", help="for testcontainers")
    parser.addini("beatless_app", "module:attribute of the App whose plans the tests run")
    parser.addini("beatless_embedded_settings", "Postgres settings, name=value", type="linelist")
    parser.addini(
        "beatless_allowed_keys",
        "patterns of Redis keys and channels that tests may leave, as shop:*",
        type="linelist",
    )


class SharedServices:
    """Servers for all xdist workers, started by the controller when a worker first asks.

    Not by that worker: servers end with the thread that started them, and it may end before others.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._token = os.urandom(16).hex()
        self._listener: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, name="beatless services", daemon=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if self._listener is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
            self._thread.start()
        node.workerinput["beatless"] = (self._listener.getsockname()[1], self._token)

    def pytest_unconfigure(self) -> None:
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._thread.join()
            self._listener.close()

    def _serve(self) -> None:
        """Send the servers' addresses to each worker that knows the token; end them at the end."""
        assert self._listener is not None  # noqa: S101 - started after it was made
        answer = ""
        with ExitStack() as stack:
            while True:
                try:
                    worker, _ = self._listener.accept()
                except OSError:
                    return  # pytest_unconfigure
                with worker, suppress(OSError):  # a worker that was killed hears nothing
                    worker.settimeout(10)
                    if worker.recv(len(self._token)).decode(errors="replace") == self._token:
                        answer = answer or self._start(stack)
                        worker.sendall(answer.encode())

    def _start(self, stack: ExitStack) -> str:
        try:
            return str(
                implementation("beatless.testing.servers").answer_of_services(self._config, stack)
            )
        except Exception as error:
            return json.dumps({"refused": f"{type(error).__name__}: {error}"})


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SharedServices(config), "beatless-shared-services")


@contextmanager
def importable(config: pytest.Config) -> Iterator[None]:
    """In this block, modules that make their App from the environment can be imported.

    Such an App works with the test's servers while a test takes the fixture `beatless_app`, and
    with none otherwise: also not with those of the environment, which may be in use.
    """
    if not config.getini("beatless_app"):
        yield
        return
    nowhere = {
        "BEATLESS_DATABASE_URL": f"postgresql://{NOWHERE}/",
        "BEATLESS_REDIS_URL": f"redis://{NOWHERE}/",
    }
    given = {name: os.environ[name] for name in nowhere if name in os.environ}
    os.environ.update(nowhere)
    try:
        yield
    finally:
        # Settings of a conftest are meant for the tests.
        for name in [name for name, url in nowhere.items() if os.environ.get(name) == url]:
            del os.environ[name]
            if name in given:
                os.environ[name] = given[name]


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, Any, Any]:
    with importable(early_config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, Any, Any]:
    with importable(session.config):
        return (yield)


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: Any
) -> None:
    error = getattr(call.excinfo, "value", None)
    bad_setting = (type(error).__module__, type(error).__name__) == (
        "beatless.errors",
        "BadSetting",
    )
    if bad_setting and isinstance(report, pytest.CollectReport):
        report.sections.append(("beatless", UNSET))
    no_name = type(error).__name__ == "ImproperlyConfigured" and "supply the NAME" in str(error)
    if no_name and node.config.getini("beatless_app"):
        report.sections.append(("beatless", NO_DJANGO_DATABASE))


def implementation(module: str = "beatless.testing.fixtures") -> ModuleType:
    """A module of `beatless.testing`, imported when the first fixture is asked for.

    Raises UsageError if a folder of the user's own stands in for our package.
    """
    spec = importlib.util.find_spec("beatless")
    assert spec is not None  # noqa: S101 - it is installed with this module
    found = next(iter(spec.submodule_search_locations or ()), spec.origin or "")
    if not Path(found, "testing", "fixtures.py").exists():
        raise pytest.UsageError(
            f"`import beatless` finds {found}, which stands in for the installed package: rename "
            "it, or keep its folder off sys.path"
        )
    return importlib.import_module(module)


@contextmanager
def told() -> Iterator[None]:
    """Report errors of the set-up as one sentence, without a traceback."""
    try:
        yield
    except pytest.UsageError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


@pytest.fixture(scope="session")
def beatless_services(pytestconfig: pytest.Config) -> Iterator[Any]:
    """Postgres and Redis: shared by all xdist workers of a session, or given from outside."""
    with told(), implementation().beatless_services(pytestconfig) as services:
        yield services


@pytest.fixture(scope="session")
def _beatless_isolation(beatless_services: Any, pytestconfig: pytest.Config) -> Iterator[Any]:
    with told(), implementation().beatless_isolation(beatless_services, pytestconfig) as isolation:
        yield isolation


@pytest.fixture(scope="session")
def _beatless_fork_server() -> Iterator[Any]:
    with implementation().beatless_fork_server() as server:
        yield server


def named_app(config: pytest.Config) -> Any:
    """The App that `beatless_app` in the pytest settings names, or None. Raises UsageError."""
    with importable(config):
        return implementation().named_app(config)


@pytest.fixture
def beatless_plans(pytestconfig: pytest.Config) -> Sequence[Any]:
    """The plans of the test's app. Override it, or set `beatless_app` in the pytest settings."""
    with told():
        plans: Sequence[Any] = implementation().beatless_plans(named_app(pytestconfig))
    return plans


@pytest.fixture
def beatless_settings() -> dict[str, Any]:
    """Settings of the test's app beside its own names. Override it.

    Settings that isolate the test (`database_url`, `redis_url`, `schema`, `prefix`) are refused
    with a UsageError: the kit chooses them.
    """
    return {}


@pytest.fixture(scope="session")
def beatless_tables() -> Any:
    """The function that creates your own tables on a connection, as `metadata.create_all`.

    Override it, for the session. Each test then has them, and empty: they are made once for many
    tests. None: a test makes its own, and they are dropped after it.
    """
    return None


@pytest.fixture
def beatless_allowed_brokers() -> Sequence[str]:
    """Brokers and result backends beside its own that a test may publish to, as URLs or patterns.

    Override it. "*" allows them all.
    """
    return ()


@pytest.fixture
def _beatless_guard() -> Iterator[Any]:
    with implementation().guarded() as guard:
        yield guard


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test of two databases is refused before either is made."""
    fixtures = getattr(item, "fixturenames", ())
    if "beatless_django" in fixtures and item.get_closest_marker("django_db"):
        pytest.fail(TWO_DATABASES, pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A test that would have published to a broker that is not its own has failed."""
    guard: Any = pyfuncitem.funcargs.get("_beatless_guard")
    try:
        result = yield
    except BaseException as error:
        for refused in guard.take() if guard else ():
            error.add_note(refused)
        raise
    if guard and (refused := guard.take()):
        pytest.fail("\n".join(refused), pytrace=False)
    return result


@pytest.fixture
def beatless_app(
    request: pytest.FixtureRequest,
    _beatless_isolation: Any,
    beatless_plans: Sequence[Any],
    beatless_settings: dict[str, Any],
    beatless_tables: Any,
    _beatless_guard: Any,
    beatless_allowed_brokers: Sequence[str],
) -> Iterator[Any]:
    """An App with a schema, prefix and channel that only this test has.

    The App that `beatless_app` in the pytest settings names acts as this one meanwhile.

    Tables that your own code names without a schema are the test's own as well: make them with
    `metadata.create_all(beatless_app.engine)`.
    """
    with (
        told(),
        implementation().beatless_app(
            request.node.nodeid,
            _beatless_isolation,
            named=named_app(request.config),
            plans=beatless_plans,
            settings=beatless_settings,
            tables=beatless_tables,
            guard=_beatless_guard,
            allowed_brokers=beatless_allowed_brokers,
        ) as app,
    ):
        yield app


@pytest.fixture
def beatless(
    beatless_app: Any, _beatless_guard: Any, _beatless_fork_server: Any, tmp_path: Path
) -> Iterator[Any]:
    """The helpers of `beatless.testing.Kit`, bound to the test's own app."""
    with implementation().beatless(
        beatless_app, _beatless_guard, _beatless_fork_server, tmp_path
    ) as kit:
        yield kit


@pytest.fixture
def beatless_django(request: pytest.FixtureRequest, beatless_app: Any) -> Iterator[None]:
    """Django works in this test's own schema, with empty, migrated tables.

    Its commits are real, so that runs which were started in them are seen by workers.
    """
    in_schema_of = implementation("beatless.testing.django_tables").in_schema_of
    with ExitStack() as undo:
        if request.config.pluginmanager.has_plugin("django"):  # pytest-django refuses connections
            blocker = request.getfixturevalue("django_db_blocker")
            blocker.unblock()
            undo.callback(blocker.restore)
        undo.enter_context(in_schema_of(beatless_app))
        yield
