"""Limits of how many runs hold a lease at once: those of the caller's namespace."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query

from beatless.api.access import GuardedRoute, SharesOperator
from beatless.api.bodies import LimitBody
from beatless.api.responses import refusals

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/limits", responses=refusals())
def list_limits(client: SharesOperator) -> dict[str, Any]:
    """The limits that are in use, waited for or set, one for each key."""
    return {"limits": [asdict(state) for state in client.limits()]}


@router.put("/v1/limits/{name}", responses=refusals())
def set_limit(
    name: str,
    body: LimitBody,
    client: SharesOperator,
    force: Annotated[bool, Query(description="also a name that no plan has")] = False,
) -> dict[str, Any]:
    """Let so many runs with the same key run at once, or begin, whatever plans say."""
    client.set_limit(name, body.at_once, rate=body.rate, force=force)
    return {"limit": name, "at_once": body.at_once, "rate": body.rate}


@router.delete("/v1/limits/{name}", responses=refusals())
def release_limit(name: str, client: SharesOperator) -> dict[str, Any]:
    """Let each run bring the number of its plan again."""
    return {"limit": name, "was_set": client.release_limit(name)}
