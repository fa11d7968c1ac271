"""Django's connections around the body of a step, as Django has them around a request.

Nothing happens in a process that has not set Django up.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


def around_body() -> Any:
    """A context in which a body of this thread works with connections that are alive.

    The log of queries, which DEBUG lets grow, is emptied before. A connection that is broken, or
    older than CONN_MAX_AGE, is closed before and after; never one that is in a transaction.
    """
    return _NOTHING if _django() is None else _around()


_NOTHING = nullcontext()


@contextmanager
def _around() -> Iterator[None]:
    _refresh()
    try:
        yield
    finally:
        _refresh()


async def before_async_body() -> None:
    """As before other bodies: for the thread in which Django's asynchronous calls are executed."""
    if _django() is not None:
        from asgiref.sync import sync_to_async  # it is there where Django is

        refresh: Callable[[], Any] = sync_to_async(_refresh, thread_sensitive=True)
        await refresh()


def _django() -> Any:
    """`django.db`, if this process has set Django up."""
    apps = sys.modules.get("django.apps")
    return sys.modules.get("django.db") if apps is not None and apps.apps.ready else None


def _refresh() -> None:
    db = sys.modules["django.db"]
    db.reset_queries()
    db.close_old_connections()
