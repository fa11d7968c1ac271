"""What a step is given, and what it may not do with it."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from sqlalchemy.exc import DBAPIError

from beatless import Goto, Plan, RunState, StepContext, retry, step
from beatless.testing import Kit


@step
def look(ctx: StepContext) -> dict[str, Any]:
    return {
        "run_id": ctx.run_id,
        "plan": ctx.plan,
        "step": ctx.step,
        "attempt": ctx.attempt,
        "input": ctx.input,
        "tags": ctx.tags,
        "key": ctx.key,
        "results": dict(ctx.results),
    }


@step
def again(ctx: StepContext) -> Any:
    return Goto("look") if ctx.step == "again" else {"key": ctx.key}


@step
def chatter(ctx: StepContext) -> None:
    for number in range(200):
        ctx.progress(number, f"at {number}")
    ctx.trace("done", text='quotes " and \\ and \n', nested={"a": [1, None, True]})


@step(retry=retry(max_attempts=3))
def bad_trace(ctx: StepContext) -> None:
    ctx.trace("bad", value={"deep": [float("inf")]})


@step(retry=retry(max_attempts=3))
def careful(ctx: StepContext) -> str:
    """Knows that its trace may be refused."""
    try:
        ctx.trace("big", value="x" * 2000)
    except ValueError:
        return "wrong error"
    except Exception as error:
        return str(error)
    return "stored"


@step
def borrows(ctx: StepContext) -> None:
    ctx.connection.exec_driver_sql("SELECT 1")


@step(transactional=True)
def ends_it(ctx: StepContext) -> None:
    getattr(ctx.connection, ctx.input)()


@step(transactional=True)
def careless(ctx: StepContext) -> int:
    """Loses its connection when it is called first, and hides it."""
    called = Path(ctx.input)
    if called.exists():
        return 2
    called.touch()
    with suppress(DBAPIError):
        ctx.connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
    return 1


@step(transactional=True)
def hides_an_error(ctx: StepContext) -> None:
    with suppress(DBAPIError):
        ctx.connection.exec_driver_sql("SELECT 1 / 0")


@step
def data_called_like_parameters(ctx: StepContext) -> None:
    ctx.trace("odd", step=3, attempt=None, where="here", type="t", data=1, self=2)


@step
def data_called_name(ctx: StepContext) -> None:
    ctx.trace("odd", name="other")


@step
def strays(ctx: StepContext) -> Any:
    return Goto("look")


@step
def swallows(ctx: StepContext) -> str:
    """Hides every exception, as careless code does."""
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise RuntimeError("outer \0 with a NUL") from error


existing = Celery("existing", set_as_current=False)


@existing.task(name="shop.charge", bind=True, shared=False)
def charge(self, order: int) -> dict[str, Any]:
    self.update_state(state="PROGRESS", meta={"order": order})
    if self.request.retries < 2:
        raise self.retry(exc=TimeoutError("try again"))
    return {"id": self.request.id, "queue": self.request.delivery_info["routing_key"]}


PLANS = [
    Plan("charges", [Plan.task(charge, retry=retry(max_attempts=3, initial=0))]),
    Plan("look", [look, again], routes={"again": ["look"]}),
    Plan("chatter", [chatter]),
    Plan("bad_trace", [bad_trace]),
    Plan("careful", [careful]),
    Plan("borrows", [borrows]),
    Plan("ends_it", [ends_it]),
    Plan("careless", [careless]),
    Plan("hides_an_error", [hides_an_error]),
    Plan("odd_data", [data_called_like_parameters]),
    Plan("named_data", [data_called_name]),
    Plan("strays", [strays, look]),
    Plan("swallows", [swallows]),
]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return PLANS


@pytest.fixture
def beatless_settings() -> dict[str, Any]:
    return {"max_event_bytes": 8000}


def finish(beatless: Kit, plan: str, input: Any = None, **options: Any):
    run = beatless.start_run(plan, input, **options)
    beatless.work_until_idle()
    beatless.verify()
    return beatless.client.get_run(run.run_id)


def test_a_celery_task_knows_its_key_queue_and_retries(beatless: Kit):
    run = finish(beatless, "charges", {"order": 7}, queue="tills")
    assert run.result == {"id": f"{run.run_id}:charge", "queue": "tills"}
    events = beatless.client.events(run.run_id)
    told = [event.data for event in events if event.type == "DebugTrace"]
    state = {"name": "update_state", "state": "PROGRESS", "meta": {"order": 7}}
    assert told == [state] * 3


def test_a_step_knows_its_run_its_place_and_what_went_before(beatless: Kit) -> None:
    run = finish(beatless, "look", {"n": 1}, tags={"team": "a"})
    first, second = (
        e.data["result"]
        for e in beatless.client.events(run.run_id)
        if e.type == "StepFinished" and e.step.startswith("look")
    )
    assert first == {
        "run_id": run.run_id,
        "plan": "look",
        "step": "look",
        "attempt": 1,
        "input": {"n": 1},
        "tags": {"team": "a"},
        "key": f"{run.run_id}:look",
        "results": {},
    }
    # A visit has a key of its own: it is another thing that is done.
    assert (second["step"], second["key"]) == ("look#2", f"{run.run_id}:look#2")
    assert second["results"] == {"look": first, "again": None}
    assert run.result == {"key": f"{run.run_id}:again#2"}


def test_progress_is_limited_and_traces_are_not(beatless: Kit) -> None:
    run = finish(beatless, "chatter")
    traces = [e.data for e in beatless.client.events(run.run_id) if e.type == "DebugTrace"]
    told = [data for data in traces if data["name"] == "progress"]
    assert told[0] == {"name": "progress", "pct": 0.0, "note": "at 0"}
    assert len(told) < 10
    assert all(0 <= data["pct"] <= 100 for data in told)
    assert traces[-1] == {
        "name": "done",
        "text": 'quotes " and \\ and \n',
        "nested": {"a": [1, None, True]},
    }


def test_a_trace_that_cannot_be_stored_fails_the_run_without_a_retry(beatless: Kit) -> None:
    run = finish(beatless, "bad_trace")
    assert run.state is RunState.FAILED
    assert run.error["message"] == (
        "step bad_trace: trace 'bad'.value.deep[0] is inf, which is not JSON: use None or a string"
    )


def test_a_trace_that_is_too_large_may_be_handled_by_the_step(beatless: Kit) -> None:
    assert finish(beatless, "careful").result == "stored"


def test_only_a_transactional_step_has_a_connection(beatless: Kit) -> None:
    run = finish(beatless, "borrows")
    assert run.error["message"] == (
        "step borrows has no connection: declare it @step(transactional=True)"
    )


@pytest.mark.parametrize("method", ["commit", "rollback", "close"])
def test_a_transactional_step_that_ends_its_transaction_fails_and_says_so(
    beatless: Kit, method: str
) -> None:
    run = finish(beatless, "ends_it", method)
    assert run.state is RunState.FAILED
    assert "step ends_it ended the transaction of ctx.connection" in run.error["message"]


def test_a_transactional_step_that_hides_a_lost_connection_is_done_again(
    beatless: Kit, tmp_path: Path
) -> None:
    run = finish(beatless, "careless", str(tmp_path / "called"))
    assert (run.state, run.result) == (RunState.COMPLETED, 2)


def test_a_transactional_step_that_hides_an_error_fails(beatless: Kit) -> None:
    run = finish(beatless, "hides_an_error")
    assert run.state is RunState.FAILED
    assert "InFailedSqlTransaction" in run.error["message"]


def test_traced_data_may_be_called_anything_but_name(beatless: Kit) -> None:
    run = finish(beatless, "odd_data")
    assert beatless.client.events(run.run_id)[2].data == {
        "name": "odd",
        "step": 3,
        "attempt": None,
        "where": "here",
        "type": "t",
        "data": 1,
        "self": 2,
    }
    named = finish(beatless, "named_data")
    assert named.error["message"] == "a trace has its name already: call the datum something else"


def test_a_route_that_was_not_declared_fails_the_run_and_is_named(beatless: Kit) -> None:
    run = finish(beatless, "strays")
    assert run.error["message"] == (
        "step strays returned Goto('look'), which plan strays does not declare in its routes"
    )


def test_a_failure_keeps_its_causes_in_text_that_postgres_can_store(beatless: Kit) -> None:
    run = finish(beatless, "swallows")
    assert run.error["type"] == "RuntimeError"
    assert run.error["message"] == r"outer \0 with a NUL"
    assert "KeyError: 'inner'" in run.error["traceback"]
    assert run.error["step"] == "swallows"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise KeyError("no text")


class TestErrorsOfAnySize:
    """The limit is for users' data: it must not keep us from telling what went wrong."""

    @pytest.fixture
    def beatless_plans(self, text: str) -> list[Plan]:
        @step
        def verbose(ctx: StepContext) -> None:
            raise ValueError(text * 10_000)

        @step
        def unspeakable(ctx: StepContext) -> None:
            raise Unspeakable

        return [Plan("verbose", [verbose]), Plan("unspeakable", [unspeakable])]

    @pytest.fixture
    def beatless_settings(self) -> dict[str, Any]:
        return {"max_event_bytes": 200}

    @pytest.mark.parametrize("text", ["x", "\ud800", "\0", "é"])
    def test_a_long_or_odd_error_message_still_ends_the_run(
        self, beatless: Kit, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.CRITICAL)  # xdist cannot carry half of a surrogate pair
        run = finish(beatless, "verbose")
        assert run.state is RunState.FAILED
        assert run.error["type"] == "ValueError"

    @pytest.mark.parametrize("text", [""])
    def test_an_error_without_a_text_still_ends_the_run(self, beatless: Kit) -> None:
        run = finish(beatless, "unspeakable")
        assert run.error["message"] == "<Unspeakable whose text cannot be shown>"
