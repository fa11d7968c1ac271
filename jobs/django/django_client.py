"""The client of a Django project: its calls are part of the caller's `transaction.atomic()`."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Unpack

from django.db import connections
from django.utils.asyncio import async_unsafe

from beatless.client import Client
from beatless.client.requests import RunOptions, RunRequest
from beatless.client.signals import SignalRequest
from beatless.django.project import alias, app_of_project
from beatless.namespaces import DEFAULT_NAMESPACE
from beatless.orchestrator.records import Run, SentSignal
from beatless.outbox.queries import Caller

T = TypeVar("T")


@async_unsafe  # type: ignore[untyped-decorator]  # Django has no types
def open_transaction(using: str) -> Caller | None:
    """The psycopg connection of Django's transaction on this alias; None outside of one.

    None is opened to find that out: nobody would close it in a thread that serves no request.
    Raises TransactionManagementError in a block whose transaction has failed, and
    SynchronousOnlyOperation in a coroutine.
    """
    wrapper = connections[using]
    if not wrapper.in_atomic_block:
        closed = wrapper.connection is None
        if wrapper.settings_dict["AUTOCOMMIT"] if closed else wrapper.get_autocommit():
            return None
    wrapper.ensure_connection()
    wrapper.validate_no_broken_transaction()
    connection: Caller = wrapper.connection
    return connection


class DjangoClient(Client):
    """A `Client` whose calls are part of Django's open transaction on `using`, an alias.

    Inside of `transaction.atomic()` it writes what commits with the block, and reads what the block
    has written. Outside, each call is a transaction of its own, on a connection of beatless' pool.
    Streams, and waits for the end of a run, see what is committed.

    >>> from beatless.client import Client
    >>> from beatless.django import DjangoClient
    >>> issubclass(DjangoClient, Client)
    True
    """

    using = "default"

    def start_runs(
        self, requests: Sequence[RunRequest], *, connection: Caller | None = None
    ) -> list[Run]:
        """As `Client.start_runs`, in Django's open transaction if there is one."""
        return super().start_runs(requests, connection=connection or open_transaction(self.using))

    def signal_runs(
        self, requests: Sequence[SignalRequest], *, connection: Caller | None = None
    ) -> list[SentSignal]:
        """As `Client.signal_runs`, in Django's open transaction if there is one."""
        return super().signal_runs(requests, connection=connection or open_transaction(self.using))

    def cancel_run(
        self, run_id: str, *, reason: str | None = None, connection: Caller | None = None
    ) -> Run:
        """As `Client.cancel_run`, in Django's open transaction if there is one."""
        given = connection or open_transaction(self.using)
        return super().cancel_run(run_id, reason=reason, connection=given)

    def _in_transaction(self, given: Caller | None, act: Callable[[Caller], T], **how: bool) -> T:
        return super()._in_transaction(given or open_transaction(self.using), act, **how)


def client(using: str | None = None, *, namespace: str = DEFAULT_NAMESPACE) -> DjangoClient:
    """A client of the project's App. Made anew by each call: do not keep it in a module.

    `using` is an alias of DATABASES for the same database, as `atomic(using=…)` takes it; default:
    that of the runs. Raises BadSetting, ConnectionDoesNotExist and BadRequest (namespace).

    >>> from beatless.django import client  # doctest: +SKIP
    >>> client().cancel_run(order.run_id, reason="out of stock")  # doctest: +SKIP
    """
    found = app_of_project().client_for(namespace, kind=DjangoClient)
    assert isinstance(found, DjangoClient)  # noqa: S101 - it was asked for
    found.using = using or alias()
    return found


def start_run(
    plan: str, input: Any = None, *, using: str | None = None, **options: Unpack[RunOptions]
) -> Run:
    """Start a run in the caller's `transaction.atomic()`: both commit, or neither.

    Outside of a block it is stored at once. Options and errors are those of `Client.start_run`;
    `using` is an alias of DATABASES.

    >>> from beatless.django import start_run  # doctest: +SKIP
    >>> with transaction.atomic():  # doctest: +SKIP
    ...     order = Order.objects.create(title="book")
    ...     start_run("checkout", {"order": order.pk}, key=f"order:{order.pk}")
    """
    return client(using).start_run(plan, input, **options)


def start_runs(requests: Sequence[RunRequest], *, using: str | None = None) -> list[Run]:
    """Start many runs in the caller's `transaction.atomic()`, in one statement.

    >>> from beatless.django import start_runs  # doctest: +SKIP
    >>> start_runs(
    ...     [RunRequest(plan="checkout", input={"order": pk}) for pk in pks]
    ... )  # doctest: +SKIP
    """
    return client(using).start_runs(requests)


def signal_run(
    run_id: str, name: str, data: Any = None, *, key: str | None = None, using: str | None = None
) -> SentSignal:
    """Send a signal in the caller's `transaction.atomic()`; as `Client.signal_run`.

    >>> from beatless.django import signal_run  # doctest: +SKIP
    >>> signal_run(order.run_id, "paid", {"amount": 5})  # doctest: +SKIP
    """
    return client(using).signal_run(run_id, name, data, key=key)
