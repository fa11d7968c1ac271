"""The schemas of answers in the OpenAPI document: those of real runs conform to them."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from beatless import Plan, RunContext, Snooze, StepContext, Undone, plan, retry, sleep, step, wait
from beatless.api import create_api
from beatless.orchestrator.events import EventType
from beatless.testing import Kit
from tests.serving import Api, serving


@step(retry=retry(max_attempts=2))
def flaky(ctx: StepContext) -> int | Snooze:
    ctx.progress(50, note="half")
    ctx.emit("half")
    ctx.emit({"of": ["it"]})
    if ctx.attempt == 1:
        raise ValueError("the first attempt fails")
    return 1


@step
def broken(ctx: StepContext) -> None:
    raise ValueError("it fails for good")


@step
def undo(ctx: StepContext) -> None: ...


@step
def counted(ctx: StepContext) -> int:
    return int(ctx.input)


@step
def reverse(ctx: StepContext, undone: Undone) -> None: ...


@step(undo=reverse)
def reversible(ctx: StepContext) -> None: ...


one = Plan("one", [counted])


@plan("parent")
def parent(run: RunContext[Any]) -> list[int]:
    return [run.child(one, 1).result(), *run.map(one, [2, 3], at_once=1, failure="collect")]


@plan("generations")
def generations(run: RunContext) -> Any:
    return 2 if run.input == 2 else run.again(2)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        generations,
        one,
        parent,
        Plan("waits", [flaky, wait("paid", "refused"), sleep(hours=1)]),
        Plan("fails", [broken]),
        Plan("undone", [reversible, broken]),
        Plan("cancelled", [flaky, wait("never")], on_cancel=undo),
    ]


def checker(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"})


def ended(beatless: Kit, api: Api, plan: str) -> str:
    asked = {"plan": plan, "dedupe_key": plan, "debounce": 5}
    run_id = str(api("POST", "/v1/runs", asked).json["run_id"])
    assert api("POST", "/v1/runs", asked).json["start"] == "input_replaced"
    beatless.advance(5)
    beatless.work_until_idle()
    for _ in range(2):
        beatless.advance(3600)
        beatless.work_until_idle()
    if plan == "waits":
        api("POST", f"/v1/runs/{run_id}/signals", {"name": "paid", "data": 12})
    elif plan == "cancelled":
        api("POST", f"/v1/runs/{run_id}/cancel", {"reason": "sold out"})
    beatless.work_until_idle()
    beatless.advance(3600)
    beatless.work_until_idle()
    return run_id


@pytest.mark.slow
def test_every_type_of_event_and_each_run_is_as_the_document_says(beatless: Kit) -> None:
    seen: set[str] = set()
    with serving(beatless.app) as api:
        document = api("GET", "/openapi.json").json
        run_of, event_of = checker(document, "Run"), checker(document, "Event")
        outcomes = {"waits": "completed", "fails": "failed", "cancelled": "cancelled"}
        outcomes |= {"undone": "failed", "generations": "completed", "parent": "completed"}
        for name, outcome in outcomes.items():
            run_id = ended(beatless, api, name)
            run = api("GET", f"/v1/runs/{run_id}").json
            run_of.validate(run)
            assert run["state"] == outcome
            for event in api("GET", f"/v1/runs/{run_id}/events").json["events"]:
                event_of.validate(event)
                seen.add(event["type"])
                # Of another type, or without what its type has, it is refused.
                assert not event_of.is_valid(event | {"type": "Invented"})
                assert not event_of.is_valid(event | {"type": "StepFailed", "data": {}})
                assert not event_of.is_valid(event | {"seq": 0})
    assert seen == set(EventType)


def test_no_answer_names_a_schema_that_the_document_lacks(beatless: Kit) -> None:
    document = create_api(beatless.app).openapi()
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    named = {part.split('"')[0] for part in json.dumps(document).split('"$ref": "')[1:]}
    assert {"#/components/schemas/Run", "#/components/schemas/Event"} <= named <= known
    token = document["paths"]["/v1/runs/{run_id}/stream-token"]["post"]["responses"]["201"]
    schema = token["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/StreamToken"}


def parts(document: Any) -> Iterator[dict[str, Any]]:
    """All objects within a document."""
    if isinstance(document, dict):
        yield document
    for each in document.values() if isinstance(document, dict) else document:
        if isinstance(each, dict | list):
            yield from parts(each)


def test_linters_have_nothing_to_say_of_the_document(beatless: Kit) -> None:
    """What `spectral:oas` of Spectral 6 asks for, and was not there."""
    document = create_api(beatless.app).openapi()
    operations = [each for path in document["paths"].values() for each in path.values()]
    tags = {tag["name"] for tag in document["tags"] if tag["description"]}
    assert {name for each in operations for name in each["tags"]} == tags
    assert len({each["operationId"] for each in operations}) == len(operations) > 40
    arrays = [part for part in parts(document) if part.get("type") == "array"]
    assert arrays
    assert all("items" in each for each in arrays)
    assert document["info"]["contact"]
