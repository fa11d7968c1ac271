"""Runs a Celery worker in this process, from its command line to its exit status."""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from enum import StrEnum
from pathlib import Path
from typing import Any

from celery import Celery, signals
from celery.bin.base import CLIContext
from celery.bin.worker import worker
from celery.platforms import isatty

from beatless.errors import BadRequest
from beatless.observe.logs import Format
from beatless.outbox.publishers import worker_queue
from beatless.settings import Settings
from beatless.worker.bootsteps import ReadyFile
from beatless.worker.tasks import RunsCelery
from beatless.worker.weights import QueueOrder

logger = logging.getLogger("beatless.worker")


ASYNC_RUNS = 100
"""Runs at once of the async pool, unless the concurrency is given."""


class Pool(StrEnum):
    """What a worker executes runs in."""

    PREFORK = "prefork"
    THREADS = "threads"
    SOLO = "solo"
    ASYNC = "async"


def run_worker(
    celery: RunsCelery,
    settings: Settings,
    *,
    queues: Mapping[str, int] | None = None,
    pool: Pool | None = None,
    concurrency: int | None = None,
    ready_file: Path | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Run a Celery worker in this process until it is asked to stop; its exit status.

    `queues` have weights. `pool` is one of Celery's, or ours (ASYNC); None: prefork. Raises
    BadRequest for weights that differ on another broker than Redis, which itself decides which
    message a worker gets next.
    """
    if queues:
        consume(celery, settings, queues)
    if ready_file is not None:
        celery.steps["worker"].add(ReadyFile.of(ready_file))
    if pool is Pool.ASYNC:
        celery.conf.worker_pool = celery.async_pool
    lifecycle = WorkerLifecycle()
    try:
        with lifecycle.watched():
            run_command(celery, settings, [*command_line(pool, concurrency), *arguments])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    if lifecycle.hung_up:
        logger.info("worker starts again", extra={"action": "worker_restarts"})
        logging.shutdown()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - itself
    return lifecycle.exit_status()


def consume(celery: Celery, settings: Settings, queues: Mapping[str, int]) -> None:
    """Let workers of this app take runs of these queues alone, in shares of their weights.

    Raises BadRequest for weights that differ on another broker than Redis.
    """
    celery.conf.task_queues = [worker_queue(settings.prefix, name) for name in queues]
    if len(set(queues.values())) > 1:
        if settings.redis_broker is None:
            raise BadRequest("--queues", "has weights, which only a Redis broker can give")
        weights = {f"{settings.prefix}.{name}": weight for name, weight in queues.items()}
        celery.conf.broker_transport_options = {
            **celery.conf.broker_transport_options,
            "queue_order_strategy": QueueOrder(weights),
        }


def run_command(celery: Celery, settings: Settings, arguments: Sequence[str]) -> None:
    """Celery's command `worker`, as its `worker_main` calls it.

    Not by the group of its commands: that imports all of them, with a prompt and Flower: a sixth
    of the time to start.
    """
    quiet = settings.log_format == Format.JSON
    if quiet:
        # Celery's banner and the output of its signal handlers are for people, past all logging.
        vars(sys)["__stdout__"] = None
    command = copy(worker)
    own = celery.user_options
    command.params = [*worker.params, *own.get("worker", ()), *own.get("preload", ())]
    command.main(
        args=list(arguments),
        prog_name="celery worker",
        standalone_mode=False,
        obj=CLIContext(
            app=celery,
            no_color=not quiet and bool(os.environ.get("NO_COLOR")),
            workdir=None,
            quiet=quiet,
        ),
    )


def command_line(pool: Pool | None, concurrency: int | None) -> list[str]:
    """The arguments of Celery's command."""
    argv = ["--without-gossip", "--without-mingle", "--hostname", f"beatless-{os.getpid()}@%h"]
    if pool is Pool.ASYNC:
        concurrency = concurrency or ASYNC_RUNS
    elif pool is not None:
        argv += ["--pool", pool.value]
    if concurrency is not None:
        argv += ["--concurrency", str(concurrency)]
    return argv


class WorkerLifecycle:
    """One worker of this process, as Celery's signals report it."""

    def __init__(self) -> None:
        self.hung_up = False
        """Whether it got a SIGHUP that asks it to start again."""
        self._main = os.getpid()
        self._sighup_before = signal.getsignal(signal.SIGHUP)
        self._workers: list[Any] = []
        self._stops: list[str] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The block in which the worker runs."""
        receivers = (
            (signals.worker_init, self._begins),
            (signals.worker_ready, self._ready),
            (signals.worker_shutting_down, self._shuts_down),
        )
        for sent, receiver in receivers:
            sent.connect(receiver)
        try:
            yield
        finally:
            for sent, receiver in receivers:
                sent.disconnect(receiver)

    def exit_status(self) -> int:
        """0 after an orderly end; Celery's status otherwise."""
        if "Warm" in self._stops:
            return 0
        # Celery keeps to itself that it could not go on.
        return int(next((worker.exitcode or 0 for worker in self._workers), 0))

    def _begins(self, sender: Any, **_: Any) -> None:
        self._workers.append(sender)

    def _ready(self, **_: Any) -> None:
        # Celery's own starts the command of `sys.argv`, which is not always the one started.
        before = self._sighup_before
        signal.signal(signal.SIGHUP, before if before == signal.SIG_IGN else self._hangs_up)

    def _shuts_down(self, how: str, **_: Any) -> None:
        self._stops.append(how)

    def _hangs_up(self, _number: int, _frame: object) -> None:
        if os.getpid() == self._main and not self._stops:
            # A worker that has lost its terminal does not come back.
            self.hung_up = self.hung_up or not isatty(sys.stdin)
            os.kill(self._main, signal.SIGTERM)
