"""Cancellations that a library swallows."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_cancellation() -> Iterator[None]:
    """Raise asyncio.CancelledError at the end of this block if the task was cancelled in it.

    Before Python 3.12 asyncio.wait_for swallows a cancellation that comes when what it waits for
    has just ended (python/cpython#86296), and redis-py awaits each of its writes by it. A task that
    goes on then is one that nobody knows of. An error that came just then gives way to it.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        yield
    except Exception as error:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
