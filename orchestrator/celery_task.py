"""Calls a Celery task's body within a step, as much as Celery's worker would as a step can.

Duck typed, for nothing here knows Celery: it is the task that brings its classes along.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from beatless.orchestrator.errors import Fatal
from beatless.outbox.clock import monotonic

STATE_INTERVAL_S = 0.25
"""Between two stored calls of `update_state` with the same state, as between those of progress."""


class CeleryTask(Protocol):
    """The members of a Celery task that `Plan.task` needs."""

    name: str
    run: Callable[..., Any]


def is_celery_task(given: object) -> bool:
    """Whether it is a task of Celery's, or a proxy of one."""
    return not inspect.isclass(given) and all(
        callable(getattr(given, name, None)) for name in ("push_request", "apply_async", "run")
    )


class TaskInStep:
    """Wraps a task's class: calls that need Celery's messages or results become the step's.

    It shares the task's attributes, so that caches of a class, as a connection, are kept. What is
    known of one call is in slots, which are its own.
    """

    __slots__ = ("_context", "_entered", "_last_state", "_next_state")

    # The attributes of the task whose class comes behind.
    name: str
    request: Any
    request_stack: Any

    # Those of one call.
    _context: Any
    _entered: bool
    _last_state: Any
    _next_state: float

    @property
    def run(self) -> Callable[..., Any]:
        """At first the task's `__call__`, which may be its class's own; then the function.

        Celery's worker calls them in this order too. `autoretry_for` wraps the function; the step's
        `retry` is in its place.
        """
        if not self._entered:
            self._entered = True
            return super().__call__  # type: ignore[misc,no-any-return]  # of the class behind
        members = vars(self)
        if "run" in members and "_orig_run" not in members:
            found: Callable[..., Any] = members["run"]
            return found
        return super().run  # type: ignore[misc,no-any-return]  # of the class behind

    def push_request(self, *_: Any, **__: Any) -> None:
        """`Task.__call__` begins an empty request, as for a call by hand: it is the same one."""
        self.request_stack.push(self.request_stack.top)

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, **_: Any) -> Any:
        """Fail this attempt, with `exc` if it is given: the step's `retry` decides."""
        return super().retry(args, kwargs, exc)  # type: ignore[misc]  # of the class behind

    def update_state(
        self, task_id: str | None = None, state: Any = None, meta: Any = None, **options: Any
    ) -> None:
        """A trace of the run, `update_state`: no reader looks for a step in a result backend."""
        if task_id not in (None, self.request.id):
            super().update_state(task_id, state, meta, **options)  # type: ignore[misc]
            return
        now = monotonic()
        if state != self._last_state or now >= self._next_state:
            self._last_state, self._next_state = state, now + STATE_INTERVAL_S
            self._context.trace("update_state", state=state, meta=meta)

    def replace(self, sig: Any) -> Any:
        """Raises Fatal: a step cannot become another task."""
        raise Fatal(
            f"task {self.name} is a step and cannot be replaced by {sig}: return a value, and let "
            "the plan's next step or a Goto do the rest"
        )

    def add_to_chord(self, sig: Any, **_: Any) -> Any:
        """Raises Fatal: a step is in no chord."""
        raise Fatal(f"task {self.name} is a step and in no chord that {sig} could be added to")


def call_task(
    task: CeleryTask,
    context: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    timeout: float | None = None,
    max_retries: int = 0,
) -> Any:
    """Call the task as its worker would: by its class's `__call__`, with a request.

    Its `max_retries` is that of the step, with which tasks compare `request.retries`.
    """
    real: Any = task.push_request.__self__  # type: ignore[attr-defined]  # behind Celery's proxies
    kind = type(real)
    members = {"__slots__": (), "max_retries": max_retries}
    found: Any = object.__new__(type(kind.__name__, (TaskInStep, kind), members))
    found.__dict__ = real.__dict__
    found._context, found._entered = context, False
    found._last_state, found._next_state = None, 0.0
    # Celery's own __call__ makes it the current task, too.
    plain = next(each for each in kind.__mro__ if "push_request" in vars(each))
    real.push_request(**request_of(real.name, context, args, kwargs, timeout))
    try:
        return plain.__call__(found, *args, **kwargs)
    finally:
        real.pop_request()


def request_of(
    name: str, context: Any, args: Sequence[Any], kwargs: Mapping[str, Any], timeout: float | None
) -> dict[str, Any]:
    """The members of `self.request`. The rest are as in a task that belongs to nothing: None.

    `called_directly` stays true, so that a `retry` that is asked for outside of the task's own
    instance sends nothing either.
    """
    return {
        "id": context.key,
        "task": name,
        "args": list(args),
        "kwargs": dict(kwargs),
        "retries": context.attempt - 1,
        "correlation_id": context.key,
        "root_id": context.run_id,
        "parent_id": context.run_id,
        "hostname": context.worker,
        "delivery_info": {
            "exchange": context.queue,
            "routing_key": context.queue,
            "priority": context.priority,
            "redelivered": False,
        },
        "timelimit": [timeout, timeout],
        "ignore_result": True,
        "is_eager": False,
        "called_directly": True,
        "utc": True,
    }
