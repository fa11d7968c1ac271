"""Sends a process's spans to an OpenTelemetry collector, if the environment names one.

The variables are OpenTelemetry's own: OTEL_EXPORTER_OTLP_ENDPOINT and the others that its SDK
reads. An app that has made a provider itself keeps it. Without a collector nothing waits and
nothing is repeated: spans are dropped, one warning is written.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from beatless.outbox.clock import monotonic

logger = logging.getLogger("beatless.export")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TIMEOUTS = ("OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")

EXPORT_TIMEOUT_S = 2.0
"""How long one export may take. The SDK's ten seconds would hold up a process that is to end."""

FAILURE_PAUSE_S = 30.0
"""How long nothing is exported after a failure."""

SILENCED = ("opentelemetry.exporter", "opentelemetry.sdk")
"""Their loggers report each failure; ours reports the first."""


def asked_for(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a collector."""
    off = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    none = environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    return not off and not none and any(environ.get(name) for name in ENDPOINTS)


def export(service: str, environ: Mapping[str, str]) -> Callable[[], None]:
    """Send this process's spans from now on; the function that sends the last ones.

    Call it after a fork, never before. Does nothing if it is not enabled, or if the process has a
    provider already.
    """
    if not asked_for(environ):
        return _nothing
    try:
        # Imported when they are asked for: the extra `otel` is not installed everywhere.
        trace = importlib.import_module("opentelemetry.trace")
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        processors = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        logger.warning(
            "traces are enabled and cannot be exported: pip install 'beatless[otel]'",
            extra={"action": "no_tracing", "reason": str(error)},
        )
        return _nothing
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return _nothing
    for name in SILENCED:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    named = any(environ.get(name) for name in TIMEOUTS)
    exporter = otlp.OTLPSpanExporter(timeout=None if named else EXPORT_TIMEOUT_S)
    results = processors.SpanExportResult
    defaults = {"service.name": environ.get("OTEL_SERVICE_NAME") or service}
    provider = sdk.TracerProvider(
        resource=resources.Resource.create(defaults), shutdown_on_exit=True
    )
    provider.add_span_processor(
        processors.BatchSpanProcessor(PausingExporter(exporter, results.SUCCESS, results.FAILURE))
    )
    trace.set_tracer_provider(provider)
    shutdown: Callable[[], None] = provider.shutdown
    return shutdown


def export_from_worker(service: str, environ: Mapping[str, str]) -> None:
    """`export` for a worker's process, which sends the last spans when Celery ends it."""
    finish = export(service, environ)
    if finish is not _nothing:
        from celery import signals  # in other processes spans need no Celery

        def ended(**_: Any) -> None:
            finish()

        signals.worker_process_shutdown.connect(ended, weak=False)


def _nothing() -> None:
    """Send the last spans where no collector is named: there are none."""


class PausingExporter:
    """An exporter that drops spans for `FAILURE_PAUSE_S` after a failure, and logs it once."""

    def __init__(self, exporter: Any, success: Any, failure: Any) -> None:
        self._exporter = exporter
        self._success = success
        self._failure = failure
        self._again_at = 0.0
        self._failing = False

    def export(self, spans: Sequence[Any]) -> Any:
        if monotonic() < self._again_at:
            return self._failure
        result = self._exporter.export(spans)
        if result == self._success:
            if self._failing:
                logger.info("traces are exported again", extra={"action": "tracing_again"})
            self._failing = False
            return result
        self._again_at = monotonic() + FAILURE_PAUSE_S
        if not self._failing:
            logger.warning(
                "traces cannot be exported and are dropped: no collector answers",
                extra={"action": "tracing_failed"},
            )
        self._failing = True
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, _timeout_millis: int = 30_000) -> bool:
        return True
