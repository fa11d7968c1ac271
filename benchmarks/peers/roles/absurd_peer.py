"""Absurd: a task of five durable steps."""

import asyncio
import sys
from typing import Any

import psycopg
import tally
from absurd_sdk import Absurd, AsyncAbsurd
from absurdctl import BUNDLED_SCHEMA_SQL

CONCURRENCY, POLL_S = 16, 0.05


def install() -> None:
    with psycopg.connect(tally.DATABASE_URL, autocommit=True) as connection:
        connection.execute(BUNDLED_SCHEMA_SQL)
    Absurd(tally.DATABASE_URL, "default").create_queue("default")


async def work() -> None:
    absurd = AsyncAbsurd(tally.DATABASE_URL, "default")

    async def nothing() -> int:
        return 1

    @absurd.register_task("run")
    async def run(_: Any, ctx: Any) -> None:
        for number in range(5):
            await ctx.step(f"step-{number}", nothing)
        tally.mark()

    @absurd.register_task("job")
    async def job(params: Any, _: Any) -> None:
        tally.mark(params["began"])

    tally.ready()
    await absurd.start_worker(concurrency=CONCURRENCY, poll_interval=POLL_S)


def produce(what: str, how: str, count: int) -> None:
    absurd = Absurd(tally.DATABASE_URL, "default")
    began = tally.now()
    if how == "paced":
        for pause in tally.pauses(count):
            tally.pause(pause)
            absurd.spawn("job", {"began": tally.now()}, queue="default")
    else:
        for _ in range(count):
            absurd.spawn(what, {"began": 0.0}, queue="default")
    tally.report(seconds=tally.now() - began)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            install()
        case ["work"]:
            asyncio.run(work())
        case ["produce", what, how, count]:
            produce(what, how, int(count))
