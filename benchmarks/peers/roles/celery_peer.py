"""Celery alone, on Redis, with acks_late: a run is a chain of five tasks, whose results are kept.

One worker of the solo pool for each core: it executes more than one of the prefork pool.
"""

import json
import os
import sys

import redis
import tally
from celery import Celery, Task, chain
from celery.signals import worker_ready

KEEPS_RESULTS = os.environ["PEER_WORKLOAD"] in ("runs", "live")

app = Celery("peer", broker=tally.REDIS_URL, backend=tally.REDIS_URL if KEEPS_RESULTS else None)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=not KEEPS_RESULTS,
    task_default_queue="default",
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=4,
)


@app.task(name="step")
def step(number: int) -> int:
    tally.mark()
    return number


@app.task(name="job")
def job(began: float) -> None:
    tally.mark(began)


@app.task(name="live", bind=True)
def live(self: Task, count: int) -> None:
    for _ in range(count):
        tally.pause(0.02)
        self.update_state(state="PROGRESS", meta={"began": tally.now()})


def work() -> None:
    worker_ready.connect(lambda **_: tally.ready(), weak=False)
    name = f"peer{os.getpid()}@localhost"
    options = ["--pool", "solo", "--without-gossip", "--without-mingle", "--loglevel", "ERROR"]
    app.worker_main(["worker", "-n", name, *options])


def produce(what: str, how: str, count: int) -> None:
    began = tally.now()
    if what == "live":
        live.apply_async((count,), task_id="live")
    elif how == "paced":
        for pause in tally.pauses(count):
            tally.pause(pause)
            job.delay(tally.now())
    elif what == "run":
        for _ in range(count):
            chain(*(step.si(number) for number in range(5))).apply_async()
    else:
        for _ in range(count):
            job.delay(0.0)
    tally.report(seconds=tally.now() - began)


def follow() -> None:
    """Receives the states of the task as its result backend publishes them."""
    pubsub = redis.Redis.from_url(tally.REDIS_URL).pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("celery-task-meta-live")
    tally.ready()
    for message in pubsub.listen():
        found = json.loads(message["data"])
        if found["status"] == "PROGRESS":
            tally.mark(found["result"]["began"])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["work"]:
            work()
        case ["produce", what, how, count]:
            produce(what, how, int(count))
        case ["follow"]:
            follow()
