"""Hostile input by every way in: each is refused with its member named, and all others go on."""

import asyncio
import base64
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest

from beatless import App, BadRequest, Finish, Goto, Plan, RunState, StepContext, UnknownPlan, step
from beatless.cli.demo import without_handbacks
from beatless.client import RunRequest
from beatless.http import AsyncClient, Client
from beatless.orchestrator.errors import BadPayload, RunNotFound
from beatless.outbox.publishers import worker_queue
from beatless.testing import Kit
from tests.plans import TWO_STEPS, two_steps
from tests.serving import Api, serving
from tests.valkeys import until

APP = "tests.plans:app"


def nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


class Colour(Enum):
    RED = "red"


@dataclass
class Parcel:
    number: int


itself: list[Any] = []
itself.append(itself)

VALUES: dict[str, tuple[Any, str]] = {
    "ten megabytes": ("x" * 10_000_000, "store"),
    "NaN": ({"a": [math.nan]}, "a[0] is nan, which is not JSON: use None or a string"),
    "infinity": ({"a": -math.inf}, "a is -inf, which is not JSON: use None or a string"),
    "half a surrogate pair": ({"a": "\ud800"}, "a holds half of a surrogate pair"),
    "half a pair as a name": ({"\udfff": 1}, "has the key '\\udfff'"),
    "NUL": ({"a": "x\0"}, "a holds a NUL character"),
    "NUL in a name": ({"x\0": 1}, "has the key 'x\\x00'"),
    "lists 10,000 deep": (nested(10_000, lambda v: [v]), "nested deeper than 100 levels"),
    "objects 10,000 deep": (nested(10_000, lambda v: {"a": v}), "nested deeper than 100 levels"),
    "itself": (itself, "holds itself"),
    "a number of 5,000 digits": ({"a": 10**5000}, "a is a number of thousands of digits"),
    "bytes": ({"a": b"x"}, "a is a bytes, which is not JSON: use base64"),
    "a datetime": ({"a": [datetime.now(UTC)]}, "a[0] is a datetime, which is not JSON: use .iso"),
    "a Decimal": ({"a": Decimal("0.1")}, "a is a Decimal, which is not JSON: use str(…)"),
    "a UUID": ([UUID(int=7)], "[0] is a UUID, which is not JSON: use str(…)"),
    "an Enum": ({"a": Colour.RED}, "a is a Colour, which is not JSON: use .value"),
    "a dataclass": ({"a": Parcel(1)}, "a is a Parcel, which is not JSON: use dataclasses.asdict"),
}
"""Values that no journal can hold, and the words of the error."""

SQL = "'; DROP TABLE runs; --"
SSE = "x\r\nid: 9\r\nevent: RunFinished\r\ndata: {}\r\n\r\n"
MARKUP = '<script>alert(1)</script>\u2028\x1b[2J%(run_id)s{schema}%s:x"'
UNSTORABLE = {"NUL": "x\0", "half a surrogate pair": "x\ud800"}


@step
def returns(ctx: StepContext) -> Any:
    return VALUES[ctx.input][0]


@step
def traces(ctx: StepContext) -> None:
    ctx.trace("t", value=VALUES[ctx.input][0])


@step
def finishes(ctx: StepContext) -> Finish:
    return Finish(VALUES[ctx.input][0])


@step
def goes(ctx: StepContext) -> Goto:
    return Goto("ends", result=VALUES[ctx.input][0])


@step
def goes_astray(ctx: StepContext) -> Goto:
    return Goto(ctx.input)


@step
def ends(ctx: StepContext) -> str:
    return "ended"


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        *(Plan(each.name, [each]) for each in (returns, traces, finishes)),
        Plan("goes", [goes, ends], routes={"goes": ["ends"]}),
        Plan("goes_astray", [goes_astray, ends], routes={"goes_astray": ["ends"]}),
        Plan("good", [ends]),
        two_steps,
    ]


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as api:
        yield api


def assert_others_go_on(kit: Kit, api: Api) -> None:
    """The next run is taken from the API, executed, and shown; nothing else was stored."""
    run_id = api("POST", "/v1/runs", {"plan": "good"}).json["run_id"]
    kit.work_until_idle()
    assert api("GET", f"/v1/runs/{run_id}").json["result"] == "ended"
    kit.verify()


def test_a_hostile_input_is_refused_by_every_client(
    beatless: Kit, subtests: pytest.Subtests, api: Api
) -> None:
    near, far = beatless.client, Client(api.url)

    async def start_from_a_loop(value: Any) -> None:
        async with AsyncClient(api.url) as client:
            await client.start_run("good", value)

    ways: list[Callable[[Any], Any]] = [
        lambda value: near.start_run("good", value),
        lambda value: near.start_runs(
            [RunRequest(plan="good"), RunRequest(plan="good", input=value)]
        ),
        lambda value: beatless.start_run("good", value),
        lambda value: far.start_run("good", value),
        lambda value: asyncio.run(start_from_a_loop(value)),
    ]
    with far:
        for name, (value, words) in VALUES.items():
            with subtests.test(name):
                for start in ways:
                    with pytest.raises((BadPayload, BadRequest)) as refused:
                        start(value)
                    assert "input" in str(refused.value)
                    assert words in str(refused.value)
                    assert len(str(refused.value)) < 300
                assert beatless.client.list_runs() == []
    assert_others_go_on(beatless, api)


BODIES = {
    "ten megabytes": (b'"' + b"x" * 10_000_000 + b'"', 413, "store large input elsewhere"),
    "NaN": (b'{"a": NaN}', 422, "the run's input.a is nan"),
    "infinity": (b"[-Infinity]", 422, "the run's input[0] is -inf"),
    "more than a float": (b"1e999", 422, "the run's input is inf"),
    "half a surrogate pair": (rb'"\ud800"', 422, "half of a surrogate pair"),
    "a surrogate in UTF-8": (b'"\xed\xa0\x80"', 422, "half of a surrogate pair"),
    "NUL": (rb'"\u0000"', 422, "holds a NUL"),
    "lists 200 deep": (b"[" * 200 + b"]" * 200, 422, "nested deeper than 100 levels"),
    "lists 10,000 deep": (b"[" * 10_000 + b"]" * 10_000, 422, "the body is nested deeper"),
    "objects 10,000 deep": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 422, "the body is nested"),
    "lists without an end": (b"[" * 500_000, 422, "the body is nested deeper"),
    "a number of 5,000 digits": (
        b"1" * 5_000,
        422,
        "the body has an integer of more than 4300 digits",
    ),
}


def test_a_hostile_body_is_a_problem_that_tells_why(
    beatless: Kit, subtests: pytest.Subtests, api: Api
) -> None:
    for name, (value, status, words) in BODIES.items():
        with subtests.test(name):
            answer = api("POST", "/v1/runs", b'{"plan": "good", "input": %b}' % value)
            assert (answer.status, answer.json["status"]) == (status, status)
            assert words in answer.json["detail"]
            assert beatless.client.list_runs() == []
    assert_others_go_on(beatless, api)


@pytest.mark.parametrize("plan", ["returns", "traces", "finishes", "goes"])
def test_what_a_body_must_not_give_fails_its_own_run(
    beatless: Kit, subtests: pytest.Subtests, plan: str
) -> None:
    pairs = {name: (beatless.start_run(plan, name), beatless.start_run("good")) for name in VALUES}

    beatless.work_until_idle()

    for name, (run, other) in pairs.items():
        with subtests.test(name):
            failed = beatless.client.get_run(run.run_id)
            assert failed.state is RunState.FAILED
            assert failed.attempt == 1
            assert f"step {plan}: " in failed.error["message"]
            assert VALUES[name][1] in failed.error["message"]
            assert beatless.client.get_run(other.run_id).state is RunState.COMPLETED
    beatless.verify()


def test_a_step_that_goes_to_no_step_fails_its_own_run(beatless: Kit) -> None:
    targets = [SQL, SSE, MARKUP, "", "x" * 100_000]
    runs = [beatless.start_run("goes_astray", target) for target in targets]
    beatless.work_until_idle()
    for run in runs:
        failed = beatless.client.get_run(run.run_id)
        assert failed.state is RunState.FAILED
        assert "which plan goes_astray does not declare" in failed.error["message"]
    beatless.verify()


OPTIONS: dict[str, Callable[[str], dict[str, Any]]] = {
    "run_id": lambda text: {"run_id": text},
    "queue": lambda text: {"queue": text},
    "key": lambda text: {"key": text},
    "tags": lambda text: {"tags": {"a": text}},
    "tags by name": lambda text: {"tags": {text: "a"}},
}


def test_a_hostile_option_is_refused_by_every_client(
    beatless: Kit, subtests: pytest.Subtests, api: Api
) -> None:
    texts = UNSTORABLE | {"two megabytes": "x" * 2_000_000}
    with Client(api.url) as far:
        for option, name in itertools.product(OPTIONS, texts):
            with subtests.test(option, text=name):
                given = OPTIONS[option](texts[name])
                member = option.split(maxsplit=1)[0]
                for client in (beatless.client, beatless, far):
                    with pytest.raises((BadPayload, BadRequest)) as refused:
                        client.start_run("good", **given)
                    told = str(refused.value)
                    assert member in told or "a request may have" in told  # too long to look at
                    assert len(told) < 400
                assert beatless.client.list_runs() == []
    assert_others_go_on(beatless, api)


def test_a_name_with_control_characters_of_others_is_refused(
    beatless: Kit, subtests: pytest.Subtests, api: Api
) -> None:
    texts = [SQL, SSE, MARKUP, "", "..", "a/b", "x" * 129]
    with Client(api.url) as far:
        for text, client in itertools.product(texts, (beatless.client, far)):
            with subtests.test(text=text):
                with pytest.raises(BadRequest, match="run_id is"):
                    client.start_run("good", run_id=text)
                with pytest.raises(UnknownPlan, match="no plan is called"):
                    client.start_run(f"{text}x")
                with pytest.raises((RunNotFound, BadRequest), match=r"no run has id|name is"):
                    client.get_run(text)
                if text != "..":  # a queue may be called like that
                    with pytest.raises(BadRequest, match=r"queue is|name is"):
                        client.pause_queue(text)
                assert beatless.client.list_runs() == []
    assert_others_go_on(beatless, api)


@pytest.mark.parametrize("text", [SQL, SSE, MARKUP])
def test_text_that_is_only_odd_is_stored_as_it_is_and_breaks_no_stream(
    beatless: Kit, api: Api, text: str
) -> None:
    with Client(api.url) as far:
        run = far.start_run("good", {text: text}, key=text[:256], tags={text: text})
        cancelled = far.start_run("good", queue="other")
        far.cancel_run(cancelled.run_id, reason=text)
        beatless.work_until_idle()
        found = far.list_runs(tags={text: text})
        events = list(far.stream_run(cancelled.run_id, timeout=60))
    assert [each.run_id for each in found] == [run.run_id]
    assert (found[0].input, found[0].key) == ({text: text}, text[:256])
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert text in beatless.client.get_run(cancelled.run_id).error["message"]
    beatless.verify()


@pytest.mark.parametrize("text", UNSTORABLE.values(), ids=UNSTORABLE)
def test_a_question_that_no_stored_text_can_answer_is_refused(
    beatless: Kit, api: Api, text: str
) -> None:
    run = beatless.start_run("good", queue="other")
    with Client(api.url) as far:
        for client in (beatless.client, far):
            questions: dict[str, Callable[[], Any]] = {
                "run_id|name": lambda client=client: client.get_run(text),
                "(run_id|name) ": lambda client=client: list(client.stream_run(text, timeout=60)),
                "queue": lambda client=client: client.list_runs(queue=text),
                "step": lambda client=client: client.list_runs(step=text),
                "tag": lambda client=client: client.failed_runs(tags={"a": text}),
                "error": lambda client=client: client.failed_runs(error=text),
                "from_step": lambda client=client: client.retry_run(run.run_id, text),
                "reason": lambda client=client: client.cancel_run(run.run_id, reason=text),
                "reason ": lambda client=client: client.requeue_dead_letters(reason=text),
            }
            for member, ask in questions.items():
                with pytest.raises((BadRequest, BadPayload), match=member):
                    ask()
    assert beatless.client.get_run(run.run_id).cancel_requested_at is None
    assert_others_go_on(beatless, api)


def test_a_trace_that_is_none_is_ignored_and_the_run_is_started(beatless: Kit, api: Api) -> None:
    """As W3C Trace Context asks for."""
    texts = [*UNSTORABLE.values(), SSE, "x" * 100_000, "é"]
    with Client(api.url) as far:
        for text, client in itertools.product(texts, (beatless.client, far)):
            run = client.start_run("good", traceparent=text)
            stored = client.events(run.run_id)[0].data.get("traceparent")
            # One of its own, where a test before this one has switched tracing on.
            assert stored is None or re.fullmatch(
                r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", stored
            )
    beatless.work_until_idle()
    beatless.verify()


def test_a_name_that_fits_into_no_url_is_refused_before_it_is_sent(api: Api) -> None:
    endless = "x" * 10_000_000
    with Client(api.url) as far:
        for ask in (
            lambda: far.get_run(endless),
            lambda: list(far.stream_run(endless, timeout=60)),
            lambda: far.pause_queue(endless),
            lambda: far.list_runs(queue=endless),
        ):
            with pytest.raises(BadRequest, match=r"cannot be a part of a URL|too long for a URL"):
                ask()


def envelope(body: bytes, **properties: Any) -> bytes:
    """A message as kombu's Redis transport stores it."""
    message = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": "two_steps", "id": "x", "lang": "py"},
        "properties": {
            "delivery_tag": "t",
            "delivery_info": {"exchange": "", "routing_key": "x"},
            "body_encoding": "base64",
        },
    }
    return json.dumps(message | properties).encode()


ARGUMENTS = b'[["nobody", 1], {}, {}]'
HEADERS = {"task": "two_steps", "id": "x", "lang": "py"}
MESSAGES = [
    b"",
    b"\xff\xfe",
    b"{",
    b"[]",
    b"null",
    b"[" * 10_000 + b"]" * 10_000,
    b'{"body": 1}',
    envelope(b"{"),
    envelope(b"[]"),
    envelope(b"[" * 10_000 + b"]" * 10_000),
    envelope(b'[["x", NaN], {}, {}]'),
    envelope(b'[[{"a": 1}, "1"], {"b": 2}, {}]'),
    envelope(b'[["\\u0000", 1], {}, {}]'),
    envelope(b'[["\\ud800", 1], {}, {}]'),
    envelope(b'[["x", 1], {}, {"chain": [1], "errbacks": 5}]'),
    envelope(b'[["' + b"x" * 10_000_000 + b'", 1], {}, {}]'),
    envelope(ARGUMENTS, headers=None),
    envelope(ARGUMENTS, headers=[]),
    envelope(ARGUMENTS, headers={"task": ["two_steps"], "id": {}}),
    envelope(ARGUMENTS, headers=HEADERS | {"task": SQL}),
    envelope(ARGUMENTS, headers=HEADERS | {"id": SSE}),
    envelope(ARGUMENTS, headers=HEADERS | {"eta": "soon"}),
    envelope(ARGUMENTS, headers=HEADERS | {"expires": [1]}),
    envelope(ARGUMENTS, headers=HEADERS | {"timelimit": ["a", {}]}),
    envelope(ARGUMENTS, headers=HEADERS | {"retries": "many", "argsrepr": "\0" * 100_000}),
    envelope(ARGUMENTS, **{"content-type": "application/x-python-serialize"}),
    envelope(ARGUMENTS, **{"content-encoding": "nonsense"}),
    envelope(ARGUMENTS, properties={}),
    envelope(ARGUMENTS, properties={"delivery_tag": None, "delivery_info": 5}),
]


@pytest.mark.long
def test_a_worker_goes_on_whatever_lies_in_its_queue(beatless: Kit, beatless_app: App) -> None:
    """As many as there are kinds, each between two runs that must be executed."""
    queue = worker_queue(beatless_app.settings.prefix, "default").name
    worker = beatless.worker_process(APP)
    relay = beatless.relay_process(APP)
    run_ids = []
    with beatless_app.celery.connection_for_write() as broker:
        raw = broker.default_channel.client
        for message in MESSAGES:
            run_ids.append(beatless.start_run("two_steps").run_id)
            raw.lpush(queue, message)
        run_ids.append(beatless.start_run("two_steps").run_id)
        for run_id in run_ids:
            run = beatless.wait_for_run_completion(run_id, timeout=60)
            assert run.state is RunState.COMPLETED
            events = without_handbacks(beatless.client.events(run_id))
            assert [event.type for event in events] == TWO_STEPS
        until(lambda: raw.llen(queue) == 0)  # nor what was sent again meanwhile
    assert worker.alive
    assert relay.alive
    beatless.verify()
