"""Decide approvals of runs: with a token, or as the person for whom a link was made."""

from datetime import timedelta
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from beatless.api import approval_page, responses
from beatless.api.access import GuardedRoute, Reader, Writer, granted_for
from beatless.api.bodies import ApprovalBody, ApprovalLinkBody, place_of
from beatless.api.form_fields import decision_of, fields_of, refused_field
from beatless.api.gate import LINK_ROUTE
from beatless.api.problems import Problem
from beatless.api.responses import refusals
from beatless.api.schemas import APPROVAL_LINK, DECISION, answers
from beatless.api.services import services_of
from beatless.approval_links import FoundLink, LinkState
from beatless.auth import Scope
from beatless.errors import BadRequest
from beatless.namespaces import DEFAULT_NAMESPACE
from beatless.orchestrator.errors import (
    AlreadyDecided,
    ApprovalNotOpen,
    BadPayload,
    RunEnded,
    RunNotFound,
)
from beatless.orchestrator.open_waits import OpenWait
from beatless.transactions import reaching_postgres

router = APIRouter(route_class=GuardedRoute)

FORM = "application/x-www-form-urlencoded"

MOST_FIELDS = 1000


@router.get("/v1/approvals", responses=refusals())
def list_approvals(
    client: Reader,
    plan: str | None = None,
    queue: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: str | None = None,
) -> Response:
    """Open approvals: those of `limit` runs that wait, newest first; `cursor` as for runs."""
    found = client.page_of_approvals(
        plan=plan,
        queue=queue,
        before=place_of(cursor),
        limit=limit,
        max_bytes=responses.RUNS_BYTES,
    )
    return responses.approval_page(found)


@router.post(
    "/v1/runs/{run_id}/approvals/{name}",
    status_code=202,
    response_model=None,
    responses=refusals({409: "it is not open, or somebody else has decided it"})
    | answers(DECISION, 202)
    | {200: {"description": "it was sent before"} | answers(DECISION, 200)[200]},
)
def approve_run(
    run_id: str, name: str, body: ApprovalBody, client: Writer, response: Response
) -> dict[str, Any]:
    """Decide an approval for which a run waits: `data` is checked by its form.

    `name` is an occurrence, `refund#1` or `refund#2`; without a number it is whichever is open.
    """
    sent = client.approve_run(run_id, name, body.data, by=body.by, key=body.key)
    if not sent.new:
        response.status_code = 200
    return {
        "run_id": sent.run_id,
        "occurrence": sent.occurrence,
        "by": sent.by,
        "at": sent.at.isoformat(),
        "new": sent.new,
    }


@router.post(
    "/v1/runs/{run_id}/approvals/{name}/links",
    status_code=201,
    response_model=None,
    responses=refusals({409: "the run has ended"}) | answers(APPROVAL_LINK, 201),
)
def approval_link(
    run_id: str, name: str, body: ApprovalLinkBody, client: Writer, request: Request
) -> dict[str, Any]:
    """Make a link by which one person decides one approval, once.

    It is good no longer than the token that makes it.
    """
    maker = granted_for(request, Scope.RUNS_WRITE).token_id
    link = client.approval_link_of(
        maker, run_id, name, by=body.by, expires_in=timedelta(seconds=body.expires_in)
    )
    return {
        "id": link.id,
        "run_id": link.run_id,
        "occurrence": link.occurrence,
        "by": link.by,
        "expires_at": link.expires_at.isoformat(),
        "token": link.token,
        "url": link.url(_base_url(request)),
    }


@router.delete("/v1/approval-links/{link_id}", status_code=204, responses=refusals())
def revoke_approval_link(link_id: str, client: Writer) -> Response:
    """Let a link decide nothing any more."""
    try:
        client.revoke_approval_link(link_id)
    except BadRequest as error:
        raise Problem(HTTPStatus.NOT_FOUND, str(error), error) from error
    return Response(status_code=204)


@router.get(LINK_ROUTE, include_in_schema=False)
def show_approval(token: str, request: Request) -> Response:
    """The form, or why there is none. Changes nothing: scanners of mail open links."""
    link, opened = _found(token, request)
    if link is None:
        return approval_page.no_such_link()
    if opened is None:
        return approval_page.refusal(link, _state(link))
    return approval_page.question(link, opened, fields_of(opened.schema or {}))


@router.post(LINK_ROUTE, include_in_schema=False)
async def decide_approval(token: str, request: Request) -> Response:
    """Decide. The token in the address is the authority: no cookie or session counts."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"a decision is sent as {FORM}")
    # Before its body is awaited: who has no link holds no place of the API's writes for long.
    link, _ = await run_in_threadpool(_found, token, request)
    if link is None:
        return approval_page.no_such_link()
    body = await request.body()
    try:
        given = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS))
    except ValueError as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"the form cannot be read: {error}") from error
    return await run_in_threadpool(_decide, token, given, request)


def _decide(token: str, given: dict[str, str], request: Request) -> Response:
    link, opened = _found(token, request)
    if link is None:
        return approval_page.no_such_link()
    if opened is None:
        return approval_page.refusal(link, _state(link))
    fields = fields_of(opened.schema or {})
    try:
        services_of(request).clients.of(link.namespace).decide_by_link(
            link, decision_of(fields, given)
        )
    except (BadPayload, BadRequest) as error:
        field = refused_field(fields, getattr(error, "where", ""))
        problem = str(error) if field is None else f"{error} (the field {field})"
        return approval_page.question(link, opened, fields, answers=given, problem=problem)
    except (AlreadyDecided, ApprovalNotOpen, RunEnded, RunNotFound):
        again, _ = _found(token, request)  # it was decided, or has ended, meanwhile
        return approval_page.refusal(again or link, _state(again or link))
    return approval_page.decided(link, opened)


def _base_url(request: Request) -> str:
    """The address at which the caller has reached the API, and which it alone is told.

    A proxy that ends TLS says so: by http the token in the address would be there for all to read.
    """
    scheme = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    base = request.base_url
    return str(base.replace(scheme="https") if scheme == "https" else base)


def _found(token: str, request: Request) -> tuple[FoundLink | None, OpenWait | None]:
    services = services_of(request)
    with reaching_postgres(services.app.settings.schema, services.engine):
        found = services.clients.of(DEFAULT_NAMESPACE).link_of(token)
    return (None, None) if found is None else found


def _state(link: FoundLink) -> LinkState:
    """Why it may not decide: of one with nothing against it, its wait has ended."""
    return LinkState.ENDED if link.state is LinkState.OPEN else link.state
