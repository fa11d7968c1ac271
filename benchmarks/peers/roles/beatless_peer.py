"""beatless: `beatless worker` and `beatless relay` as they are, with the journal of each run.

With PEER_BODIES=async the steps of `run` and `job` are `async def`.
"""

import asyncio
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import tally

from beatless import App, Plan, RunRequest, Settings, StepContext, step
from beatless.migrations import migrate
from beatless.orchestrator.plan import Step

BULK = 500


def measured(body: Callable[[StepContext], Any]) -> Step:
    """The step of a body, of the kind that is measured."""
    if os.environ.get("PEER_BODIES") != "async":
        return step(body)

    @functools.wraps(body)
    async def awaited(ctx: StepContext) -> Any:
        return body(ctx)

    return step(awaited)


@measured
def first(ctx: StepContext) -> int:
    ctx.trace("trace", number=1)
    return 1


@measured
def second(_: StepContext) -> int:
    return 2


@measured
def third(_: StepContext) -> int:
    return 3


@measured
def fourth(_: StepContext) -> int:
    return 4


@measured
def fifth(_: StepContext) -> int:
    return 5


@measured
def only(ctx: StepContext) -> None:
    tally.mark(ctx.input["began"])


@step
def tell(ctx: StepContext) -> None:
    for _ in range(ctx.input["count"]):
        tally.pause(0.02)
        ctx.trace("tick", began=tally.now())


app = App(
    Settings(database_url=tally.DATABASE_URL, redis_url=tally.REDIS_URL),
    [
        Plan("run", [first, second, third, fourth, fifth]),
        Plan("job", [only]),
        Plan("live", [tell]),
    ],
)


def become(*command: str) -> None:
    """Be `beatless …` from now on, with no option that is not named here."""
    arguments = [sys.executable, "-m", "beatless", "--app", "beatless_peer:app", *command]
    os.execv(sys.executable, arguments)


def produce(what: str, how: str, count: int) -> None:
    began = tally.now()
    if what == "live":
        app.client.start_run("live", {"count": count}, run_id="live")
    elif how == "paced":
        for pause in tally.pauses(count):
            tally.pause(pause)
            app.client.start_run("job", {"began": tally.now()})
    elif how == "single":
        for _ in range(count):
            app.client.start_run(what, {"began": 0.0})
    else:
        for start in range(0, count, BULK):
            size = min(BULK, count - start)
            app.client.start_runs([RunRequest(plan=what, input={"began": 0.0})] * size)
    tally.report(seconds=tally.now() - began)


def check() -> None:
    """Hands in how many events are stored, and how many messages wait to be published."""
    with app.engine.connect() as connection:
        counts = {
            name: connection.exec_driver_sql(
                f"SELECT count(*) FROM {app.settings.schema}.{table}"
            ).scalar_one()
            for name, table in (("stored", "run_events"), ("waiting", "run_outbox"))
        }
    tally.report(**counts)


def follow_all() -> None:
    """Receives every published event of every run; marks each run that has finished."""
    seen, finished = 0, set()
    with app.redis() as client, client.pubsub() as pubsub:
        pubsub.psubscribe(app.streams.channel("*"))
        while pubsub.get_message(timeout=5.0) is None:
            pass
        tally.ready()
        for message in pubsub.listen():
            if message["data"]:
                seen += message["data"].count(b"\n") + 1
            if b'"RunFinished"' in message["data"] and message["channel"] not in finished:
                finished.add(message["channel"])
                tally.report(seen=seen)
                tally.mark()


async def follow_one() -> None:
    """Follows the run `live`, which exists by now."""
    async for event in app.client.astream_run("live"):
        if event.type == "DebugTrace":
            tally.mark(event.data["began"])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            migrate(app.engine, app.settings.schema)
        case ["relay"]:
            become("relay")
        case ["work", *options]:
            become("worker", "--ready-file", str(tally.FOLDER / f"ready.{os.getpid()}"), *options)
        case ["check"]:
            check()
        case ["produce", what, how, count]:
            produce(what, how, int(count))
        case ["follow"] if os.environ["PEER_WORKLOAD"] == "live":
            tally.ready()
            while not app.client.list_runs(plan="live"):
                tally.pause(0.01)
            asyncio.run(follow_one())
        case ["follow"]:
            follow_all()
