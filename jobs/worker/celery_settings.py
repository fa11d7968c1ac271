"""The configuration of the Celery app."""

from collections.abc import Iterable
from typing import Any

from beatless.orchestrator.plan import Plan
from beatless.outbox.publishers import worker_queue
from beatless.settings import Settings

REDIS_OPTIONS: dict[str, Any] = {
    # No unacked hash and no visibility timeout: a running task is never delivered a second time.
    "ack_emulation": False,
    "socket_timeout": 15,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "retry_on_timeout": False,
    "priority_steps": [0],
    "client_name": "beatless",
}


def celery_settings(settings: Settings, plans: Iterable[Plan]) -> dict[str, Any]:
    """The configuration of the Celery app; each line avoids a pitfall named in docs/workers.md."""
    broker = settings.redis_broker
    on_redis = broker is not None
    reached: dict[str, Any] = (
        {"broker_url": settings.broker_url} if broker is None else broker.broker()
    )
    # A publisher fails at once and backs off: by default kombu tries for seconds, on RabbitMQ
    # for ever, and the relay's other publisher would wait with it.
    options: dict[str, Any] = {"max_retries": 0}
    if on_redis:
        options |= {"global_keyprefix": f"{settings.prefix}:", **REDIS_OPTIONS}
        options |= reached["broker_transport_options"]
    names = sorted({"default", *(plan.queue for plan in plans)})
    return {
        **reached,
        "broker_transport_options": options,
        "result_backend": None,
        "task_ignore_result": True,
        "task_acks_late": not on_redis,
        "task_reject_on_worker_lost": False,
        "worker_prefetch_multiplier": 1,
        "worker_disable_prefetch": on_redis,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_connection_timeout": 5,
        "broker_channel_error_retry": True,
        "broker_pool_limit": 10,
        "task_queues": [worker_queue(settings.prefix, name) for name in names],
        "task_default_queue": f"{settings.prefix}.default",
        "task_default_exchange": f"{settings.prefix}.default",
        "task_default_routing_key": f"{settings.prefix}.default",
        "task_create_missing_queues": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        # Names of our own: the prefix of a Redis broker has no counterpart on other brokers.
        "event_exchange": f"{settings.prefix}.celeryev",
        "event_queue_prefix": f"{settings.prefix}.celeryev",
        "control_exchange": f"{settings.prefix}.control",
        "event_serializer": "json",
        "enable_utc": True,
        "timezone": "UTC",
        "worker_proc_alive_timeout": 60,
        # A killed child keeps its place in the pool so long, for a result that is not read here.
        "worker_lost_wait": 0.5,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
    }
