"""Groups of runs and their weights: those of the caller's namespace."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from beatless.api.access import GuardedRoute, SharesOperator
from beatless.api.bodies import GroupWeight
from beatless.api.responses import refusals

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/groups", responses=refusals())
def list_groups(client: SharesOperator, queue: str | None = None) -> dict[str, Any]:
    """The groups with unfinished runs or a weight, one for each queue."""
    return {"groups": [asdict(state) for state in client.groups(queue=queue)]}


@router.put("/v1/groups", responses=refusals())
def set_group_weight(body: GroupWeight, client: SharesOperator) -> dict[str, Any]:
    """Give a group so many turns for one of a group with the weight 1, in all queues."""
    client.set_group_weight(body.group, body.weight)
    return {"group": body.group, "weight": body.weight}
