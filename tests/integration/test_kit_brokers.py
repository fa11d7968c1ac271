"""The test kit's isolation from brokers: no Celery app publishes to one that is not the test's."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from kombu import Connection, Exchange, Producer, Queue

from beatless import App, Plan
from beatless.local.valkey import EmbeddedValkey
from beatless.redis_urls import RedisUrl
from beatless.testing.broker_guard import Fence, ForeignBroker, Guard, servers


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path_factory.mktemp("foreign")) as server:
        yield server


@pytest.fixture
def foreign(valkey: EmbeddedValkey) -> EmbeddedValkey:
    """A Redis of somebody, who wants nothing to be left in it."""
    with RedisUrl.parse(valkey.url).client() as client:
        client.flushall()
    return valkey


@pytest.fixture
def old(foreign: EmbeddedValkey) -> Iterator[Celery]:
    """A Celery application that is not beatless'."""
    app = Celery("old", broker=foreign.url, backend=foreign.url, set_as_current=False)
    app.conf.broker_connection_retry = False

    @app.task(name="old.mail", shared=False)
    def mail(*to: str) -> int:
        return len(to)

    yield app
    app.close()


WAYS: dict[str, Callable[[Celery, Any], Any]] = {
    "delay": lambda app, mail: mail.delay("ada"),
    "apply_async": lambda app, mail: mail.apply_async(("ada",), countdown=5, ignore_result=True),
    "send_task": lambda app, mail: app.send_task("other.mail"),
    "chain": lambda app, mail: chain(mail.s("ada"), mail.s()).delay(),
    "group": lambda app, mail: group([mail.s("ada"), mail.s("bob")], app=app).delay(),
    "chord": lambda app, mail: chord([mail.s("ada"), mail.s("bob")], mail.s(), app=app).delay(),
    "broadcast": lambda app, mail: app.control.broadcast("shutdown"),
    "revoke": lambda app, mail: app.control.revoke("some-task"),
    "ping": lambda app, mail: app.control.inspect(timeout=0.1).ping(),
    "purge": lambda app, mail: app.control.purge(),
    "event": lambda app, mail: mail.send_event("task-custom"),
    "result": lambda app, mail: app.backend.store_result("some-task", 1, "SUCCESS"),
    "state": lambda app, mail: mail.update_state("some-task", "PROGRESS"),
    "forget": lambda app, mail: app.AsyncResult("some-task").forget(),
    "kombu": lambda app, mail: by_kombu(app.conf.broker_url),
    "simple queue": lambda app, mail: by_simple_queue(app.conf.broker_url),
}


def by_kombu(url: str) -> None:
    with Connection(url) as broker:
        exchange = Exchange("mails")
        Producer(broker).publish(
            {}, exchange=exchange, routing_key="m", declare=[Queue("m", exchange, "m")]
        )


def by_simple_queue(url: str) -> None:
    with Connection(url) as broker:
        broker.SimpleQueue("mails").put({})


@pytest.fixture
def guard(request: pytest.FixtureRequest) -> Guard:
    found: Guard = request.getfixturevalue("_beatless_guard")
    return found


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return []


@pytest.mark.usefixtures("beatless_app")
def test_nothing_leaves_for_a_broker_that_is_not_the_tests(
    guard: Guard, old: Celery, foreign: EmbeddedValkey, subtests: pytest.Subtests
) -> None:
    told = r"redis://.*@127\.0\.0\.1:.*not the test's own"
    for way, publish in WAYS.items():
        with subtests.test(way):
            with pytest.raises(ForeignBroker, match=told):
                publish(old, old.tasks["old.mail"])
            assert keys(foreign) == []
            assert len(guard.take()) == 1


@pytest.mark.parametrize("way", ["delay", "ping", "simple queue"])
def test_a_connection_that_was_open_before_carries_nothing_either(
    request: pytest.FixtureRequest, old: Celery, foreign: EmbeddedValkey, way: str
) -> None:
    with old.connection_for_write() as broker, old.pool.acquire() as pooled:
        broker.default_channel  # noqa: B018 - opens it
        pooled.default_channel  # noqa: B018
    before = keys(foreign)
    request.getfixturevalue("beatless_app")
    with pytest.raises(ForeignBroker):
        WAYS[way](old, old.tasks["old.mail"])
    assert keys(foreign) == before
    request.getfixturevalue("_beatless_guard").take()


def keys(server: EmbeddedValkey) -> list[Any]:
    with RedisUrl.parse(server.url).client() as client:
        return list(client.scan_iter())


@pytest.mark.usefixtures("beatless_app")
def test_what_stays_in_the_process_is_nobodys_business(guard: Guard, old: Celery) -> None:
    for broker, backend, eager in (
        ("memory://", "cache+memory://", False),
        ("memory://", "rpc://", False),
        ("memory://", None, False),
        (old.conf.broker_url, old.conf.result_backend, True),
    ):
        app = Celery("new", broker=broker, backend=backend, set_as_current=False)
        app.conf.task_always_eager = eager
        mail = app.task(old.tasks["old.mail"].run, name="old.mail", shared=False)
        mail.delay("ada")
        (mail.s("ada") | mail.s()).delay()
        app.close()
    assert guard.take() == []


class TestAllowedBrokers:
    @pytest.fixture
    def beatless_allowed_brokers(self, foreign: EmbeddedValkey, request: Any) -> list[str]:
        return [getattr(request, "param", foreign.url)]

    @pytest.mark.parametrize("beatless_allowed_brokers", ["*"], indirect=True)
    @pytest.mark.usefixtures("beatless_app")
    def test_may_all_be_published_to(self, guard: Guard, old: Celery) -> None:
        self.publish(guard, old)

    @pytest.mark.usefixtures("beatless_app")
    def test_may_be_published_to(self, guard: Guard, old: Celery) -> None:
        self.publish(guard, old)

    def publish(self, guard: Guard, old: Celery) -> None:
        old.tasks["old.mail"].delay("ada")
        old.control.purge()
        assert guard.take() == []

    @pytest.mark.usefixtures("beatless_app")
    def test_are_no_others(self, guard: Guard) -> None:
        other = Celery("other", broker="redis://127.0.0.1:1/0", set_as_current=False)
        with pytest.raises(ForeignBroker):
            other.send_task("old.mail")
        guard.take()


def test_on_servers_of_others_only_names_of_the_test_are_its_own(beatless_app: App) -> None:
    settings = beatless_app.settings
    fence = Fence(prefix=settings.prefix, servers=servers([settings.broker_url]), shared=True)
    with beatless_app.celery.connection_for_write() as own, Connection(settings.redis_url) as other:
        assert fence.has(own, [f"{settings.prefix}.default"])
        assert not fence.has(other, ["celery"])
        assert not fence.has(other)
    with Connection("amqp://guest@localhost/") as rabbit:
        shared = replace(fence, servers=servers(["amqp://guest@127.0.0.1:5672/"]))
        assert shared.has(rabbit)
        assert shared.has(rabbit, [f"{settings.prefix}.default"])
        assert not shared.has(rabbit, ["", "celery"])
        assert not fence.has(rabbit)


@pytest.mark.long
def test_a_test_whose_code_would_have_published_elsewhere_fails(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, foreign: EmbeddedValkey
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(
        shop=f"""
        from contextlib import suppress

        from celery import Celery
        from beatless import App, Plan, Settings, step

        old = Celery("old", broker={foreign.url!r}, set_as_current=False)

        @old.task(shared=False)
        def mail():
            pass

        @step
        def sends(ctx):
            mail.delay()

        @step
        def hides_it(ctx):
            with suppress(Exception):
                mail.delay()

        app = App(Settings.from_env(), [Plan("sends", [sends]), Plan("hides", [hides_it])])
        """
    )
    pytester.makeini("[pytest]\nbeatless_app = shop:app\npythonpath = .")
    pytester.makepyfile(
        """
        import threading

        import pytest
        import shop

        @pytest.mark.parametrize("plan", ["sends", "hides"])
        def test_step(beatless, plan):
            beatless.start_run(plan)
            beatless.work_until_idle()

        def test_completed(beatless):
            run = beatless.start_run("sends")
            beatless.work_until_idle()
            assert beatless.client.get_run(run.run_id).state == "completed"

        def test_own_body(beatless):
            shop.mail.delay()

        def test_process(beatless):
            beatless.worker_process("shop:app")
            beatless.relay_process("shop:app")
            beatless.wait_for_run_completion(beatless.start_run("hides").run_id)

        def test_nothing(beatless):
            pass
        """
    )
    result = pytester.runpytest_subprocess(
        "-p", "pytest_beatless", "-p", "no:cacheprovider", "--show-capture=no"
    )
    result.assert_outcomes(passed=1, failed=5)
    result.stdout.fnmatch_lines(["*the task shop.mail ('celery') would have been sent to redis*"])
    assert result.stdout.str().count("the task shop.mail") >= 5
    assert result.stdout.str().count("was not sent. Give that Celery app a broker") >= 5
    assert keys(foreign) == []
