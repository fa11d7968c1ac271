"""Five hundred `async def` steps in one process, each of which waits for a server."""

import asyncio
import re
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from beatless import Settings
from benchmarks.measure import SPAWN
from benchmarks.waits.fleet import Chosen, Figure, Fleet, fleets

STEPS = 500
SECONDS = 1.0
"""That a step waits."""

LEASE_S = 2.0
LONG_SECONDS = 3 * LEASE_S
"""That a step waits whose lease must be extended meanwhile."""


def measure(chosen: Chosen) -> Iterator[Figure]:
    count = chosen.of(STEPS)
    pool = ("worker", "--pool", "async", "--concurrency", str(count))
    with fleets() as fleet:
        ours, theirs = SPAWN.Pipe()
        server = fleet.bench.child(serve, theirs)
        port: int = ours.recv()
        relay, worker = fleet.start("relay"), fleet.start(*pool)
        _ask(fleet, count, port, SECONDS)  # the first one imports and connects
        found = [_ask(fleet, count, port, SECONDS) for _ in range(chosen.repeats)]
        memory = _most_resident(worker.pid)
        fleet.end(relay, worker)
        fleet.start("relay", lease_seconds=LEASE_S), fleet.start(*pool, lease_seconds=LEASE_S)
        claims = [_ask(fleet, count, port, LONG_SECONDS)[2] for _ in range(chosen.repeats)]
        server.kill()
    of = f"{count} async steps that wait {SECONDS:g} s each for a server, one process"
    yield Figure(
        key="async", values=[each[0] for each in found], unit="s", what=f"start to end of all: {of}"
    )
    yield Figure(
        key="async.bodies",
        values=[each[1] for each in found],
        unit="s",
        what="first line of the first to last line of the last",
    )
    yield Figure(key="async.memory", values=[memory], unit="MB", what="most memory of it (RSS)")
    yield Figure(
        key="async.claims",
        values=claims,
        unit="",
        what=f"claims of each run, steps of {LONG_SECONDS:g} s under a lease of {LEASE_S:g} s",
    )


def _ask(fleet: Fleet, count: int, port: int, seconds: float) -> tuple[float, float, float]:
    """Seconds from the start of runs to their end, those of their bodies, and claims of each."""
    began = time.time()
    run_ids = fleet.start_runs("asking", [{"port": port, "seconds": seconds}] * count)
    fleet.until(lambda: not fleet.ask("SELECT count(*) FROM dispatches"), "the runs end")
    (last, claims) = fleet.db.execute(
        "SELECT extract(epoch FROM max(finished_at))::float8, avg(attempt)::float8 FROM runs"
        " WHERE run_id = ANY(%s)",
        (run_ids,),
    ).fetchone() or (0.0, 0.0)
    bodies = fleet.results(run_ids)
    first_line, last_line = min(each[0] for each in bodies), max(each[1] for each in bodies)
    return last - began, last_line - first_line, claims


def _most_resident(pid: int) -> float:
    """MB of memory that a process has had at most."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def serve(_: Settings, pipe: Pipe) -> None:
    """A server that answers a line with a number after so many seconds; tells its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(float(await reader.readline()))
        writer.write(b"done\n")
        await writer.drain()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", backlog=STEPS) as server:
            pipe.send(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    asyncio.run(run())
