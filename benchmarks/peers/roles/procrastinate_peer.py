"""Procrastinate: no steps, so a run is a chain of five jobs, each of which defers the next."""

import asyncio
import sys

import procrastinate
import tally

CONCURRENCY = 8
BULK = 1000

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(
        conninfo=tally.DATABASE_URL, min_size=1, max_size=CONCURRENCY + 2
    )
)


@app.task(name="step", queue="default")
async def step(number: int) -> None:
    tally.mark()
    if number < 4:
        await step.defer_async(number=number + 1)


@app.task(name="job", queue="default")
async def job(began: float) -> None:
    tally.mark(began)


async def install() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def work() -> None:
    async with app.open_async():
        asyncio.get_running_loop().call_later(1, tally.ready)
        await app.run_worker_async(queues=["default"], concurrency=CONCURRENCY)


def produce(what: str, how: str, count: int) -> None:
    connector = procrastinate.SyncPsycopgConnector(conninfo=tally.DATABASE_URL)
    with app.replace_connector(connector) as starter, starter.open():
        task, arguments = (step, {"number": 0}) if what == "run" else (job, {"began": 0.0})
        began = tally.now()
        if how == "paced":
            for pause in tally.pauses(count):
                tally.pause(pause)
                job.defer(began=tally.now())
        elif how == "single":
            for _ in range(count):
                task.defer(**arguments)
        else:
            for start in range(0, count, BULK):
                task.batch_defer(*[arguments] * min(BULK, count - start))
        tally.report(seconds=tally.now() - began)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            asyncio.run(install())
        case ["work"]:
            asyncio.run(work())
        case ["produce", what, how, count]:
            produce(what, how, int(count))
