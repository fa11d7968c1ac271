"""Event messages that could not be published."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from beatless.api.access import GuardedRoute, Operator
from beatless.api.bodies import Letters
from beatless.api.problems import Problem
from beatless.api.responses import refusals
from beatless.errors import BadRequest

router = APIRouter(route_class=GuardedRoute)

Letter = Annotated[int, Path(ge=1, le=2**63 - 1, description="id of a dead letter")]


@contextmanager
def _no_such_letter() -> Iterator[None]:
    try:
        yield
    except BadRequest as error:
        raise Problem(HTTPStatus.NOT_FOUND, str(error), error) from error


@router.get("/v1/dead-letters", responses=refusals())
def list_dead_letters(
    client: Operator,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
) -> dict[str, Any]:
    """Messages that could not be published, oldest first; `after` is the `next` before."""
    found = client.dead_letters(limit, after)
    following = found[-1].id if len(found) == limit else None
    return {"dead_letters": [asdict(letter) for letter in found], "next": following}


@router.get("/v1/dead-letters/{letter_id}", responses=refusals())
def get_dead_letter(letter_id: Letter, client: Operator) -> dict[str, Any]:
    """One of them."""
    with _no_such_letter():
        return asdict(client.dead_letter(letter_id))


@router.post("/v1/dead-letters/requeue", status_code=202, responses=refusals())
def requeue_dead_letters(client: Operator, body: Letters) -> dict[str, Any]:
    """Publish many messages again, oldest first."""
    again = client.requeue_dead_letters(reason=body.reason, limit=body.limit)
    return {"requeued": again}


@router.post("/v1/dead-letters/{letter_id}/requeue", status_code=202, responses=refusals())
def requeue_dead_letter(letter_id: Letter, client: Operator) -> dict[str, Any]:
    """Publish the message again."""
    with _no_such_letter():
        client.requeue_dead_letter(letter_id)
    return {"id": letter_id}


@router.delete("/v1/dead-letters/{letter_id}", status_code=204, responses=refusals())
def discard_dead_letter(letter_id: Letter, client: Operator) -> Response:
    """Forget the message; its events stay in the journal."""
    with _no_such_letter():
        client.discard_dead_letter(letter_id)
    return Response(status_code=204)
