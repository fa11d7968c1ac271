"""The digest of a step's arguments, by which a replay notices that a call has changed."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from beatless.orchestrator.errors import BadPayload

DIGEST_CHARACTERS = 16
"""Of the SHA-256 in hexadecimal: 64 bits, against mistakes and not against forgers."""


GIVEN_BYTES = 65_536
"""The largest arguments of a step that may have to be undone."""


def digest(step: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The digest of the arguments. Raises BadPayload for one that is not JSON.

    Besides JSON: dataclasses, models of pydantic, Structs of msgspec, times, durations, Decimal,
    UUID, Enum and bytes. The order of keys does not matter.
    """
    try:
        text = json.dumps([list(args), dict(kwargs)], sort_keys=True, default=_as_json)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadPayload(
            f"step {step}: its arguments",
            f"cannot be compared when the plan is called again ({error}): give it JSON, or pin the "
            "call with id=",
        ) from error
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:DIGEST_CHARACTERS]


def as_json(step: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a step that may have to be undone, as they are stored. Raises BadPayload."""
    text = json.dumps({"args": list(args), "kwargs": dict(kwargs)}, default=_as_json)
    if len(text) > GIVEN_BYTES:
        raise BadPayload(
            f"step {step}: its arguments",
            f"are stored, so that it can be undone, and have {len(text):,} bytes; at most "
            f"{GIVEN_BYTES:,}: give it an id, and let the step look up the rest",
        )
    found: dict[str, Any] = json.loads(text)
    return found


def digest_of_wait(kind: str, names: Sequence[str]) -> str:
    """The digest of a wait: of the signals that end it, and not of its duration."""
    return digest(kind, [kind, list(names)], {})


def _as_json(value: Any) -> Any:
    match value:
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal() | UUID():
            return str(value)
        case Enum():
            return value.value
        case bytes():
            return value.hex()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return dump(mode="json")
    if (names := getattr(value, "__struct_fields__", None)) is not None:
        config = value.__struct_config__
        tag = {} if config.tag_field is None else {config.tag_field: config.tag}
        members = {name: getattr(value, name) for name in names}
        unset = sys.modules["msgspec"].UNSET
        return tag | {name: each for name, each in members.items() if each is not unset}
    raise TypeError(f"a {type(value).__name__} is not JSON")
