"""One trace from the start of a run to its last event, with and without OpenTelemetry."""

import asyncio
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from beatless import App, Fatal, Plan, StepContext, step
from beatless.api import create_api
from beatless.client import RunRequest
from beatless.observe.export import FAILURE_PAUSE_S, asked_for
from beatless.testing import Kit
from tests.integration.test_groups import Together, be_patient

APP = "tests.plans:app"
TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


class Spans:
    """What was recorded in this process since the test began."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture(scope="module")
def exporter() -> Iterator[InMemorySpanExporter]:
    """OpenTelemetry takes one provider for the whole process, once.

    It is taken away again: the tests behind these, whichever they are, would be traced too, and
    those that count bytes and calls would count more.
    """
    found = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(found))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opentelemetry.trace._TRACER_PROVIDER", provider)
        yield found


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[Spans]:
    exporter.clear()
    yield Spans(exporter)
    exporter.clear()


def trace_of(span: ReadableSpan) -> str:
    return f"{span.context.trace_id:032x}"


def parent_of(span: ReadableSpan) -> str:
    return f"{span.parent.span_id:016x}" if span.parent else ""


def id_of(span: ReadableSpan) -> str:
    return f"{span.context.span_id:016x}"


def test_one_trace_from_the_start_to_the_last_event(spans: Spans, beatless: Kit) -> None:
    with trace.get_tracer("caller").start_as_current_span("request") as request:
        run = beatless.start_run("two_steps")
    beatless.work_until_idle()

    start = spans.one("start two_steps")
    claim = spans.one("run two_steps")
    steps = [spans.one("step first"), spans.one("step second")]
    published = spans.named("publish")
    everything = [start, claim, spans.one("dispatch"), *steps, *published]
    assert {trace_of(span) for span in everything} == {
        f"{request.get_span_context().trace_id:032x}"
    }
    assert parent_of(start) == f"{request.get_span_context().span_id:016x}"
    assert {parent_of(span) for span in (claim, spans.one("dispatch"), *published)} == {
        id_of(start)
    }
    assert {parent_of(span) for span in steps} == {id_of(claim)}
    assert claim.attributes["beatless.run_id"] == run.run_id
    assert claim.attributes["beatless.state"] == "completed"
    told = [(event.name, event.attributes["beatless.seq"]) for s in steps for event in s.events]
    stored = [(event.type, event.seq) for event in beatless.client.events(run.run_id)]
    assert told == stored[2:]
    assert sum(span.attributes["beatless.events"] for span in published) == len(stored)


def test_every_attempt_is_in_the_same_trace_and_a_failure_is_one(
    spans: Spans, beatless: Kit
) -> None:
    beatless.start_run("retries", {"failures": 1})
    beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    attempts = spans.named("step flaky")
    assert [span.attributes["beatless.attempt"] for span in attempts] == [1, 2]
    assert [span.status.is_ok for span in attempts] == [False, True]
    assert attempts[0].status.description == "ValueError: attempt 1 fails"
    claims = spans.named("run retries")
    assert [span.attributes["beatless.claim"] for span in claims] == [1, 2]
    assert len({trace_of(span) for span in (*attempts, *claims)}) == 1


SECRET = "4111-1111"


@step
def refuse(ctx: StepContext) -> None:
    raise Fatal(f"no such card: {ctx.input['card']}")


def hide(what: str, value: Any) -> Any:
    return json.loads(json.dumps(value).replace(SECRET, f"hidden {what}"))


def test_spans_tell_of_an_error_what_redact_lets_through(
    spans: Spans, beatless_app: App, tmp_path: Path
) -> None:
    app = App(beatless_app.settings, [Plan("refuses", [refuse])], redact=hide)
    with closing(Kit(app, directory=tmp_path)) as kit:
        kit.start_run("refuses", {"card": SECRET})
        kit.work_until_idle()

    failed = spans.one("step refuse")
    assert failed.status.description == "Fatal: no such card: hidden error"
    assert SECRET not in "".join(span.to_json() for span in spans.all())


def test_a_retried_run_links_to_the_run_that_failed(spans: Spans, beatless: Kit) -> None:
    failed = beatless.start_run("fatally")
    beatless.work_until_idle()

    beatless.client.retry_run(failed.run_id)

    first, second = spans.named("start fatally")
    (link,) = second.links
    assert link.context.span_id == first.context.span_id
    assert spans.one("run fatally").status.status_code is trace.StatusCode.ERROR


def test_the_users_own_spans_are_children_of_their_step(spans: Spans, beatless: Kit) -> None:
    run = beatless.start_run("tells_its_trace")
    beatless.work_until_idle()

    attempt = spans.one("step tell_trace")
    result = beatless.client.get_run(run.run_id).result
    assert result["current"] == f"{trace_of(attempt)}/{id_of(attempt)}"
    assert result["traceparent"].startswith(f"00-{trace_of(attempt)}-{id_of(attempt)}-")


def test_many_runs_of_one_call_are_side_by_side(spans: Spans, beatless: Kit) -> None:
    beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(3)])

    started = spans.named("start two_steps")
    assert len({id_of(span) for span in started}) == 3
    assert {span.parent for span in started} == {None}


def test_steps_of_a_group_are_in_the_traces_of_their_own_runs(
    spans: Spans, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies of several runs alternate in one thread."""
    be_patient(monkeypatch)
    together = Together(beatless)
    ids = [beatless.start_run("two_steps").run_id for _ in range(3)]
    assert together.deliver(ids[0])
    together.executor.disconnect()
    claims = {span.attributes["beatless.run_id"]: span for span in spans.named("run two_steps")}
    assert sorted(claims) == sorted(ids)
    assert len({trace_of(claim) for claim in claims.values()}) == 3
    for name in ("step first", "step second"):
        assert sorted(parent_of(span) for span in spans.named(name)) == sorted(
            id_of(claim) for claim in claims.values()
        )


def test_a_start_joins_the_trace_that_it_is_given(spans: Spans, beatless: Kit) -> None:
    with trace.get_tracer("caller").start_as_current_span("request") as request:
        beatless.start_run("two_steps", traceparent=TRACEPARENT)
        beatless.start_run("two_steps", traceparent="nonsense")

    joined, current = spans.named("start two_steps")
    assert (trace_of(joined), parent_of(joined)) == ("ab" * 16, "cd" * 8)
    assert parent_of(current) == f"{request.get_span_context().span_id:016x}"


def test_the_api_joins_the_callers_trace(spans: Spans, beatless: Kit, beatless_app: App) -> None:
    async def post() -> list[httpx2.Response]:
        door = httpx2.ASGITransport(create_api(beatless_app))
        async with httpx2.AsyncClient(transport=door, base_url="http://127.0.0.1") as api:
            return [
                await api.post(
                    "/v1/runs", json={"plan": "two_steps"}, headers={"traceparent": header}
                )
                for header in (TRACEPARENT, "nonsense")
            ]

    answers = asyncio.run(post())
    assert [answer.status_code for answer in answers] == [201, 201]
    (event,) = beatless.client.events(answers[1].json()["run_id"])

    joined, alone = spans.named("start two_steps")
    assert trace_of(joined) == "ab" * 16
    assert trace_of(alone) != "ab" * 16
    assert event.data["traceparent"].startswith(f"00-{trace_of(alone)}-{id_of(alone)}-")


# Whole processes


class Collector:
    """An OTLP receiver: the smallest that an exporter talks to."""

    def __init__(self) -> None:
        collector = self
        self.spans: list[tuple[str, str, Any]] = []
        self.came = threading.Condition()

        class Door(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
                collector.take(ExportTraceServiceRequest.FromString(body))

            def log_message(self, *_: Any) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Door)
        self.thread = threading.Thread(target=self.server.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self.came:
            for resource in request.resource_spans:
                names = {a.key: a.value.string_value for a in resource.resource.attributes}
                self.spans += [
                    (names["service.name"], span.name, span)
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
            self.came.notify_all()

    def wait_for(self, *names: str) -> list[tuple[str, str, Any]]:
        with self.came:
            assert self.came.wait_for(
                lambda: set(names) <= {name for _, name, _ in self.spans}, timeout=60
            ), [name for _, name, _ in self.spans]
            return list(self.spans)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    found.thread.start()
    yield found
    found.server.shutdown()
    found.thread.join()
    found.server.server_close()


@pytest.mark.slow
def test_a_fleet_exports_one_trace(
    beatless: Kit, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    beatless.relay_process(APP)
    beatless.worker_process(APP)

    run = beatless.start_run("two_steps", traceparent=TRACEPARENT)
    beatless.wait_for_run_completion(run.run_id)

    came = collector.wait_for("publish", "dispatch", "run two_steps", "step first", "step second")
    assert {span.trace_id.hex() for _, _, span in came} == {"ab" * 16}
    assert {service for service, name, _ in came if name == "publish"} == {"beatless-relay"}
    assert {service for service, name, _ in came if name == "run two_steps"} == {"beatless-worker"}


@pytest.mark.slow
def test_without_a_collector_nothing_waits_and_one_line_tells(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    relay = beatless.relay_process(APP)
    worker = beatless.worker_process(APP)

    for _ in range(10):
        run = beatless.start_run("two_steps", traceparent=TRACEPARENT)
        beatless.wait_for_run_completion(run.run_id)
    beatless.wait_for_outbox_flush(run.run_id)
    for child in (relay, worker):
        child.terminate()
        child.reap(float("inf"))

    for child in (relay, worker):
        text = child.log.read_text()
        assert text.count("traces cannot be exported") == 1, text
        assert "opentelemetry" not in text
        assert "Traceback" not in text
    assert FAILURE_PAUSE_S > 10


@pytest.mark.slow
def test_without_the_packages_a_trace_is_passed_on(beatless: Kit) -> None:
    """In a process that cannot import them: the start, the run and its step."""
    code = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
from beatless.testing import Kit
from tests.plans import app

kit = Kit(app)
run = kit.start_run("tells_its_trace", run_id="untraced", traceparent=sys.argv[1])
kit.work_until_idle()
assert app.client.get_run("untraced").result == {"current": None, "traceparent": sys.argv[1]}
other = kit.start_run("tells_its_trace", run_id="other", traceparent="nonsense")
kit.work_until_idle()
assert app.client.get_run("other").result == {"current": None, "traceparent": None}
assert "opentelemetry" not in sys.modules
kit.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, TRACEPARENT],
        env=os.environ | beatless.app.settings.to_env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environ", "asked"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_the_environment_asks_for_traces(environ: dict[str, str], asked: bool) -> None:
    assert asked_for(environ) is asked
