"""Schedules: each starts a run at every tick of a cron expression or an interval."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from beatless.api import responses
from beatless.api.access import GuardedRoute, Reader, Writer
from beatless.api.bodies import BackfillRequest, CancelRequest, ScheduleChange, ScheduleRequest
from beatless.api.responses import refusals

router = APIRouter(route_class=GuardedRoute)

UNKNOWN = {404: "no schedule has this name"}
UNFIT = {409: "this version or machine cannot compute its ticks"}
TAKEN = {409: "the name belongs to another schedule, or to an app that declares it"}


@router.get("/v1/schedules", responses=refusals())
def list_schedules(
    client: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """The schedules by name, as many as fit into some MiB; `after` is the `next` before."""
    found = client.page_of_schedules(after=after, limit=limit, max_bytes=responses.RUNS_BYTES)
    return responses.schedule_page(found)


@router.post("/v1/schedules", status_code=201, responses=refusals(TAKEN))
def create_schedule(body: ScheduleRequest, client: Writer) -> dict[str, Any]:
    """Store a schedule: it fires from the next tick on."""
    return client.create_schedule(body.schedule()).to_dict()


@router.get("/v1/schedules/{name}", responses=refusals(UNKNOWN))
def get_schedule(name: str, client: Reader) -> dict[str, Any]:
    """One schedule, with its next five ticks."""
    return client.schedule(name).to_dict()


@router.patch("/v1/schedules/{name}", responses=refusals(UNKNOWN | TAKEN))
def update_schedule(name: str, body: ScheduleChange, client: Writer) -> dict[str, Any]:
    """Change members of a schedule that was made at run time."""
    return client.update_schedule(body.changed(client.schedule(name))).to_dict()


@router.delete("/v1/schedules/{name}", status_code=204, responses=refusals(UNKNOWN | TAKEN))
def delete_schedule(name: str, client: Writer) -> Response:
    """Take a schedule away; its runs stay."""
    client.delete_schedule(name)
    return Response(status_code=204)


@router.post("/v1/schedules/{name}/pause", responses=refusals(UNKNOWN))
def pause_schedule(name: str, client: Writer) -> dict[str, Any]:
    """Fire no tick until it is resumed; ticks of that time are passed over."""
    return client.pause_schedule(name).to_dict()


@router.post("/v1/schedules/{name}/resume", responses=refusals(UNKNOWN | TAKEN))
def resume_schedule(name: str, client: Writer) -> dict[str, Any]:
    """Fire from the next tick on."""
    return client.resume_schedule(name).to_dict()


@router.post("/v1/schedules/{name}/run-now", status_code=201, responses=refusals(UNKNOWN))
def run_schedule_now(name: str, client: Writer) -> dict[str, Any]:
    """Start a run out of turn."""
    return client.run_schedule_now(name).to_dict()


@router.post("/v1/schedules/{name}/backfill", status_code=202, responses=refusals(UNKNOWN | UNFIT))
def backfill_schedule(name: str, body: BackfillRequest, client: Writer) -> dict[str, Any]:
    """Start a run for each tick of this time that has none; their number, and their tag."""
    filled = client.backfill_schedule(name, body.from_, body.to)
    return {"id": filled.id, "runs": filled.runs}


@router.post("/v1/backfills/{backfill_id}/cancel", status_code=202, responses=refusals())
def cancel_backfill(
    backfill_id: str, client: Writer, body: CancelRequest | None = None
) -> dict[str, Any]:
    """Cancel the runs of a backfill that have not ended; their number."""
    reason = body.reason if body else None
    return {"id": backfill_id, "cancelled": client.cancel_backfill(backfill_id, reason=reason)}
