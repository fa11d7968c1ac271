"""The servers whose stop ends the streams of an API."""

import asyncio
from typing import Any

import pytest
import uvicorn

from beatless.api import open_streams
from beatless.api.open_streams import OpenStreams
from beatless.auth import EVERYTHING


class Beside(uvicorn.Server):
    """A server of the same loop that is there until it is told to go."""

    def __init__(self) -> None:
        super().__init__(uvicorn.Config("nowhere:app", log_config=None))
        self.goes = asyncio.Event()

    async def serve(self, sockets: Any = None) -> None:
        await self.goes.wait()


async def said_by(stops: "asyncio.Queue[bool]", wanted: bool) -> None:
    async with asyncio.timeout(60):
        while await stops.get() is not wanted:
            pass


def test_streams_end_while_a_server_beside_stops_and_not_behind_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor while it has not started: it has no sockets yet."""
    monkeypatch.setattr(open_streams, "STOP_CHECK_S", 0.001)
    stops, ended = open_streams._stops, list[None]()

    async def watch() -> None:
        said: asyncio.Queue[bool] = asyncio.Queue()

        def noting(servers: list[uvicorn.Server]) -> bool:
            said.put_nowait(stops(servers))
            return stops(servers)

        monkeypatch.setattr(open_streams, "_stops", noting)
        server = Beside()
        serving = asyncio.create_task(server.serve())
        with OpenStreams(tokens=None).watching(EVERYTHING, lambda: ended.append(None)):  # type: ignore[arg-type]
            await said_by(said, False)
            assert ended == []
            server.should_exit = True
            await said_by(said, True)
            server.goes.set()
            await serving
            await said_by(said, False)
        assert ended

    asyncio.run(watch())
