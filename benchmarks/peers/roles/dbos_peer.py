"""DBOS: a workflow of five steps, on a queue in the database."""

import os
import sys
import threading

import sqlalchemy
import tally
from dbos import DBOS, DBOSClient

CONCURRENCY, POLL_S = 32, 0.05
BULK = 500


def configured(executor: str) -> None:
    DBOS(
        config={
            "name": "peer",
            "system_database_url": tally.DATABASE_URL,
            "executor_id": executor,
            "application_version": "1",
            "log_level": "ERROR",
            "run_migrations": executor == "install",
        }
    )

    @DBOS.step()
    def step(number: int) -> int:
        return number

    @DBOS.workflow(name="run")
    def run(_: float) -> None:
        for number in range(5):
            step(number)
        tally.mark()

    @DBOS.workflow(name="job")
    def job(began: float) -> None:
        tally.mark(began)

    @DBOS.workflow(name="live")
    def live(count: int) -> None:
        for _ in range(count):
            tally.pause(0.02)
            DBOS.write_stream("events", tally.now())
        DBOS.close_stream("events")


def install() -> None:
    configured("install")
    DBOS.launch()
    DBOS.register_queue("default", worker_concurrency=CONCURRENCY, polling_interval_sec=POLL_S)
    DBOS.destroy()


def work() -> None:
    configured(f"worker{os.getpid()}")
    DBOS.listen_queues(["default"])
    DBOS.launch()
    tally.ready()
    threading.Event().wait()


def client() -> DBOSClient:
    return DBOSClient(
        system_database_url=tally.DATABASE_URL, application_name="peer", use_listen_notify=True
    )


def produce(what: str, how: str, count: int) -> None:
    starter = client()
    options = {"queue_name": "default", "workflow_name": what, "app_version": "1"}
    began = tally.now()
    if what == "live":
        starter.enqueue(options | {"workflow_id": "live"}, count)
    elif how == "paced":
        for pause in tally.pauses(count):
            tally.pause(pause)
            starter.enqueue(options, tally.now())
    elif how == "single":
        for _ in range(count):
            starter.enqueue(options, 0.0)
    else:
        url = tally.DATABASE_URL.replace("postgresql://", "postgresql+psycopg://")
        engine = sqlalchemy.create_engine(url)
        for start in range(0, count, BULK):
            with engine.begin() as connection:
                for _ in range(min(BULK, count - start)):
                    starter.enqueue_in_transaction(connection, options, 0.0)
    tally.report(seconds=tally.now() - began)


def follow() -> None:
    """Reads the stream of the workflow, once that exists, woken by NOTIFY."""
    reader = client()
    tally.ready()
    while not reader.list_workflows(workflow_ids=["live"]):
        tally.pause(0.01)
    for began in reader.read_stream("live", "events"):
        tally.mark(began)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["install"]:
            install()
        case ["work"]:
            work()
        case ["produce", what, how, count]:
            produce(what, how, int(count))
        case ["follow"]:
            follow()
