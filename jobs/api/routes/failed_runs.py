"""Failed runs without a retry."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Response

from beatless.api import responses
from beatless.api.access import GuardedRoute, Reader, Writer
from beatless.api.bodies import CountRequest, FailedRuns
from beatless.api.problems import named
from beatless.api.responses import refusals, run_page
from beatless.api.schemas import RUNS, answers

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/failed-runs", responses=refusals() | answers(RUNS, 200))
def list_failed_runs(client: Reader, chosen: Annotated[FailedRuns, Query()]) -> Response:
    """Failed runs without a retry, oldest end first, some MiB of them."""
    return run_page(
        client.page_of_failed_runs(
            chosen.checked(), limit=chosen.limit, max_bytes=responses.RUNS_BYTES
        )
    )


@router.get("/v1/failed-runs/count", responses=refusals())
def count_failed_runs(client: Reader, chosen: Annotated[CountRequest, Query()]) -> dict[str, int]:
    """The number of failed runs, counted up to `limit`."""
    return {"runs": client.count_failed_runs(chosen.checked(), limit=chosen.limit)}


@router.post("/v1/failed-runs/retry", status_code=202, responses=refusals())
def retry_failed_runs(client: Writer, body: FailedRuns) -> Response:
    """Retry many of them: the new runs, and why others cannot be retried."""
    found = client.retry_page(body.checked(), limit=body.limit, max_bytes=responses.RUNS_BYTES)
    refused = [{"detail": str(reason)} | named(reason) for reason in found.refused]
    return run_page(found, status=HTTPStatus.ACCEPTED, refused=refused)
