"""Limits in bytes count bytes, whatever the text is written in."""

import asyncio
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from beatless.api.body_limit import HEAD_BYTES, BodyLimit


async def _app(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})


def _status(scope: Scope) -> int:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(BodyLimit(_app)(scope, receive, send))
    found: int = sent[0]["status"]
    return found


def test_an_address_is_as_long_as_it_was_sent() -> None:
    path = "/" + "漢" * (HEAD_BYTES // 2)
    scope: dict[str, Any] = {"type": "http", "headers": [], "path": path, "query_string": b""}
    assert _status(scope) == 431
    assert _status(scope | {"raw_path": path.encode()}) == 431
    assert _status(scope | {"path": "/short"}) == 204
