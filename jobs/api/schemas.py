"""The JSON Schemas of answers, for the OpenAPI document; no answer is checked by them.

An object may get members in a later version; a client must ignore those that it does not know.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from beatless.client.requests import OPTIONS
from beatless.orchestrator.events import EventType
from beatless.orchestrator.records import Run, SentDecision, SentSignal

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
SEQ: Schema = {"type": "integer", "minimum": 1}
MILLISECONDS: Schema = {"type": "integer", "description": "since 1970, by the clock of Postgres"}
ANY: Schema = {}


def json_object(
    members: Mapping[str, Schema], *, optional: Mapping[str, Schema] | None = None
) -> Schema:
    """An object with these members; the optional ones are left out where they do not apply."""
    properties = {**members, **(optional or {})}
    return {"type": "object", "required": list(members), "properties": properties}


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def ref(name: str) -> Schema:
    """A schema of `components`."""
    return {"$ref": f"#/components/schemas/{name}"}


def answers(schema: Schema, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The documentation of a JSON answer with these statuses."""
    return {status: {"content": {"application/json": {"schema": schema}}} for status in statuses}


def _of_dataclass(kind: type) -> Schema:
    """The members of a dataclass as its `to_dict` gives them: none is left out."""
    hints = get_type_hints(kind)
    members: dict[str, Schema] = {}
    for each in fields(kind):
        members[each.name] = TypeAdapter(hints[each.name]).json_schema(ref_template="{model}")
        members[each.name].pop("title", None)
        if option := OPTIONS.get(each.name):
            members[each.name]["description"] = option.help
    return json_object(members)


ERROR = json_object(
    {"type": STRING, "message": STRING},
    optional={"step": STRING, "traceback": STRING, "on_cancel": ANY, "undo": list_of(ANY)},
)

EVENT_DATA: dict[EventType, Schema] = {
    EventType.RUN_STARTED: json_object(
        {"plan": STRING, "version": STRING, "queue": STRING},
        optional={
            "retry_of": STRING,
            "reused": ANY,
            "not_before": ANY,
            "traceparent": STRING,
        },
    ),
    EventType.STEP_STARTED: json_object({}, optional={"undo": STRING, "given": ANY}),
    EventType.UNDO_STARTED: json_object(
        {"error": ref("Error")},
        optional={
            "deadline_at": {
                "type": "integer",
                "description": "milliseconds since 1970: the deadline that the run had",
            }
        },
    ),
    EventType.INPUT_REPLACED: json_object({"not_before": MILLISECONDS}),
    EventType.STEP_FINISHED: json_object(
        {"result": ANY},
        optional={"next": {"type": ["string", "null"], "description": "the step; null: the end"}},
    ),
    EventType.STEP_FAILED: json_object(
        {"error": ref("Error")},
        optional={
            "retry_at": {
                "type": ["integer", "null"],
                "description": "milliseconds since 1970; null: there is no other attempt",
            },
            "final": {
                "type": "boolean",
                "description": "there is no other attempt, although the run goes on",
            },
        },
    ),
    EventType.DEBUG_TRACE: json_object({"name": STRING}),
    EventType.STEP_OUTPUT: json_object({"first": {"type": "integer"}, "pieces": list_of(ANY)}),
    EventType.CANCEL_REQUESTED: json_object({}, optional={"reason": STRING, "on_cancel": STRING}),
    EventType.WAIT_STARTED: json_object(
        {"kind": one_of("signal", "sleep", "approval")},
        optional={
            "names": list_of(STRING),
            "seconds": NUMBER,
            "until": MILLISECONDS,
            "title": STRING,
            "form": {"type": "string", "description": "the type of the decision"},
            "schema": {"type": "object", "description": "the JSON Schema of the decision"},
        },
    ),
    EventType.SIGNAL_RECEIVED: json_object(
        {"name": STRING, "data": ANY, "key": STRING},
        optional={
            "decision": json_object(
                {"wait": STRING, "by": STRING, "at": MILLISECONDS}, optional={"link": STRING}
            )
        },
    ),
    EventType.WAIT_FINISHED: json_object(
        {"outcome": one_of("received", "timed_out", "slept")},
        optional={
            "kind": one_of("signal", "sleep", "approval"),
            "by": STRING,
            "name": STRING,
            "seq": SEQ,
            "next": ANY,
            "following": ANY,
        },
    ),
    EventType.CHILDREN_STARTED: json_object(
        {"plan": STRING, "first": SEQ, "count": {"type": "integer"}},
        optional={
            "run_id": STRING,
            "at_once": SEQ,
            "failure": one_of("fail", "collect"),
            "detached": {"type": "boolean"},
            "arguments": STRING,
            "version": SEQ,
        },
    ),
    EventType.CHILDREN_FINISHED: json_object(
        {"plan": STRING, "first": SEQ, "count": {"type": "integer"}},
        optional={
            "error": ref("Error"),
            "failed": SEQ,
            "rivals": list_of(SEQ),
            "won": SEQ,
            "arguments": STRING,
            "result": ANY,
            "next": STRING,
            "following": STRING,
        },
    ),
    EventType.RUN_RESTARTED: json_object(
        {"input": ANY, "generation": SEQ},
        optional={
            "visits": {"type": "object"},
            "signals_from": {"type": "integer"},
            "children": {"type": "integer"},
        },
    ),
    EventType.RUN_FINISHED: json_object(
        {"outcome": one_of("completed", "failed", "cancelled")},
        optional={"result": ANY, "error": ref("Error")},
    ),
}
"""The member `data` of each type of event."""


def _event(kind: EventType, data: Schema) -> Schema:
    """An event of one type. One of which no data is required may be without it."""
    always = {"data": data} if data["required"] else {}
    return json_object(
        {
            "run_id": STRING,
            "seq": SEQ,
            "ts": MILLISECONDS,
            "type": {"type": "string", "const": kind.value},
            "source": one_of("api", "worker", "relay"),
            **always,
        },
        optional={"v": {"type": "integer"}, "step": STRING, "attempt": SEQ, "data": data},
    )


EVENT: Schema = {
    "description": "A committed fact of a run. `seq` is 1, 2, 3 … without a gap.",
    "oneOf": [ref(kind.value) for kind in EventType],
    "discriminator": {
        "propertyName": "type",
        "mapping": {kind.value: ref(kind.value)["$ref"] for kind in EventType},
    },
}

COMPONENTS: dict[str, Schema] = {
    "Run": {"description": "A run, as it is stored now."} | _of_dataclass(Run),
    "SentSignal": _of_dataclass(SentSignal),
    "SentDecision": _of_dataclass(SentDecision),
    "ApprovalLink": json_object(
        {
            "id": {"type": "string", "description": "by which it is revoked"},
            "run_id": STRING,
            "occurrence": STRING,
            "by": STRING,
            "expires_at": {"type": "string", "format": "date-time"},
            "token": STRING,
            "url": STRING,
        }
    ),
    "StreamToken": json_object(
        {"token": STRING, "seconds": {"type": "number", "description": "until it ends"}}
    ),
    "Error": ERROR,
    "Event": EVENT,
} | {kind.value: _event(kind, data) for kind, data in EVENT_DATA.items()}
"""The schemas that those of answers name."""

RUN = ref("Run")
SIGNAL = ref("SentSignal")
DECISION = ref("SentDecision")
APPROVAL_LINK = ref("ApprovalLink")
STREAM_TOKEN = ref("StreamToken")
RUNS = json_object({"runs": list_of(RUN), "next": {"type": ["string", "null"]}})
EVENTS = json_object(
    {"epoch": STRING, "last_seq": {"type": "integer"}, "events": list_of(ref("Event"))}
)


def _stream(data: str) -> dict[int | str, dict[str, Any]]:
    told = f"Frames: `event` is the type, `data` {data}, `id` the cursor to go on after."
    schema = {"type": "string", "description": told}
    return {200: {"content": {"text/event-stream": {"schema": schema}}}}


STREAM = _stream("the JSON of an Event (#/components/schemas/Event)")
STREAM_OF_RUNS = _stream("the JSON of an Event (#/components/schemas/Event) and its `plan`")
