"""The test kit: what it refuses, what it says, and that its tests do not meet each other."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from beatless import App, Plan, RunState, StepContext, step
from beatless.testing import Kit
from beatless.testing.isolation import Isolation
from beatless.testing.names import own_tables
from beatless.testing.redis_stores import remove_keys

PROJECT = """
import pytest
from beatless import Plan, step

@pytest.fixture
def beatless_plans():
    return [Plan("greet", [step(name="hello")(lambda ctx: "hello")])]
"""


@pytest.fixture(autouse=True)
def _only_our_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of the inner sessions: what else is installed here would take them seconds."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project of somebody else that tests with beatless, on servers of its own."""
    pytester.makeconftest(PROJECT)
    return pytester


def run(project: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # In a process: a session of pytest inside of a session would share its plugins' state.
    return project.runpytest_subprocess("-p", "beatless", "-p", "no:cacheprovider", *arguments)


@pytest.mark.slow
def test_a_test_that_leaves_something_outside_of_its_names_fails(project):
    project.makeconftest(
        PROJECT
        + """
@pytest.fixture(autouse=True)
def patient(_beatless_isolation):
    _beatless_isolation.connection.execute("SET lock_timeout TO '60s'")

@pytest.fixture
def impatient(_beatless_isolation, patient):
    _beatless_isolation.connection.execute("SET lock_timeout TO '200ms'")
"""
    )
    project.makepyfile(
        """
        from dataclasses import replace

        import psycopg
        from beatless import App
        from beatless.settings import libpq_url
        def test_writes_a_key(beatless):
            beatless.app.redis().set("somebody:elses", "x")

        def test_publishes_under_the_default_prefix(beatless):
            beatless.app.redis().publish("beatless:events:r1", "x")

        def test_publishes_anywhere_else(beatless):
            beatless.app.redis().publish("shop", "x")
            beatless.app.redis().publish("tills", "x")

        def test_uses_the_names_of_another_test(beatless):
            beatless.app.redis().publish("t_main_1:events:r1", "x")

        def test_makes_a_table(beatless):
            with psycopg.connect(libpq_url(beatless.app.settings.database_url)) as connection:
                connection.execute("CREATE TABLE public.runs ()")

        def test_makes_what_is_not_called_as_ours(beatless):
            with psycopg.connect(libpq_url(beatless.app.settings.database_url)) as connection:
                connection.execute("CREATE TABLE public.orders ()")
                connection.execute("CREATE VIEW public.seen AS SELECT 1")
                connection.execute("CREATE FUNCTION public.one() RETURNS int RETURN 1")
                connection.execute("CREATE TYPE public.size AS ENUM ('small')")
                connection.execute("CREATE SCHEMA elsewhere CREATE TABLE things ()")

        def test_leaves_a_schema_that_is_called_as_itself(beatless):
            with beatless.app.engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE SCHEMA {beatless.app.settings.prefix}_more")

        leaked = []

        def test_leaves_a_transaction_open(impatient, beatless):
            connection = beatless.app.executors.connect()
            connection.autocommit = False
            beatless.start_run("greet", connection=connection)
            leaked.append(connection)

        def test_leaves_a_relay_running(impatient, beatless):
            import threading
            from beatless.outbox.observer import RelayAsleep
            asleep = threading.Event()
            relay = beatless.app.relay(
                observer=lambda signal: isinstance(signal, RelayAsleep) and asleep.set()
            )
            relay.start()
            assert asleep.wait(60)
            leaked.append(relay)

        def test_is_an_app_whose_isolation_is_broken(beatless):
            settings = replace(beatless.app.settings, prefix="shared")
            app = App(settings, list(beatless.app.plans.values()))
            app.client.start_run("greet")
            relay = app.relay()
            relay.drain_once()
            relay.stop()
            app.close()

        def test_is_clean(beatless):
            run = beatless.start_run("greet")
            assert beatless.work_until_idle() == 1
            assert beatless.client.get_run(run.run_id).result == "hello"

        def test_ends_what_leaked():
            leaked[0].close()
            leaked[1].stop()
        """
    )

    result = run(project)

    result.assert_outcomes(passed=12, errors=10)
    result.stdout.fnmatch_lines_random(
        [
            "*the Redis key somebody:elses",
            "*a message on beatless:events:r1",
            "*a message on t_main_1:events:r1, a name of *test_writes_a_key, which had ended",
            "*a message on shop",
            "*a message on tills",
            "*the table public.runs",
            "*the function public.one",
            "*the schema elsewhere",
            "*the table elsewhere.things",
            "*the table public.orders",
            "*the type public.size",
            "*the view public.seen",
            "*the schema t_main_*_more",
            "*a session of 'beatless worker' (idle in transaction) with a lock*",
            "*a session of 'beatless relay *' (idle) with a lock*",
            "*the Redis key shared:*",
        ]
    )
    assert "ERROR at teardown of test_is_clean" not in result.stdout.str()


def test_a_project_that_does_not_use_the_kit_starts_nothing(project):
    project.makepyfile(
        """
        import pathlib, subprocess, threading

        def children():
            threads = pathlib.Path("/proc/self/task").glob("*/children")
            return "".join(thread.read_text() for thread in threads)

        def test_no_children():
            assert children() == ""

        def test_a_child_of_any_thread_would_be_seen():
            seen = []

            def start():
                with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
                    seen.append(children() == f"{child.pid} ")

            thread = threading.Thread(target=start)
            thread.start()
            thread.join()
            assert seen == [True]
        """
    )
    run(project).assert_outcomes(passed=2)


WATCHED = """
import sys, threading

told = open({told!r}, "a", buffering=1)

def note(event, arguments):
    if event in ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"):
        print("process", *arguments, file=told)

def note_thread(*_):
    sys.setprofile(None)
    print("thread", threading.current_thread().name, file=told)

sys.addaudithook(note)
threading.setprofile(note_thread)
from tests.plans import app
print("imported", file=told)
"""
"""An app in whose process every start of a thread or a process is noted, from its import on."""


@pytest.mark.slow
def test_neither_an_import_nor_the_api_starts_a_worker_or_a_relay(
    beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = tmp_path / "told"
    (tmp_path / "watched.py").write_text(WATCHED.format(told=str(told)))
    monkeypatch.syspath_prepend(tmp_path)
    serving = beatless._processes.start("watched:app", ["serve", "--port", "0"], {})
    run = beatless.start_run("two_steps")

    assert serving.alive
    serving.terminate()
    serving.reap(float("inf"))  # whatever it would do, it has done

    assert told.read_text() == "imported\n"
    with pytest.raises(AssertionError, match="outbox still has events"):
        beatless.wait_for_outbox_flush(run.run_id, timeout=0)
    beatless.drain_outbox_once()
    assert beatless.work_once()  # the message is still there


@pytest.mark.slow
def test_without_plans_the_error_says_what_to_do(pytester, beatless_services, monkeypatch):
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    pytester.makepyfile("def test_it(beatless): ...")
    pytester.makeini("[pytest]")  # or the settings of a folder above would be found

    result = run(pytester, "--beatless-services=external")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*set beatless_app = module:attribute*override the fixture*"])


@pytest.mark.slow
def test_settings_that_isolate_a_test_are_refused_in_a_sentence(
    pytester, beatless_services, monkeypatch
):
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    pytester.makeconftest(
        PROJECT
        + """
@pytest.fixture
def beatless_settings():
    return {"schema": "mine", "database_url": "postgresql://elsewhere/", "lease_seconds": 5}
"""
    )
    pytester.makepyfile("def test_it(beatless): ...")

    result = run(pytester, "--beatless-services=external")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*beatless_settings sets database_url, schema, which the kit*"])


@pytest.mark.slow
def test_a_test_that_times_out_tells_where_everything_stands(
    pytester, beatless_services, monkeypatch
):
    """As a user reads it: the run, its events, what waits to be published, and each process."""
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    pytester.makeini("[pytest]\nbeatless_app = shop:app")
    pytester.makepyfile(
        shop="""
        from beatless import App, Plan, Settings, step

        @step
        def reserve(ctx):
            return 1

        @step
        def charge(ctx):
            return 2

        app = App(Settings.from_env(), [Plan("checkout", [reserve, charge])])
        """,
        test_shop="""
        def test_checkout(beatless):
            run = beatless.start_run("checkout", run_id="order-1")
            beatless.step(run.run_id)
            beatless.drain_outbox_once()
            beatless.client.cancel_run(run.run_id)
            relay = beatless.relay_process("shop:app")
            beatless.wait_for_outbox_flush(run.run_id)
            relay.kill()
            other = beatless.start_run("checkout", run_id="order-2", delay=3600)
            beatless.wait_for_run_completion(other.run_id, timeout=0.1)
        """,
    )

    result = run(pytester, "--beatless-services=external")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*run order-2 did not end within 0.1 s*",
            "*run order-2 at *: queued",
            "*last_seq 1, claimed 0 times, by None",
            "*event 1 RunStarted*",
            "*outbox 1 to 1",
            "*dispatch ('delayed', *, 'delay', 0)",
            "*this process, last step_committed: {'run_id': 'order-1', 'step': 'reserve'}",
            "*this process, last drained: {'events': *, 'tasks': *, 'rows': *, 'messages': *}",
            "*relay-1 (ended): *",
        ]
    )


def test_two_sessions_on_the_same_servers_do_not_meet(beatless_services):
    """As two checkouts of a project on one machine, whose xdist workers have the same names."""
    with (
        closing(Isolation(beatless_services, "same")) as one,
        closing(Isolation(beatless_services, "same")) as other,
    ):
        assert one.name.worker != other.name.worker
        ours, theirs = one.schemas.take(), other.schemas.take()
        assert ours != theirs
        assert one.schemas.give_back(ours) == other.schemas.give_back(theirs) == []
    with closing(Isolation(beatless_services, "same")) as next_one:
        assert next_one.name.worker == one.name.worker


def test_clean_up_of_one_test_never_touches_another(beatless_services):
    """Not even of the test whose number has a digit more."""
    with (
        closing(Isolation(beatless_services, "one")) as one,
        closing(Isolation(beatless_services, "ten")) as ten,
    ):
        ours, theirs = one.schemas.take(), ten.schemas.take()
        prefix, neighbour = f"t_{one.name.worker}_1", f"t_{one.name.worker}_10"
        keys = [f"{neighbour}:x", f"{neighbour}.x", f"t_{ten.name.worker}_1:x"]
        for name in (f"{prefix}:x", f"{prefix}.x", *keys):
            one.stores.events.set(name, "kept")
        for schema in (ours, theirs):
            one.connection.execute(f"INSERT INTO {schema}.queues (name) VALUES ('kept')")
            one.connection.execute(f"CREATE TABLE {own_tables(schema)}.kept ()")

        remove_keys(one.stores.events, f"{prefix}[:.]*")
        assert one.schemas.give_back(ours) == []

        assert [one.stores.events.exists(name) for name in keys] == [1, 1, 1]
        assert not one.stores.events.exists(f"{prefix}:x", f"{prefix}.x")
        left = "SELECT (SELECT count(*) FROM {}.queues), to_regclass('{}.kept') IS NOT NULL"
        found = [
            one.connection.execute(left.format(schema, own_tables(schema))).fetchone()
            for schema in (ours, theirs)
        ]
        assert found == [(0, False), (1, True)]
        one.stores.events.delete(*keys)


def test_on_servers_that_others_use_only_our_own_names_are_judged(beatless_services, beatless):
    foreign = replace(beatless_services, ours=False)
    client = beatless.app.redis()
    own = f"{beatless.app.settings.prefix}:foreign"
    with closing(Isolation(foreign, "guest")) as isolation:
        client.set(own, "x")  # a name of another worker, as far as the guest can tell
        client.set(f"t_{isolation.name.worker}_1:x", "x")
        client.set(f"t_{isolation.name.worker}_2:x", "x")

        assert isolation.leaks.left_outside(f"t_{isolation.name.worker}_1") == [
            f"the Redis key t_{isolation.name.worker}_2:x"
        ]

        assert client.exists(own)
        client.delete(f"t_{isolation.name.worker}_1:x", f"t_{isolation.name.worker}_2:x")
    client.close()


def test_each_test_has_an_empty_schema_and_the_next_number(beatless: Kit, beatless_app: App):
    assert beatless.client.list_runs() == []
    assert beatless_app.settings.prefix.startswith("t_")
    assert beatless.start_run("two_steps").run_id.startswith("test-")


def test_a_failing_step_does_not_break_the_next_tests_worker(beatless: Kit):
    beatless.start_run("retries", {"failures": 1})
    assert beatless.work_until_idle() == 1
    beatless.start_run("two_steps")
    assert beatless.work_until_idle() == 1


def test_step_executes_exactly_one_step_and_gives_the_run_back(beatless: Kit):
    run = beatless.start_run("agents.run")
    for number, name in enumerate(["EnsureDevice", "Warmup", "OpenApp", "Ping", "Teardown"], 1):
        assert beatless.step(run.run_id)
        finished = [e.step for e in beatless.client.events(run.run_id) if e.type == "StepFinished"]
        assert (len(finished), finished[-1]) == (number, name)
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    assert not beatless.step(run.run_id)
    beatless.verify()


@pytest.mark.parametrize(
    ("at", "nth", "told"),
    [
        ("step.before", 2, "step.before was not reached 2 times"),
        ("schedule.fired", 1, "schedule.fired was not reached"),
    ],
)
def test_crash_says_when_its_point_was_never_reached(beatless: Kit, at: str, nth: int, told: str):
    beatless.start_run("fatally")
    with (
        pytest.raises(AssertionError, match=f"crash point {told}$"),
        beatless.crash(at=at, nth=nth),
    ):
        beatless.work_until_idle()


def test_an_armed_crash_that_was_not_reached_does_not_wait_for_the_next_test(beatless: Kit):
    with pytest.raises(AssertionError), beatless.crash(at="step.before"):
        pass
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


def test_an_unknown_crash_point_is_refused_with_the_known_ones(beatless: Kit):
    with pytest.raises(ValueError, match=r"choose one of .*, claim\.committed, "):
        beatless.crash(at="somewhere").__enter__()


def test_advance_moves_delays_retries_and_leases(beatless: Kit):
    delayed = beatless.start_run("two_steps", delay=3600)
    with beatless.crash(at="step.before"):
        crashed = beatless.start_run("two_steps")
        beatless.work_until_idle()
    assert beatless.work_until_idle() == 0

    beatless.advance(30.5)
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(crashed.run_id).state is RunState.COMPLETED
    beatless.advance(3600)
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(delayed.run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_run_that_never_ends_times_out_with_the_whole_picture(beatless: Kit):
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)

    with pytest.raises(AssertionError) as raised:
        beatless.wait_for_run_completion(run.run_id, timeout=0.05)

    said = str(raised.value)
    assert f"run {run.run_id} did not end within 0.05 s" in said
    assert "queued" in said
    assert "last_seq 3" in said
    assert "event 3 StepFinished first" in said
    assert "outbox 3 to 3" in said
    assert "dispatch ('waiting'" in said
    assert "this process, last step_committed: " in said


def test_the_other_waits_time_out_with_the_picture_too(beatless: Kit):
    run = beatless.start_run("two_steps")
    with pytest.raises(AssertionError, match=r"outbox still has events(.|\n)*outbox 1 to 1"):
        beatless.wait_for_outbox_flush(run.run_id, timeout=0.05)
    with pytest.raises(AssertionError, match=r"did not end(.|\n)*event 1 RunStarted"):
        beatless.collect_stream(run.run_id, timeout=0.05)


def test_the_outbox_is_flushed_up_to_a_seq(beatless: Kit):
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    beatless.step(run.run_id)
    beatless.wait_for_outbox_flush(run.run_id, seq=1)
    with pytest.raises(AssertionError):
        beatless.wait_for_outbox_flush(run.run_id, seq=2, timeout=0.05)
    beatless.drain_outbox_once(run.run_id)
    beatless.wait_for_outbox_flush(run.run_id)


def test_draining_one_run_leaves_the_others(beatless: Kit):
    one, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    assert beatless.drain_outbox_once(one.run_id) == 2
    beatless.wait_for_outbox_flush(one.run_id)
    with pytest.raises(AssertionError):
        beatless.wait_for_outbox_flush(other.run_id, timeout=0.05)


def test_work_until_idle_says_so_when_a_plan_never_rests(beatless: Kit):
    beatless.client.start_runs([])
    beatless.start_run("two_steps")
    beatless.start_run("two_steps")
    with pytest.raises(AssertionError, match="still not idle after 1 executions"):
        beatless.work_until_idle(limit=1)


def test_started_runs_are_found_by_input_key_and_tags(beatless: Kit):
    first = beatless.start_run("two_steps", {"n": 1}, key="k1", tags={"team": "a"})
    beatless.start_run("two_steps", None, tags={"team": "b"})

    assert beatless.assert_started("two_steps", input={"n": 1}) == [first]
    assert beatless.assert_started("two_steps", key="k1", tags={"team": "a"}) == [first]
    beatless.assert_started("two_steps", input=None)
    beatless.assert_started("two_steps", key=None)
    assert len(beatless.assert_started("two_steps", count=2)) == 2
    for wrong in ({"input": {"n": 2}}, {"key": "k2"}, {"tags": {"team": "c"}}, {}):
        with pytest.raises(AssertionError, match="not 1; the newest runs are"):
            beatless.assert_started("two_steps", **wrong)


def test_verify_finds_what_was_broken_by_hand(beatless: Kit, postgres: psycopg.Connection):
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()
    beatless.verify()
    postgres.execute("DELETE FROM run_events WHERE seq = 5")
    with pytest.raises(AssertionError, match=f"I2 run {run.run_id}: its events are not 1 to 13"):
        beatless.verify()


@step
def greet(ctx: StepContext) -> str:
    return f"hello {ctx.input}"


class TestOwnPlans:
    @pytest.fixture
    def beatless_plans(self):
        return [Plan("greet", [greet])]

    @pytest.fixture
    def beatless_settings(self):
        return {"lease_seconds": 5, "max_event_bytes": 500}

    def test_plans_and_settings_can_be_overridden(self, beatless: Kit):
        run = beatless.start_run("greet", "you")
        beatless.work_until_idle()
        assert beatless.client.get_run(run.run_id).result == "hello you"
        assert list(beatless.app.plans) == ["greet"]
        assert beatless.app.settings.lease_seconds == 5
