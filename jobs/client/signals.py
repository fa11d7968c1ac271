"""Calls that send signals to runs, and show what runs wait for."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beatless.client.base import BaseClient
from beatless.errors import BadRequest
from beatless.orchestrator.events import encode
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.options import problem_with_key
from beatless.orchestrator.outcomes import STEP_NAME
from beatless.orchestrator.records import NewSignal, SentSignal
from beatless.outbox.awaited import AsyncCaller
from beatless.outbox.queries import Caller

logger = logging.getLogger("beatless.client")


@dataclass(frozen=True, slots=True)
class SignalRequest:
    """One signal of a `signal_runs` call; the members are the arguments of `signal_run`.

    >>> from beatless import SignalRequest
    >>> run = app.client.start_run("checkout", {"order": 1})
    >>> [sent.new for sent in app.client.signal_runs([SignalRequest(run.run_id, "paid")])]
    [True]
    """

    run_id: str
    name: str
    data: Any = None
    key: str | None = None


def new_signal_key() -> str:
    """A key that no other signal has."""
    return secrets.token_urlsafe(16)


class SignalCalls(BaseClient):
    """Signals to runs, and the waits of a run."""

    def signal_run(
        self,
        run_id: str,
        name: str,
        data: Any = None,
        *,
        key: str | None = None,
        connection: Caller | None = None,
    ) -> SentSignal:
        """Send a named JSON fact to a run; it is sent if and when the transaction commits.

        Whether the run waits for it now, later or never: it gets a seq in the journal, and the
        first `wait` for its name takes it. `connection` is as for `start_run`; the run's row is
        neither locked nor changed, so your transaction may stay open. `key` names the signal: a
        second one for the run with the same key and content is not sent again.

        Raises RunNotFound, RunEnded, SignalConflict (key used with other content), BadRequest and
        BadPayload.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> client.signal_run(run.run_id, "paid", {"amount": 12}, key="psp:42").new
        True
        >>> client.signal_run(run.run_id, "paid", {"amount": 12}, key="psp:42").new
        False
        """
        request = SignalRequest(run_id=run_id, name=name, data=data, key=key)
        with self._naming(run_id):
            return self.signal_runs([request], connection=connection)[0]

    async def asignal_run(
        self,
        run_id: str,
        name: str,
        data: Any = None,
        *,
        key: str | None = None,
        connection: AsyncCaller | None = None,
    ) -> SentSignal:
        """`signal_run` in your asynchronous transaction; `connection` is as for `astart_run`.

        >>> import asyncio
        >>> run = client.start_run("checkout", {"order": 1})
        >>> asyncio.run(client.asignal_run(run.run_id, "paid", {"amount": 12})).new
        True
        """
        return await self._awaited(
            connection, lambda given: self.signal_run(run_id, name, data, key=key, connection=given)
        )

    def signal_runs(
        self, requests: Sequence[SignalRequest], *, connection: Caller | None = None
    ) -> list[SentSignal]:
        """Send many signals in one statement: all or, if one of them cannot be sent, none.

        >>> from beatless import SignalRequest
        >>> runs = [client.start_run("checkout", {"order": n}) for n in (1, 2)]
        >>> len(client.signal_runs([SignalRequest(run.run_id, "paid") for run in runs]))
        2
        """
        if not requests:
            return []
        new = [self._checked_signal(request) for request in requests]
        sent = self._in_transaction(
            connection,
            lambda caller: self._inbox.send(caller, new, namespace=self._namespace),
            each_statement=True,
        )
        if connection is None:
            for signal, stored in zip(new, sent, strict=True):
                logger.info(
                    "signal stored",
                    extra={
                        "action": "signal_stored",
                        "run_id": signal.run_id,
                        "signal": signal.name,
                        "new": stored.new,
                    },
                )
        return sent

    async def asignal_runs(
        self, requests: Sequence[SignalRequest], *, connection: AsyncCaller | None = None
    ) -> list[SentSignal]:
        """`signal_runs` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.signal_runs(requests, connection=given)
        )

    def waits(self, run_id: str, *, connection: Caller | None = None) -> list[OpenWait]:
        """The waits of a run that have begun and not ended. Raises RunNotFound.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> client.waits(run.run_id)
        []
        """

        def look(caller: Caller) -> list[OpenWait]:
            run = self._get(caller, run_id)
            if run.state.final:
                return []
            return self._inbox.open_waits(caller, run.run_id)

        return self._in_transaction(connection, look)

    async def awaits(self, run_id: str, *, connection: AsyncCaller | None = None) -> list[OpenWait]:
        """`waits` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(connection, lambda given: self.waits(run_id, connection=given))

    def _checked_signal(self, request: SignalRequest) -> NewSignal:
        """Raises BadRequest and BadPayload."""
        name, key = request.name, request.key
        if not isinstance(name, str) or not STEP_NAME.fullmatch(name):
            raise BadRequest(
                "name", f"is {name!r:.200}, which does not match ^{STEP_NAME.pattern}$"
            )
        if key is not None and (problem := problem_with_key(key)):
            raise BadRequest("key", problem)
        return NewSignal(
            run_id=self.stored_id(request.run_id),
            name=name,
            # A random one, so that a statement whose answer was lost can be sent again.
            key=new_signal_key() if key is None else key,
            data=encode(
                request.data, where="the signal's data", limit=self._journal.max_event_bytes
            ),
        )
