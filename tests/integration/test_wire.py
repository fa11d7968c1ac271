"""A value takes the same shape on every way: returned, resumed, read, streamed."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from beatless import Plan, StepContext, step
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
