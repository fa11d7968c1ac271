"""PgQueuer: no steps, so a run is a chain of five jobs, each of which enqueues the next."""

import asyncio
import os
import struct
import subprocess
import sys
from urllib.parse import urlsplit

import asyncpg
import tally
import uvloop
from pgqueuer import Job, PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries

BATCH = 50
BULK = 1000


def install() -> None:
    subprocess.run(
        [sys.executable, "-m", "pgqueuer", "install"],
        check=True,
        env=os.environ | {"PGDSN": tally.DATABASE_URL} | libpq(),
    )


def libpq() -> dict[str, str]:
    url = urlsplit(tally.DATABASE_URL)
    return {
        "PGHOST": url.hostname or "",
        "PGPORT": str(url.port),
        "PGUSER": url.username or "",
        "PGPASSWORD": url.password or "",
        "PGDATABASE": url.path[1:],
    }


async def work() -> None:
    queue = PgQueuer.from_asyncpg_connection(await asyncpg.connect(tally.DATABASE_URL))

    @queue.entrypoint("step")
    async def step(job: Job) -> None:
        number = job.payload[0]
        tally.mark()
        if number < 4:
            await queue.queries.enqueue("step", bytes([number + 1]))

    @queue.entrypoint("job")
    async def single(job: Job) -> None:
        tally.mark(*struct.unpack("<d", job.payload))

    asyncio.get_running_loop().call_later(1, tally.ready)
    await queue.run(batch_size=BATCH)


async def produce(what: str, how: str, count: int) -> None:
    queries = Queries(AsyncpgDriver(await asyncpg.connect(tally.DATABASE_URL)))
    name, payload = ("step", b"\0") if what == "run" else ("job", struct.pack("<d", 0))
    began = tally.now()
    if how == "paced":
        for pause in tally.pauses(count):
            await asyncio.sleep(pause)
            await queries.enqueue("job", struct.pack("<d", tally.now()))
    elif how == "single":
        for _ in range(count):
            await queries.enqueue(name, payload)
    else:
        for start in range(0, count, BULK):
            size = min(BULK, count - start)
            await queries.enqueue([name] * size, [payload] * size, [0] * size)
    tally.report(seconds=tally.now() - began)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            install()
        case ["work"]:
            uvloop.run(work())
        case ["produce", what, how, count]:
            uvloop.run(produce(what, how, int(count)))
