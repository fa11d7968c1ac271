"""One canary run, there and back: the times of its events, or the hop where it was lost."""

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg

from beatless.client import Client
from beatless.doctor.probe import SERVER_ERRORS, Probe
from beatless.errors import WaitTimeout
from beatless.namespaces import id_prefix
from beatless.orchestrator.events import EventType
from beatless.orchestrator.records import new_run_id
from beatless.outbox.clock import monotonic
from beatless.outbox.message import shard_of
from beatless.outbox.queries import channel_of
from beatless.streams.subscription import Subscription
from beatless.worker import canary

BELL_INTERVAL_S = 0.05
"""Until the thread that listens notices the end of a flight."""


@dataclass(slots=True, kw_only=True)
class Flight:
    """Observations of one canary run. Times are this process's, in seconds since the epoch."""

    run_id: str
    queue: str
    began: float = 0.0
    committed: float = 0.0
    rang: float | None = None
    """When the relay was notified; None if it was awake, or the run was lost before."""
    heard: dict[str, float] = field(default_factory=dict)
    """When an event of each type first came over Redis."""
    written: dict[str, float] = field(default_factory=dict)
    """When it was written, by Postgres' clock."""
    answer: Mapping[str, Any] = field(default_factory=dict)
    """The result of its step, which names its worker."""
    dispatch_state: str = ""
    """At the end."""


class CanaryLost(Exception):
    """A canary run did not come back."""

    def __init__(self, hop: str, text: str, advice: str) -> None:
        super().__init__(hop, text, advice)
        self.hop = hop
        self.text = text
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.hop}: {self.text}"


def fly(probe: Probe, queue: str) -> Flight:
    """Send one canary run through a queue, and remove it. Raises CanaryLost."""
    flight = Flight(run_id=f"{id_prefix(canary.NAMESPACE)}canary-{new_run_id()}", queue=queue)
    app = probe.app
    client = app.client_for(canary.NAMESPACE, canary=True)
    with ExitStack() as stack:
        listener = stack.enter_context(probe.connect_directly())
        listener.execute(f'LISTEN "{channel_of(probe.schema)}"'.encode())
        subscription = Subscription(app.redis, app.streams.channel(flight.run_id))
        stack.callback(subscription.close)
        live = subscription.ensure()
        over = threading.Event()
        listening = threading.Thread(target=hear_bell, args=(listener, flight, over), daemon=True)
        flight.began = time.time()
        listening.start()
        try:
            client.start_run(canary.NAME, run_id=flight.run_id, queue=queue)
            flight.committed = time.time()
            if live:
                hear_events(subscription, flight, timeout_s=probe.patience_s)
            else:  # the journal shows how far it comes
                with suppress(WaitTimeout):
                    client.wait_for_run(flight.run_id, timeout=probe.patience_s)
        finally:
            over.set()
            listening.join()
            read_journal(probe, client, flight)
            remove(probe, client, flight)
    if EventType.RUN_FINISHED not in flight.written:
        raise lost(probe, flight)
    if EventType.RUN_FINISHED not in flight.heard:
        raise CanaryLost(
            "event",
            "it was executed, but its events did not come over Redis",
            "see whether relays and this machine have the same BEATLESS_REDIS_URL and "
            "BEATLESS_PREFIX, whether its user may subscribe, and what a relay's log says",
        )
    return flight


def hear_bell(listener: psycopg.Connection[Any], flight: Flight, over: threading.Event) -> None:
    """Note when the relay is notified of the flight's shard. Other shards' are no news."""
    shard = str(shard_of(flight.run_id))
    with suppress(psycopg.Error):
        while not over.is_set():
            for notification in listener.notifies(timeout=BELL_INTERVAL_S):
                rung, _, _ = notification.payload.partition(" ")
                if rung == shard and flight.rang is None:
                    flight.rang = time.time()


def hear_events(subscription: Subscription, flight: Flight, *, timeout_s: float) -> None:
    """Note when each event comes over Redis, until the last one or the timeout."""
    deadline = monotonic() + timeout_s
    while EventType.RUN_FINISHED not in flight.heard and monotonic() < deadline:
        for event in subscription.next(deadline - monotonic()) or ():
            flight.heard.setdefault(event.type, time.time())


def read_journal(probe: Probe, client: Client, flight: Flight) -> None:
    """Note when each event was written, and the step's answer."""
    sql = probe.sql(__file__)
    with suppress(*SERVER_ERRORS):
        for type, at in probe.rows(sql["event_times"], {"run_id": flight.run_id}):
            flight.written.setdefault(type, at)
        for event in client.events(flight.run_id):
            if event.type == EventType.STEP_FINISHED:
                flight.answer = (event.data or {}).get("result") or {}


def remove(probe: Probe, client: Client, flight: Flight) -> None:
    """Take the run away, and note how far its dispatch came."""
    sql = probe.sql(__file__)
    with suppress(*SERVER_ERRORS):
        rows = probe.rows(sql["dispatch_state"], {"run_id": flight.run_id})
        flight.dispatch_state = rows[0][0] if rows else "ended"
        client.cancel_run(flight.run_id, reason="the doctor has gone")
        client.remove_run(flight.run_id)


def lost(probe: Probe, flight: Flight) -> CanaryLost:
    """The error for a run that has not finished: it names the hop that it did not pass."""
    patience = f"{probe.patience_s:g} s"
    if EventType.STEP_STARTED in flight.written:
        return CanaryLost(
            "step",
            f"a worker has it and did not end it in {patience}",
            "look at the worker's log",
        )
    if flight.dispatch_state == "sent":
        return CanaryLost(
            "broker",
            f"a relay sent it to the broker, and no worker took it in {patience}",
            "see whether a worker of this queue runs, is busy, and has the same "
            "BEATLESS_BROKER_URL and BEATLESS_PREFIX",
        )
    return CanaryLost(
        "relay",
        f"no relay took it in {patience}",
        "look at the log of a relay" if probe.leads() else "start `beatless relay`",
    )
