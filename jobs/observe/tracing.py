"""Spans of runs, for OpenTelemetry. Without its packages, or its SDK, nothing of it costs anything.

start CHECKOUT            where start_run was called; its context is stored with the run
├─ publish                in the relay, for each append of events: from its writing to Redis
├─ dispatch               from the time the run was due to its claim, as the worker sees it
├─ run CHECKOUT           one claim by one worker; a retry is a further one
│  ├─ step reserve        one attempt; your own spans are its children
│  └─ step charge
└─ …

Who exports the spans is the process's affair: see beatless.observe.export.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from time import time_ns
from typing import Any

from beatless.observe import published
from beatless.orchestrator.events import EventType
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.observer import Settled
from beatless.orchestrator.state import RunState
from beatless.outbox.observer import Drained, Signal

try:
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # the extra `otel` is not installed
    INSTALLED = False
else:
    INSTALLED = True
    W3C = TraceContextTextMapPropagator()
    RUN: ContextVar["trace.Span | None"] = ContextVar("beatless_run_span", default=None)

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

_NOTHING: AbstractContextManager[None] = nullcontext(None)

MAX_TRACES = 10_000
"""Runs whose trace a relay remembers at the same time. It learns them from their RunStarted."""


class Tracing:
    """Makes the spans of one app."""

    def __init__(self, shown: Callable[[Any], Any] = lambda error: error) -> None:
        """`shown` gives the part of an error that a span may show."""
        self._shown = shown
        # Delegates to the process's provider, as soon as there is one.
        self._tracer = trace.get_tracer("beatless") if INSTALLED else None

    # Starting

    def starting(
        self,
        plan: str,
        run_id: str,
        *,
        traceparent: str | None = None,
        follows: str | None = None,
    ) -> AbstractContextManager[Mapping[str, str] | None]:
        """Around the start of a run; gives the trace context to store with it.

        `traceparent` is the trace to join, instead of the caller's current one. `follows` is that
        of a run that this one retries: a link.
        """
        if traceparent is None and self.idle():
            return _NOTHING
        given = traceparent if TRACEPARENT.fullmatch(traceparent or "") else None
        if self._tracer is None:
            return nullcontext({"traceparent": given} if given else None)
        here = trace.get_current_span().get_span_context()
        if given is not None and here.is_valid and f"{here.trace_id:032x}" in given:
            given = None  # the server is instrumented itself, and nearer
        if given is None and self.idle():
            return _NOTHING
        return _start_span(self._tracer, plan, run_id, given, follows)

    def idle(self) -> bool:
        """Whether spans are not recorded here, and there is no trace to pass on."""
        if self._tracer is None:
            return True
        return not _recording() and not trace.get_current_span().get_span_context().is_valid

    # Executing

    def scope(
        self, lease: Lease, step: str | None, attempt: int
    ) -> AbstractContextManager[str | None]:
        """Around the work on a run, and around each attempt; gives the traceparent of the span."""
        carried = (lease.trace_context or {}).get("traceparent")
        if self._tracer is None:
            return nullcontext(carried)
        if step is not None:  # a child of the run's span, if there is one
            if RUN.get() is None:
                return nullcontext(carried)
            return _step_span(self._tracer, step, attempt)
        if carried is None and self.idle():
            return nullcontext(None)
        return _run_span(self._tracer, lease)

    def observe(self, signal: Signal) -> None:
        """The observer of executors: committed events become events of the span, with their seq."""
        if not isinstance(signal, Settled) or self._tracer is None:
            return
        run = RUN.get()
        if run is None:
            return
        span = trace.get_current_span()
        seq = signal.last_seq - len(signal.events)
        for number, event in enumerate(signal.events, 1):
            span.add_event(event.type, {"beatless.seq": seq + number})
            if event.type == EventType.STEP_FAILED and span.is_recording():
                error = self._shown(json.loads(event.data or "{}").get("error") or {})
                text = f"{error.get('type')}: {error.get('message')}"
                span.set_status(trace.Status(trace.StatusCode.ERROR, text))
        run.set_attribute("beatless.state", signal.state.value)
        if signal.state is RunState.FAILED:
            run.set_status(trace.Status(trace.StatusCode.ERROR))


@contextmanager
def _start_span(
    tracer: "trace.Tracer", plan: str, run_id: str, given: str | None, follows: str | None
) -> Iterator[Mapping[str, str] | None]:
    with tracer.start_as_current_span(
        f"start {plan}",
        context=W3C.extract({"traceparent": given}) if given else None,
        kind=trace.SpanKind.PRODUCER,
        attributes={"beatless.plan": plan, "beatless.run_id": run_id},
        links=_links(follows),
    ):
        carrier: dict[str, str] = {}
        W3C.inject(carrier)
        yield carrier or None


@contextmanager
def _run_span(tracer: "trace.Tracer", lease: Lease) -> Iterator[str | None]:
    run = lease.run
    parent = W3C.extract(lease.trace_context) if lease.trace_context else None
    attributes: dict[str, str | int] = {
        "beatless.plan": run.plan,
        "beatless.run_id": run.run_id,
        "beatless.queue": run.queue,
        "beatless.claim": run.attempt,
    }
    if lease.waited is not None and parent is not None:
        now = time_ns()
        waited = tracer.start_span(
            "dispatch",
            context=parent,
            attributes=attributes,
            start_time=now - int(max(0.0, lease.waited) * 1e9),
        )
        waited.end(now)
    # Of who made the message be executed, if Celery itself is instrumented.
    outer = trace.get_current_span().get_span_context()
    with tracer.start_as_current_span(
        f"run {run.plan}",
        context=parent,
        kind=trace.SpanKind.CONSUMER,
        attributes=attributes,
        links=[trace.Link(outer)] if outer.is_valid else [],
    ) as span:
        before = RUN.set(span)
        try:
            yield _traceparent()
        finally:
            RUN.reset(before)


@contextmanager
def _step_span(tracer: "trace.Tracer", step: str, attempt: int) -> Iterator[str | None]:
    with tracer.start_as_current_span(
        f"step {step}",
        attributes={"beatless.step": step, "beatless.attempt": attempt},
    ):
        yield _traceparent()


class PublishSpans:
    """The observer of a relay: a span for each append, from its writing to its publication."""

    def __init__(self) -> None:
        self._tracer = trace.get_tracer("beatless") if INSTALLED else None
        self._known: OrderedDict[bytes, context.Context] = OrderedDict()

    def __call__(self, signal: Signal) -> None:
        if not isinstance(signal, Drained) or self._tracer is None or not _recording():
            return
        now = time_ns()
        for row in signal.rows:
            if published.begins_run(row.body, row.run_id):
                self._learn(row.run_id, row.body)
            parent = self._known.get(row.run_id)
            if parent is not None:
                _record(self._tracer, row.body, parent, now)
                if published.ends_run(row.body):
                    del self._known[row.run_id]

    def _learn(self, run_id: bytes, body: bytes) -> None:
        found = published.traceparent(body)
        if found is None or not int(found[-2:], 16) & 1:
            return  # not traced, or not sampled
        self._known[run_id] = W3C.extract({"traceparent": found})
        if len(self._known) > MAX_TRACES:
            self._known.popitem(last=False)


def _record(tracer: "trace.Tracer", body: bytes, parent: "context.Context", now: int) -> None:
    written_at_ms, seq = published.written_at_ms(body), published.last_seq(body)
    if written_at_ms is None or seq is None:
        return
    begin = min(now, written_at_ms * 1_000_000)
    span = tracer.start_span(
        "publish",
        context=parent,
        kind=trace.SpanKind.PRODUCER,
        start_time=begin,
        attributes={"beatless.seq": seq, "beatless.events": body.count(b"\n") + 1},
    )
    span.end(now)


def _recording() -> bool:
    """Whether this process has a provider of spans."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def _traceparent() -> str | None:
    carrier: dict[str, str] = {}
    W3C.inject(carrier)
    return carrier.get("traceparent")


def _links(traceparent: str | None) -> "list[trace.Link]":
    if traceparent is None:
        return []
    span = trace.get_current_span(W3C.extract({"traceparent": traceparent}))
    return [trace.Link(span.get_span_context())] if span.get_span_context().is_valid else []
