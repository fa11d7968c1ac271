"""Runs that have ended, and their removal."""

from typing import Annotated

from fastapi import APIRouter, Query

from beatless.api.access import GuardedRoute, Reader, Writer
from beatless.api.bodies import CleanRequest, FinishedRuns
from beatless.api.responses import refusals

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/finished-runs", responses=refusals())
def count_finished_runs(client: Reader, chosen: Annotated[FinishedRuns, Query()]) -> dict[str, int]:
    """The number of runs, and of their events, that ended in this state before that time."""
    runs, events = client.count_finished(chosen.state.value, chosen.older_than)
    return {"runs": runs, "events": events}


@router.post("/v1/finished-runs/clean", status_code=202, responses=refusals())
def clean_finished_runs(client: Writer, body: CleanRequest) -> dict[str, int]:
    """Take them away with all of their events; how many runs they were."""
    return {"removed": client.clean(body.state.value, body.older_than, body.limit)}
