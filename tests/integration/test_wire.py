"""A value takes the same shape on every way: returned, resumed, read, streamed."""

import itertools
import json
from dataclasses import fields
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from beatless import Plan, StepContext, step
from beatless.orchestrator.events import Event, EventType
from beatless.outbox.statements import fragment
from beatless.streams.messages import parse
from beatless.testing import Kit

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


@step
def echo(ctx: StepContext) -> Any:
    value = json.loads(ctx.input["text"])
    ctx.trace("echo", value=value)
    return value


@step
def seen(ctx: StepContext) -> str:
    return json.dumps(ctx.results["echo"], sort_keys=True)


def as_jsonb(value: Any) -> Any:
    """jsonb has numbers, not floats: it writes 1e+16 as 10000000000000000."""

    def number(text: str) -> float | int:
        return int(Decimal(text)) if "e+" in text else float(text) + 0.0  # and has no -0.0

    return json.loads(json.dumps(value), parse_float=number)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("echo", [echo, seen])]


@pytest.mark.slow
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values)
@example([1e16, 1e23, -1.5e300, 1e-300, -0.0, 0.1, 10**30])
@example({"\"'\\/\b\f\n\r\t\x7f\u2028": "\\u0000 \U0001f642 %s %(a)s {} E'\\n'"})
def test_what_is_published_read_and_resumed_is_what_was_stored(beatless: Kit, value: Any) -> None:
    client = beatless.app.redis()
    channel = client.pubsub()
    # As text too, which Postgres does not touch: so the step has what no database has seen.
    given = {"text": json.dumps(value), "value": value}
    runs = [beatless.start_run("echo", given), beatless.start_run("echo", given)]
    channel.subscribe(*(beatless.app.streams.channel(run.run_id) for run in runs))

    beatless.step(runs[0].run_id)  # and the other one is executed without a break
    beatless.work_until_idle()

    heard: dict[str, list[Any]] = {run.run_id: [] for run in runs}
    while sum(map(len, heard.values())) < 14:
        message = channel.get_message(timeout=60)
        for text in parse(message["data"]) if message["type"] == "message" else []:
            assert len(text.text.decode().splitlines()) == 1
            event = text.event()
            heard[event.run_id].append(event)
    channel.close()
    client.close()
    for run in runs:
        stored = beatless.client.events(run.run_id)
        assert heard[run.run_id] == stored
        assert beatless.client.get_run(run.run_id).input["value"] == as_jsonb(value)
        assert stored[2].data["value"] == as_jsonb(value)
        assert stored[3].data["result"] == as_jsonb(value)
    resumed, unbroken = (json.loads(beatless.client.get_run(run.run_id).result) for run in runs)
    assert resumed == unbroken == as_jsonb(value)


ODD_TEXTS = ["", '"\\/{}%s%%', "a\nb\t\x7f", "\u2028\u0085 ü \U0001f642", "Act#12"]
ODD_DATA = [{}, {"result": None}, {"": [1, -0.5, True, {"a": "\u2028"}]}, {"n": 10**30}]


@pytest.mark.parametrize("step", [None, *ODD_TEXTS])
def test_an_event_has_one_form_whether_postgres_or_python_writes_it(
    beatless: Kit, postgres: psycopg.Connection, step: str | None
) -> None:
    run_id = beatless.start_run("echo", {"text": "1"}, run_id="odd:.-_id").run_id
    written = [
        Event(
            run_id=run_id,
            seq=seq,
            ts=1_700_000_000_000 + seq,
            type=type,
            source=source,
            step=step,
            attempt=attempt,
            data=data,
            v=seq,
        )
        for seq, (type, source, attempt, data) in enumerate(
            itertools.product(
                EventType,
                ["api", "worker", "relay"],
                [None, 1, 2**31 - 1],
                [None, *ODD_DATA],
            ),
            start=2,
        )
    ]
    postgres.cursor().executemany(
        "INSERT INTO run_events (run_id, seq, ts, type, source, step, attempt, data, v)"
        " VALUES (%s, %s, to_timestamp(%s / 1000.0), %s, %s, %s, %s, %s, %s)",
        [
            [
                *(run_id, event.seq, event.ts, event.type.value, event.source, step),
                event.attempt,
                None if event.data is None else json.dumps(event.data),
                event.v,
            ]
            for event in written
        ],
    )
    built = fragment("event_json", beatless.app.settings.schema)
    query = f"SELECT {built} FROM run_events e WHERE seq > 1 ORDER BY seq"
    texts = [text for (text,) in postgres.execute(query.encode()).fetchall()]

    assert [Event.from_json(text) for text in texts] == written
    for text, event in zip(texts, written, strict=True):
        members = event.to_dict()
        assert json.loads(text) == members
        assert list(json.loads(text)) == list(members)
    assert {name for event in written for name in event.to_dict()} >= {
        each.name for each in fields(Event) if each.name != "step" or step is not None
    }
