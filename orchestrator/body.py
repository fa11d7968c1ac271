"""Calls the body of a step, in this process alone."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NoReturn

from beatless.orchestrator.async_context import AsyncStepContext
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.django_connections import around_body, before_async_body
from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.loop_thread import LoopThread
from beatless.orchestrator.plan import Step
from beatless.orchestrator.watchdog import Attempt
from beatless.outbox.clock import monotonic


def call_body(
    step: Step,
    context: StepContext,
    attempt: Attempt,
    loop: LoopThread,
    wait: Callable[[Future[Any]], Any],
) -> Any:
    """Call a body in this thread, or in the loop if it is async: `wait` returns its result.

    The attempt is told how long it took.
    """
    began = monotonic()
    try:
        if not isinstance(context, AsyncStepContext):
            value = in_one_process(step, context)
            if inspect.iscoroutine(value):
                value.close()
                raise Fatal(
                    f"step {step.name} is an ordinary function that returns a coroutine: perhaps a "
                    "decorator hides that it is async; make the function that it gives async def"
                )
            return value

        async def body() -> Any:
            await before_async_body()
            try:
                return await step.function(context)
            finally:
                await context.drained()

        task = loop.begin(body, name=f"{context.run_id} {context.step}", leave_copy=leave_copy)
        attempt.runs_as(task)
        try:
            return wait(task.done)
        finally:
            if not task.done.done():  # a signal ends this process
                task.cancel()
    finally:
        attempt.taken_s = monotonic() - began


def in_one_process(step: Step, context: StepContext) -> Any:
    """Call a body. A copy of the process that it forks ends with it: the run is not the copy's."""
    pid, recursion = os.getpid(), sys.getrecursionlimit()
    with around_body():
        try:
            return step.function(context)
        finally:
            if sys.getrecursionlimit() < recursion:  # too low for what comes next
                sys.setrecursionlimit(recursion)
            if os.getpid() != pid:
                leave_copy(sys.exception())


def leave_copy(error: BaseException | None) -> NoReturn:
    """End as a process whose program is over, without the exit handlers of the one it copies."""
    status: object = 0
    if isinstance(error, SystemExit):
        status = error.code or 0
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status if isinstance(status, int) else 1)
