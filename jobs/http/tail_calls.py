"""What a tail over HTTP asks for. Does no I/O."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from beatless.client.tails import choice_of
from beatless.http.wire import Call, Exchange, ask, pairs_of, path_of
from beatless.namespaces import DEFAULT_NAMESPACE


def query_of(
    *,
    plan: str | Sequence[str] | None,
    queue: str | None,
    tags: Mapping[str, str] | None,
    event: str | Sequence[str] | None,
    since: datetime | None,
) -> Mapping[str, Any]:
    """The query of the stream. Raises BadRequest, as an app's client does."""
    choice = choice_of(
        DEFAULT_NAMESPACE, plan=plan, queue=queue, tags=tags, event=event, since=since
    )
    query: dict[str, Any] = {
        "plan": choice.plans,
        "tag": pairs_of(choice.tags),
        "event": choice.events,
    }
    if queue is not None:
        query["queue"] = queue
    if since is not None:
        query["since"] = since.isoformat()
    return query


def reach() -> Exchange[None]:
    """Whether the API answers, and knows the token. Raises Unreachable and AccessDenied."""
    return ask(Call(method="GET", path=path_of("token"), read=lambda _: None))
