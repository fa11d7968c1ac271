"""Queues, for the whole fleet."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from beatless.api.access import GuardedRoute, Operator
from beatless.api.bodies import QueueBody
from beatless.api.responses import refusals

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/queues", responses=refusals())
def list_queues(client: Operator) -> dict[str, Any]:
    """Every queue with its counts."""
    return {"queues": [asdict(state) for state in client.queues()]}


@router.post("/v1/queues/{queue}/pause", status_code=202, responses=refusals())
def pause_queue(queue: str, client: Operator) -> dict[str, Any]:
    """After the answer no run of the queue starts anywhere."""
    client.pause_queue(queue)
    return {"queue": queue, "paused": True}


@router.post("/v1/queues/{queue}/resume", status_code=202, responses=refusals())
def resume_queue(queue: str, client: Operator) -> dict[str, Any]:
    """Let its runs start again."""
    client.resume_queue(queue)
    return {"queue": queue, "paused": False}


@router.put("/v1/queues/{queue}", responses=refusals())
def set_age_after(queue: str, body: QueueBody, client: Operator) -> dict[str, Any]:
    """Let runs that wait for longer than this come before those of a higher priority."""
    client.set_age_after(queue, body.age_after)
    return {"queue": queue, "age_after": body.age_after}


@router.post("/v1/queues/{queue}/drain", status_code=202, responses=refusals())
def drain_queue(queue: str, client: Operator) -> dict[str, Any]:
    """Take away the runs that wait."""
    return {"queue": queue, "removed": client.drain_queue(queue)}


@router.delete(
    "/v1/queues/{queue}",
    responses=refusals({409: "runs of it are running"}),
)
def obliterate_queue(queue: str, client: Operator, force: bool = False) -> dict[str, Any]:
    """Take the queue away with all of its runs."""
    return {"queue": queue, "removed": client.obliterate_queue(queue, force=force)}
