"""The bodies of the fixtures of `pytest_beatless`, imported when a test requests one.

Each test has a schema, a prefix, a NOTIFY channel, advisory keys and a Celery app of its own, named
after the xdist worker and the number of the test. A test that leaves something outside of them
fails; data of others is never touched. Nothing is started before a test asks for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from beatless.app import App
from beatless.cli.environment import load
from beatless.client.base import DEFAULT_APP
from beatless.errors import BadSetting, JobsError
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.schedule import Schedule
from beatless.outbox.publishers import worker_queue
from beatless.settings import Settings
from beatless.testing.broker_guard import Fence, Guard, servers, watching
from beatless.testing.fork_server import ForkServer
from beatless.testing.isolation import Isolation
from beatless.testing.kit import Kit
from beatless.testing.lending import acting_as
from beatless.testing.processes import FENCED
from beatless.testing.schemas import Tables
from beatless.testing.servers import Services, shared_services, start_services
from beatless.testing.task_inbox import queue_names

OWN = frozenset({"database_url", "redis_url", "schema", "prefix"})
"""Settings that each test has for itself."""

SETTING = "beatless_app"
"""The pytest setting that names the App of a project."""

BINDINGS = (
    "the keys _kombu.binding.* are queues of another Celery app, which has sent a task to the "
    "Redis of the tests: give that app the broker memory:// in the test and in the processes that "
    'it starts, as by os.environ["CELERY_BROKER_URL"] = "memory://" at the top of conftest.py'
)
"""Advice beside keys that kombu leaves."""


@contextmanager
def beatless_services(config: pytest.Config) -> Iterator[Services]:
    """Postgres and Redis: shared by all xdist workers of a session, or given from outside."""
    shared = getattr(config, "workerinput", {}).get("beatless")
    if shared is not None:
        yield shared_services(*shared)
        return
    with ExitStack() as stack:
        yield start_services(config, stack)


@contextmanager
def beatless_isolation(services: Services, config: pytest.Config) -> Iterator[Isolation]:
    """The isolation of this process's tests."""
    given = getattr(config, "workerinput", {})
    isolation = Isolation(
        services,
        given.get("workerid", "main"),
        session=given.get("testrunuid", ""),
        allowed=config.getini("beatless_allowed_keys"),
    )
    yield isolation
    isolation.close()


@contextmanager
def beatless_fork_server() -> Iterator[ForkServer]:
    """Forks the processes of this process's tests."""
    server = ForkServer(FENCED)
    yield server
    server.close()


def named_app(config: pytest.Config) -> App | None:
    """The App that `beatless_app` in the pytest settings names. Raises UsageError."""
    name = config.getini("beatless_app")
    if not name:
        return None
    try:
        return load(name, SETTING)
    except BadSetting as error:
        told = str(error) if error.name == SETTING else f"{SETTING} = {name}: {error}"
        raise pytest.UsageError(told) from error
    except JobsError as error:
        raise pytest.UsageError(f"{SETTING} = {name}: {error}") from error


def beatless_plans(named: App | None) -> Sequence[Plan]:
    """The plans of the App that `beatless_app` in the pytest settings names. Raises UsageError."""
    if named is None:
        raise pytest.UsageError(
            "no plans to test: set beatless_app = module:attribute in the pytest settings, or "
            "override the fixture beatless_plans"
        )
    return list(named.plans.values())


@contextmanager
def guarded() -> Iterator[Guard]:
    """A guard over the brokers that the code of one test publishes on."""
    guard = Guard()
    with watching(guard):
        yield guard


def schedules_of(named: App | None, plans: Sequence[Plan]) -> list[Schedule]:
    """The schedules of the named app whose plans this test has: others would be refused."""
    names = {plan.name for plan in plans}
    return [each for each in (named.schedules if named else ()) if each.plan in names]


@contextmanager
def beatless_app(
    test: str,
    isolation: Isolation,
    *,
    named: App | None,
    plans: Sequence[Plan],
    settings: dict[str, Any],
    tables: Tables | None,
    guard: Guard,
    allowed_brokers: Sequence[str],
) -> Iterator[App]:
    """An App with a schema, prefix and channel that only this test has.

    In this block, code that reaches for the App of its module, `named`, meets the test's. Raises
    UsageError for settings that isolate the test; fails a test that has left something outside.
    """
    if taken := sorted(OWN & settings.keys()):
        raise pytest.UsageError(
            f"beatless_settings sets {', '.join(taken)}, which the kit gives to each test anew: "
            "remove it; to use other servers see --beatless-services, and for one test with "
            "another Redis make an App of dataclasses.replace(beatless_app.settings, redis_url=…)"
        )
    services = isolation.services
    with ExitStack() as undo:
        prefix = isolation.begin(test)
        undo.callback(isolation.end)
        schema = isolation.take(tables)
        undo.callback(isolation.schemas.give_back, schema)
        app = App(
            Settings(
                database_url=isolation.schemas.url(schema),
                redis_url=services.redis_url,
                schema=schema,
                prefix=prefix,
                **{"broker_url": services.broker_url} | settings,
            ),
            plans,
            schedules=schedules_of(named, plans),
            name=named.name if named else DEFAULT_APP,
            on_failure=named.on_failure if named else None,
            redact=named.redact if named else None,
        )
        undo.callback(app.close)
        app.celery.conf.broker_transport_options["polling_interval"] = 0.05
        isolation.stores.clean_own_broker(app.settings)
        guard.fence = Fence(
            prefix=prefix,
            servers=servers([services.broker_url, app.settings.broker_url]),
            shared=not services.ours,
            allowed=tuple(allowed_brokers),
        )
        with acting_as(named, app) if named else nullcontext():
            undo.pop_all()
            yield app
    if app.settings.redis_broker is None:
        remove_queues(app)
    app.close()
    # Even if the test failed: its leaks say more about why.
    problems = guard.take()
    problems += map(isolation.attributed, isolation.leaks.left_outside(prefix))
    guard.fence = None
    isolation.stores.clean_own_broker(app.settings)
    problems += isolation.schemas.give_back(schema)
    beside = isolation.neighbours.running() if problems else []
    isolation.end()
    if problems:
        pytest.fail(explanation(problems, beside), pytrace=False)


def explanation(problems: Sequence[str], beside: Sequence[str]) -> str:
    """The leaks of the test, and the tests that ran beside it."""
    whose = "this test, or one that ran beside it," if beside else "this test"
    lines = [f"{whose} left something outside of its own names:", *problems]
    lines += [f"beside it ran {test}" for test in beside]
    if any("_kombu.binding." in problem for problem in problems):
        lines.append(BINDINGS)
    return "\n  ".join(lines)


@contextmanager
def beatless(app: App, guard: Guard, fork_server: ForkServer, tmp_path: Path) -> Iterator[Kit]:
    """The helpers, bound to the test's own app."""
    prefix = app.settings.prefix.removeprefix("t_").replace("_", "-")
    kit = Kit(
        app,
        run_prefix=f"test-{prefix}",
        directory=tmp_path,
        guard=guard,
        launch=fork_server.launch,
    )
    yield kit
    kit.close()


def remove_queues(app: App) -> None:
    """Remove the queues of one test from a broker that is not Redis."""
    names = {queue.name for queue in app.client.queues()} | queue_names(app)
    with app.celery.connection_for_write() as broker:
        channel = broker.default_channel
        for queue in [worker_queue(app.settings.prefix, name) for name in sorted(names)]:
            queue = queue(channel)
            queue.delete()
            queue.exchange.delete()
