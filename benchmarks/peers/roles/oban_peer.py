"""Oban for Python: no steps, so a run is a chain of five jobs, each of which enqueues the next."""

import asyncio
import sys

import tally
import uvloop
from oban import Job, Oban, worker
from oban.schema import install as install_schema

CONCURRENCY, CONNECTIONS = 30, 10
BULK = 1000


@worker(queue="default")
class Step:
    async def process(self, job: Job) -> None:
        tally.mark()
        if job.args["number"] < 4:
            await Step.enqueue({"number": job.args["number"] + 1})


@worker(queue="default")
class Single:
    async def process(self, job: Job) -> None:
        tally.mark(job.args["began"])


async def install() -> None:
    pool = await Oban.create_pool(tally.DATABASE_URL)
    await install_schema(pool)
    await pool.close()


async def work() -> None:
    pool = await Oban.create_pool(tally.DATABASE_URL, min_size=1, max_size=CONNECTIONS)
    async with Oban(pool=pool, queues={"default": CONCURRENCY}):
        tally.ready()
        await asyncio.Event().wait()


async def produce(what: str, how: str, count: int) -> None:
    pool = await Oban.create_pool(tally.DATABASE_URL)
    async with Oban(pool=pool) as oban:
        began = tally.now()

        def new() -> Job:
            return Step.new({"number": 0}) if what == "run" else Single.new({"began": 0.0})

        if how == "paced":
            for pause in tally.pauses(count):
                await asyncio.sleep(pause)
                await Single.enqueue({"began": tally.now()})
        elif how == "single":
            for _ in range(count):
                await oban.enqueue(new())
        else:
            for start in range(0, count, BULK):
                await oban.enqueue_many(*[new() for _ in range(min(BULK, count - start))])
        tally.report(seconds=tally.now() - began)
    await pool.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            uvloop.run(install())
        case ["work"]:
            uvloop.run(work())
        case ["produce", what, how, count]:
            uvloop.run(produce(what, how, int(count)))
