"""Plan.task: what an existing Celery task meets when it is called as a step."""

import threading
from dataclasses import dataclass, field
from typing import Any

import celery as library
import pytest
from celery import Celery, Task, current_task
from celery.exceptions import Retry

from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.retry import retry

celery = Celery("others", set_as_current=False)
"""Without a broker: whatever was sent would raise another error than the expected one."""


@dataclass
class Given:
    """As much of a StepContext as a Celery task's step looks at."""

    input: Any = None
    run_id: str = "run-1"
    step: str = "mail"
    attempt: int = 1
    queue: str = "default"
    priority: int = 0
    worker: str = "host:1:ab"
    results: dict[str, Any] = field(default_factory=lambda: {"one": 5})
    traces: list[Any] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.run_id}:{self.step}"

    def trace(self, name: str, **data: Any) -> None:
        self.traces.append((name, data))


@celery.task(shared=False, name="shop.tasks.add")
def add(a: int, b: int = 10) -> int:
    return a + b


@celery.task(shared=False, name="shop.tasks.named", bind=True)
def named(self) -> str:
    return self.name


@celery.task(shared=False, name="shop.tasks.asks", bind=True)
def asks(self, *args, **kwargs):
    return self.request


@pytest.mark.parametrize(
    ("input", "result"), [({"a": 1, "b": 2}, 3), ([1, 2], 3), ([1], 11), (1, 11)]
)
def test_a_celery_task_is_a_step_with_the_input_as_its_arguments(input, result):
    found = Plan.task(add)
    assert found.name == "add"
    assert found(Given(input)) == result


def test_a_bound_celery_task_gets_itself():
    assert Plan.task(named)(Given()) == "shop.tasks.named"


def test_a_celery_task_can_be_given_other_arguments_and_options():
    found = Plan.task(
        add,
        name="sum",
        timeout=5,
        arguments=lambda ctx: {"a": ctx.results["one"], "b": ctx.input["b"]},
    )
    assert (found.name, found.timeout) == ("sum", 5)
    assert found(Given({"b": 2})) == 7


def test_the_request_of_a_task_is_that_of_its_step():
    ctx = Given({"order": 7}, attempt=3, queue="mail", priority=4)
    request = Plan.task(asks, timeout=30)(ctx)
    assert (request.id, request.correlation_id) == ("run-1:mail", "run-1:mail")
    assert (request.root_id, request.parent_id) == ("run-1", "run-1")
    assert (request.retries, request.hostname) == (2, "host:1:ab")
    assert (request.args, request.kwargs) == ([], {"order": 7})
    assert request.delivery_info["routing_key"] == "mail"
    assert request.delivery_info["priority"] == 4
    assert (request.task, request.timelimit) == ("shop.tasks.asks", [30, 30])
    assert (request.is_eager, request.chord, request.chain, request.group) == (False,) + (None,) * 3
    assert Plan.task(asks)(Given([1, 2])).args == [1, 2]


def test_the_last_attempt_of_a_step_is_that_of_its_task():
    """By which tasks tell an operator, or give up, before they ask for another."""

    @celery.task(shared=False, bind=True, max_retries=9, name="shop.tasks.gives_up")
    def gives_up(self):
        return self.request.retries == self.max_retries, current_task.max_retries

    tried = Plan.task(gives_up, retry=retry(max_attempts=3))
    assert [tried(Given(attempt=n)) for n in (1, 2, 3)] == [(False, 2), (False, 2), (True, 2)]
    assert Plan.task(gives_up)(Given()) == (True, 0)
    assert gives_up.max_retries == 9


def test_the_request_ends_with_the_step():
    Plan.task(asks)(Given())
    assert asks.request.id is None


def test_each_thread_has_the_request_of_its_own_step():
    both = threading.Barrier(2)
    seen = {}

    @celery.task(shared=False, bind=True, name="shop.tasks.meets")
    def meets(self):
        both.wait(60)
        seen[self.request.id] = (self.request.retries, current_task.request.id)
        both.wait(60)

    found = Plan.task(meets)
    given = [Given(run_id="a", attempt=1), Given(run_id="b", attempt=2)]
    threads = [threading.Thread(target=found, args=(ctx,)) for ctx in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == {"a:mail": (0, "a:mail"), "b:mail": (1, "b:mail")}


class Cached(Task):
    """As in Celery's documentation: what a class keeps for its task."""

    connections = 0
    _connection = None

    @property
    def connection(self):
        if self._connection is None:
            type(self).connections += 1
            self._connection = object()
        return self._connection


@celery.task(shared=False, base=Cached, bind=True, name="shop.tasks.connected")
def connected(self):
    return id(self.connection)


def test_what_the_class_of_a_task_keeps_is_kept_from_step_to_step():
    assert Plan.task(connected)(Given()) == Plan.task(connected)(Given())
    assert Plan.task(connected)(Given()) == id(connected.connection)


def by_run(self, *args, **kwargs):
    return "context", self.run(*args, **kwargs)


def by_super(self, *args, **kwargs):
    return "context", super(type_of[id(by_super)], self).__call__(*args, **kwargs)


def by_name(self, *args, **kwargs):
    return "context", Task.__call__(self, *args, **kwargs)


type_of: dict[int, type] = {}


@pytest.mark.parametrize("call", [by_run, by_super, by_name])
@pytest.mark.parametrize("bind", [True, False])
def test_the_overridden_call_of_a_class_is_called_with_the_request(call, bind):
    kind = type_of[id(call)] = type("Context", (Task,), {"__call__": call})
    other = Celery("flask", task_cls=kind, set_as_current=False)

    if bind:

        @other.task(shared=False, bind=True, name="shop.tasks.mail")
        def mail(self, to):
            return to, self.request.id, current_task.request.id, self.request.kwargs
    else:

        @other.task(shared=False, name="shop.tasks.mail")
        def mail(to):
            return to, mail.request.id, current_task.request.id, mail.request.kwargs

    key = "run-1:mail"
    assert Plan.task(mail)(Given({"to": "ada"})) == ("context", ("ada", key, key, {"to": "ada"}))


def test_a_task_that_is_a_class_is_a_step():
    class Mail(Task):
        name = "shop.tasks.class_mail"

        def run(self, to):
            return to, self.request.id

    mail = celery.register_task(Mail())
    assert Plan.task(mail)(Given({"to": "ada"})) == ("ada", "run-1:mail")


def test_a_shared_task_is_a_step():
    @library.shared_task(bind=True, name="shop.tasks.shared")  # noqa: TID251 - as users have them
    def shared(self):
        return self.request.id

    assert Plan.task(shared)(Given()) == "run-1:mail"


def test_a_retry_fails_the_attempt_and_sends_nothing():
    @celery.task(shared=False, bind=True, name="shop.tasks.again", max_retries=1)
    def again(self, how):
        try:
            raise ConnectionError("the server is away")
        except ConnectionError as error:
            if how == "with":
                raise self.retry(exc=error, countdown=5, max_retries=9) from error
            if how == "by name":
                raise again.retry() from error
        raise self.retry(throw=False)

    with pytest.raises(ConnectionError, match="away"):
        Plan.task(again)(Given("with", attempt=7))
    assert not hasattr(again, "override_max_retries")
    for how in ("by name", "without"):
        with pytest.raises(Retry):
            Plan.task(again)(Given(how))


def test_what_is_retried_automatically_fails_the_attempt():
    @celery.task(
        shared=False,
        autoretry_for=(OSError,),
        retry_backoff=True,
        bind=True,
        name="shop.tasks.auto",
    )
    def auto(self):
        raise OSError(f"{self.request.retries} {self.request.id}")

    with pytest.raises(OSError, match="1 run-1:mail"):
        Plan.task(auto)(Given(attempt=2))


def test_a_state_that_a_task_tells_is_a_trace_of_the_run():
    @celery.task(shared=False, bind=True, name="shop.tasks.tells")
    def tells(self):
        for done in range(100):
            self.update_state(state="PROGRESS", meta={"done": done})
        self.update_state(state="NEARLY")
        current_task.update_state(state="DONE")

    ctx = Given()
    Plan.task(tells)(ctx)
    assert ctx.traces == [
        ("update_state", {"state": "PROGRESS", "meta": {"done": 0}}),
        ("update_state", {"state": "NEARLY", "meta": None}),
        ("update_state", {"state": "DONE", "meta": None}),
    ]


def test_a_task_cannot_become_another_one_as_a_step():
    @celery.task(shared=False, bind=True, name="shop.tasks.turns")
    def turns(self, how):
        return self.replace(add.s(1)) if how == "replace" else self.add_to_chord(add.s(1))

    with pytest.raises(Fatal, match=r"shop\.tasks\.turns is a step and cannot be replaced"):
        Plan.task(turns)(Given("replace"))
    with pytest.raises(Fatal, match="in no chord"):
        Plan.task(turns)(Given("chord"))


def test_hooks_of_a_task_are_not_called():
    class Hooked(Task):
        def before_start(self, *_):
            raise AssertionError

        on_success = on_failure = after_return = on_retry = before_start

    @celery.task(shared=False, base=Hooked, name="shop.tasks.hooked")
    def hooked():
        return 1

    assert Plan.task(hooked)(Given()) == 1
