"""Celery's pool of a worker that executes many runs in one process: `--pool async`."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar, Self

from celery.concurrency.base import BasePool, apply_target
from celery.concurrency.thread import ApplyResult

from beatless.worker.executors import Executors


class AsyncPool(BasePool):  # type: ignore[misc]  # Celery has no types
    """Gives each message to the executor of the process, as a call that waits for others.

    It has as many places as the worker's concurrency: so many runs are in flight at once.
    """

    body_can_be_buffer = True
    signal_safe = False
    executors: ClassVar[Executors]

    @classmethod
    def of(cls, executors: Executors) -> type[Self]:
        """The pool of one app: Celery takes classes."""
        return type(cls.__name__, (cls,), {"executors": executors, "__module__": cls.__module__})

    def on_start(self) -> None:
        self._executor = self.executors.begin_concurrent()
        self._executor.start()

    def on_stop(self) -> None:
        self._executor.stop()

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = None,
        kwargs: Any = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        **_: Any,
    ) -> ApplyResult:
        done: Future[None] = Future()

        def call() -> None:
            try:
                apply_target(target, args, kwargs, callback, accept_callback)
            finally:
                done.set_result(None)

        self._executor.spawn(call)
        return ApplyResult(done)

    def _get_info(self) -> dict[str, Any]:
        """For `celery inspect stats` and Flower."""
        return {**super()._get_info(), "runs": self._executor.in_flight}
