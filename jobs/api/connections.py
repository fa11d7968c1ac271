"""The connections of a server: their number, and the seconds that they may be idle."""

import asyncio
import json
import logging
import resource
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
"""From the opening of a connection, or the end of an answer, to the end of the next headers."""

MAX_DESCRIPTORS = 65_536
SPARE_DESCRIPTORS = 128
"""For all but clients' connections: Postgres, Redis, files."""

MAX_BACKLOG = 2048

MAX_REFUSALS = 64
REFUSAL_S = 2.0
"""How long a refused client may take to read why."""


def raise_descriptor_limit() -> int:
    """Take as many open files as this process may have, and return that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MAX_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def share(descriptors: int) -> tuple[int, int]:
    """(connections, those that may wait to be accepted) that so many open files allow.

    asyncio accepts all that wait at once, up to three times before the first of them is counted.
    """
    backlog = max(1, min(MAX_BACKLOG, descriptors // 16))
    return max(1, descriptors - SPARE_DESCRIPTORS - 3 * backlog), backlog


class Connections:
    """Counts the connections of one server.

    When there are as many as there may be, a new one takes the place of the one that was idle
    for the longest time. If all of them are at work it is answered with 503.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self.silent: dict[Connection, None] = {}
        """Those of which a request is waited for, longest first."""
        self.refused = 0

    def make_room(self) -> bool:
        """Whether there is a place for another one."""
        if self.count >= self.limit and self.silent:
            next(iter(self.silent)).drop()
        return self.count < self.limit

    def protocol(self) -> type[H11Protocol]:
        """The protocol that uvicorn creates for each connection."""

        class Counted(Connection):
            connections_of_server = self

        return Counted


class Connection(H11Protocol):
    """One connection, which is dropped when its next request takes too long to come."""

    connections_of_server: ClassVar[Connections]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counted = False
        self._refused = False
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # As of uvicorn's own: asyncio gives a transport for reading and writing.
        server = self.connections_of_server
        if not server.make_room():
            self._refuse(transport)
            return
        self._counted = True
        server.count += 1
        super().connection_made(transport)
        self._follow()

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)
            self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self._refused:
            self.connections_of_server.refused -= 1
            return
        if self._counted:
            self._counted = False
            self.connections_of_server.count -= 1
        super().connection_lost(exc)

    def drop(self) -> None:
        """End it at once, even within a request."""
        self._forget()
        if self._counted:
            self._counted = False  # its place is free before the loop reports its loss
            self.connections_of_server.count -= 1
        self.transport.abort()

    @property
    def _waits(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _follow(self) -> None:
        if not self._waits or self.transport.is_closing():
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(REQUEST_TIMEOUT_S, self.drop)
            self.connections_of_server.silent[self] = None

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self.connections_of_server.silent.pop(self, None)

    def _refuse(self, transport: asyncio.Transport) -> None:
        self._refused = True
        self.transport = transport
        server = self.connections_of_server
        server.refused += 1
        if server.refused > MAX_REFUSALS:
            transport.abort()
            return
        transport.write(_refusal())
        if transport.can_write_eof():
            transport.write_eof()
        # Its bytes are read and dropped, or a reset would overtake the answer.
        self.loop.call_later(REFUSAL_S, transport.abort)


def _refusal() -> bytes:
    status = HTTPStatus.SERVICE_UNAVAILABLE
    content = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": "all connections of this process are in use: come again later",
    }
    body = json.dumps(content).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 5\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
