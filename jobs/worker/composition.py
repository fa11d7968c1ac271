"""Puts the Celery app of the workers together: its settings, its steps, a task for each plan."""

from collections.abc import Sequence
from functools import partial

from beatless.observe.metrics import Metrics
from beatless.orchestrator.fleet_watch import FleetWatch
from beatless.orchestrator.lease import Leases
from beatless.orchestrator.plan import Plan
from beatless.settings import Settings
from beatless.worker.async_pool import AsyncPool
from beatless.worker.bootsteps import (
    FastPoolRepair,
    GroupLimit,
    MetricsListener,
    ProcessSetup,
    SystemdWatchdog,
)
from beatless.worker.celery_app import asking
from beatless.worker.celery_settings import celery_settings
from beatless.worker.child_signals import ChildSignals, TerminatedChildren
from beatless.worker.executors import Executors
from beatless.worker.lease_keeper import LeaseKeeper
from beatless.worker.presence import PresenceReport
from beatless.worker.reconnects import ReconnectBackoff, UnreadableMessages
from beatless.worker.shutdown import GracefulShutdown
from beatless.worker.tasks import RunsCelery, register


def make_celery(
    settings: Settings,
    plans: Sequence[Plan],
    *,
    executors: Executors,
    leases: Leases,
    metrics: Metrics,
    fleet: partial[FleetWatch] | None,
) -> RunsCelery:
    """A Celery app with a task for each plan, whose workers run them with these executors.

    `fleet` makes a worker's watch over the others.
    """
    celery = RunsCelery(settings.prefix)
    if (password := settings.password("broker")) is not None:
        celery.amqp.Connection = asking(password)
    celery.conf.update(celery_settings(settings, plans))
    celery.steps["consumer"] |= {UnreadableMessages, ReconnectBackoff.of(executors.draining)}
    celery.steps["worker"] |= {
        ProcessSetup,
        FastPoolRepair,
        SystemdWatchdog,
        GracefulShutdown.of(executors.draining, executors.board, settings),
        ChildSignals.of(TerminatedChildren()),
        LeaseKeeper.of(
            executors.board,
            executors.roster,
            leases,
            executors.connect,
            metrics.worker,
            fleet=fleet,
        ),
        PresenceReport.of(executors, settings),
        GroupLimit.of(executors),
        MetricsListener.of(metrics, settings),
    }
    celery.async_pool = AsyncPool.of(executors)
    for plan in plans:
        register(celery, plan, executors)
    return celery
