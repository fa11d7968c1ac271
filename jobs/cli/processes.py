"""Commands that are processes of a fleet, or start one."""

import gc
import importlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import redis
from celery import signals
from kombu.exceptions import KombuError

from beatless.app import REDIS_TIMEOUTS, App
from beatless.cli.environment import Environment
from beatless.cli.options import LOG_FORMAT, METRICS_PORT, POOL, READY_FD, check_url, tell
from beatless.cli.stopping import stop_on_signals
from beatless.client.requests import QUEUE
from beatless.errors import BadRequest, BadSetting, ExtraMissing, Unreachable
from beatless.observe.export import export
from beatless.observe.systemd import ServiceManager
from beatless.outbox.message import EventMessage
from beatless.outbox.observer import RelayStarted, ShardsAssigned, Signal
from beatless.outbox.publishers import RedisEventPublisher
from beatless.redis_connections import is_cluster
from beatless.schema import check
from beatless.settings import Settings
from beatless.transactions import reaching_postgres
from beatless.worker.celery_app import warn_of_foreign

logger = logging.getLogger(__name__)


def check_servers(app: App) -> None:
    """Refuse to start a process that could not work: later, the same troubles are waited out.

    Raises Unreachable, SchemaBehind, and BadSetting for a broker on a Redis Cluster.
    """
    with reaching_postgres(app.settings.schema, app.engine):
        check(app.engine, app.settings.schema)
    app.engine.dispose()  # a worker's children must not inherit it
    client = app.redis()
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        raise Unreachable("Redis", str(error)) from error
    finally:
        client.close()
    try:
        with app.celery.connection_for_write() as broker:
            broker.ensure_connection(max_retries=1, timeout=5)
    except (KombuError, redis.RedisError, OSError) as error:
        raise Unreachable("the broker", str(error)) from error
    check_broker(app.settings)


def check_broker(settings: Settings) -> None:
    """Raises BadSetting for a Redis Cluster: the keys of Celery's queues are on several nodes."""
    if settings.redis_broker is None:
        return
    with settings.redis_broker.client(**REDIS_TIMEOUTS) as client:
        if is_cluster(client):
            raise BadSetting(
                "BEATLESS_BROKER_URL",
                "is a Redis Cluster, on which Celery's queues cannot live: give it another server",
                "redis://:password@broker.example:6379/0",
            )


def check_metrics_port(settings: Settings) -> None:
    """Raises BadSetting for a port in use: Celery would tell of it once its pool has started."""
    if settings.metrics_port:
        from beatless.observe.exposition import (
            check_port,
        )  # prometheus_client is for who is scraped

        check_port(settings.metrics_host, settings.metrics_port)


def check_rights(app: App) -> None:
    """Raises PublishRefused if our user at Redis may not publish: no event would be live."""
    with app.redis() as client:
        RedisEventPublisher(client, app.settings.prefix).publish(
            [EventMessage(origin="", run_id="", body=b"")]
        )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--queues",
    metavar="A,B",
    help="Only these queues, A=3,B=1 with weights; default: all of the app's plans.",
)
@POOL
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    help="Runs at once; default: the number of cores, of the async pool 100.",
)
@click.option(
    "--ready-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="There while the worker takes runs; touched every 5 s while it lives.",
)
@click.argument("celery_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- CELERY ARGS]")
@METRICS_PORT
@LOG_FORMAT
@READY_FD
@click.pass_obj
def worker(
    env: Environment,
    queues: str | None,
    pool: str | None,
    concurrency: int | None,
    ready_file: Path | None,
    celery_arguments: tuple[str, ...],
    ready_fd: int | None,
) -> None:
    """Run a Celery worker for the app's plans."""
    from beatless.worker.run import Pool, run_worker  # Celery's commands: not for a relay

    refuse_celery_queues(celery_arguments)
    refuse_celery_pools(celery_arguments)
    env.log()
    app = env.app
    check_metrics_port(app.settings)
    check_servers(app)

    def ready(**_: Any) -> None:
        if ready_file is not None:
            ready_file.touch()
        tell(ready_fd)

    signals.worker_ready.connect(ready)
    consumed = weights(queues or "")
    for name in sorted(consumed.keys() - {each.queue for each in app.plans.values()}):
        env.note(f"no plan names the queue {name}: its runs are those that are started with it")
    status = run_worker(
        app.celery,
        app.settings,
        queues=consumed,
        pool=Pool(pool) if pool else None,
        concurrency=concurrency,
        ready_file=ready_file,
        arguments=celery_arguments,
    )
    raise click.exceptions.Exit(status)


def refuse_celery_queues(arguments: Sequence[str]) -> None:
    """Raises BadRequest for Celery's option of queues, which knows no names without our prefix."""
    for option, names in celery_options(arguments, "-Q", "--queues"):
        problem = f"is Celery's: use --queues {names or 'A,B'}, before any --"
        raise BadRequest(option, problem)


def refuse_celery_pools(arguments: Sequence[str]) -> None:
    """Raises BadRequest for a pool behind -- that Celery or beatless does not have."""
    from beatless.worker.run import Pool

    for option, pool in celery_options(arguments, "-P", "--pool"):
        if pool == Pool.ASYNC:
            raise BadRequest(
                option, f"is Celery's, which has no pool {pool}: give it before any --"
            )
        if pool not in set(Pool):
            pools = " or ".join([", ".join(list(Pool)[:-1]), Pool.ASYNC])
            problem = f"has {pool!r:.200}, which executes no runs: use {pools}"
            raise BadRequest(option, problem)


def celery_options(arguments: Sequence[str], short: str, long: str) -> Iterator[tuple[str, str]]:
    """One of Celery's options, as it is spelt among these, with its value."""
    for place, argument in enumerate(arguments):
        found = re.fullmatch(rf"({short}|{long})(?:=?(.+))?", argument)
        if found:
            yield found[1], found[2] or "".join(arguments[place + 1 : place + 2])


def weights(queues: str) -> dict[str, int]:
    """Names of queues with their weights, 1 unless given. Raises BadRequest."""
    found = {}
    for entry in queues.split(","):
        name, separator, weight = (part.strip() for part in entry.partition("="))
        if name:
            if separator and not re.fullmatch("[1-9][0-9]{0,2}", weight):
                raise BadRequest("--queues", f"has {entry.strip()!r}: a weight is 1 to 999")
            if not QUEUE.fullmatch(name):
                hint = "; a weight is written fast=3" if ":" in name else ""
                problem = f"has {name!r:.200}, which no queue can be called: it must match "
                raise BadRequest("--queues", f"{problem}^{QUEUE.pattern}${hint}")
            found[name] = int(weight or 1)
    return found


@click.command()
@METRICS_PORT
@LOG_FORMAT
@READY_FD
@click.pass_obj
def relay(env: Environment, ready_fd: int | None) -> None:
    """Run a relay: it publishes events and hands runs to the broker."""
    env.log()
    app = env.app
    warn_of_foreign(os.environ, app.settings.broker_url)
    check_servers(app)

    supervisor = ServiceManager()

    def observe(signal: Signal) -> None:
        # Its loop emits a signal at least every 15 s, also while it waits for a server.
        supervisor.alive()
        match signal:
            case RelayStarted():
                logger.info("relay listens", extra={"action": "relay_started"})
                tell(ready_fd)
            case ShardsAssigned(shards=shards):
                logger.info(
                    "relay leads shards",
                    extra={"action": "relay_leads", "shards": " ".join(map(str, shards))},
                )

    check_rights(app)
    export("beatless-relay", os.environ)
    running = app.relay(observer=observe)
    app.metrics.relay.active = True
    # Imported objects stay. The collector scanned all of them again and again between batches:
    # a sixth of a busy relay's time, and pauses that its events waited for.
    gc.collect()
    gc.freeze()
    with stop_on_signals(running.ask_to_stop), served(app):
        running.run()


@contextmanager
def served(app: App) -> Iterator[None]:
    """The app's metrics, if its settings name a port."""
    if app.settings.metrics_port is None:
        yield
        return
    from beatless.observe.exposition import listen  # prometheus_client is for who is scraped

    server = listen(app.metrics.registry, app.settings.metrics_host, app.settings.metrics_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=5555, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--basic-auth",
    metavar="USER:PASSWORD",
    envvar="FLOWER_BASIC_AUTH",
    help="Required unless on loopback or with OAuth; default: FLOWER_BASIC_AUTH.",
)
@click.option("--read-only", is_flag=True, help="Show everything, permit no change.")
@click.option("--steps/--no-steps", default=True, help="Runs and steps, or Celery's tasks alone.")
@click.option(
    "--page-url",
    metavar="URL",
    envvar="BEATLESS_API_URL",
    help="Where the run page is, for links to it; default: BEATLESS_API_URL.",
)
@LOG_FORMAT
@READY_FD
@click.pass_obj
def flower(
    env: Environment,
    port: int,
    host: str,
    basic_auth: str | None,
    read_only: bool,
    steps: bool,
    page_url: str | None,
    ready_fd: int | None,
) -> None:
    """Run Flower on the app's workers and runs."""
    env.log()
    if page_url is not None:
        check_url("--page-url", page_url)
    try:
        # Imported when it is asked for: its extra is not installed everywhere.
        served = importlib.import_module("beatless.flower")
    except ModuleNotFoundError as error:
        raise ExtraMissing("Flower", error.name or "flower", "flower") from error
    options = served.FlowerOptions(
        host=host,
        port=port,
        basic_auth=basic_auth,
        read_only=read_only,
        steps=steps,
        page_url=page_url,
    )

    def ready(url: str) -> None:
        env.note(f"flower on {url}")
        tell(ready_fd)

    served.run_flower(env.app, options, ready)
