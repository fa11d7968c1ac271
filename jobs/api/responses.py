"""Answers of the routes: their problems, and pages of runs as text."""

import json
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response

from beatless.client.pages import ApprovalPage, NumberedRunPage, RunPage, SchedulePage
from beatless.cursors import encode_page
from beatless.orchestrator.records import Run

EVENTS_BYTES = 4 * 1024 * 1024
"""After so many bytes of events an answer ends, and more must be asked for."""
RUNS_BYTES = 1024 * 1024
"""The same for lists of runs, which have each run's input, result and error."""

PROBLEM: dict[str, Any] = {
    "content": {
        "application/problem+json": {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "error": {"type": "string"},
                    "arguments": {"type": "array", "items": {}},
                },
            }
        }
    }
}

COMMON = {
    400: "the request or the cursor cannot be read",
    401: "no valid token",
    403: "the caller lacks the scope",
    404: "there is no such run, plan or queue, or not for this token",
    413: "the request is too large",
    422: "the request is invalid",
    503: "Postgres cannot be reached, or a limit is reached; see Retry-After",
}


def refusals(others: dict[int, str] | None = None) -> dict[int | str, dict[str, Any]]:
    """The documentation of the problems that a call may answer; `others` are its own."""
    return {
        status: {"description": text, **PROBLEM}
        for status, text in (COMMON | (others or {})).items()
    }


def run_page(page: RunPage, status: HTTPStatus = HTTPStatus.OK, **others: Any) -> Response:
    """They are JSON already: as objects many would take a multiple of the memory."""
    following = None if page.next is None else encode_page(*page.next)
    tail = json.dumps({"next": following} | others)[1:]
    content = f'{{"runs":[{",".join(page.lines)}],{tail}'
    return Response(content, status, media_type="application/json")


def schedule_page(page: SchedulePage) -> Response:
    """The same of schedules."""
    content = f'{{"schedules":[{",".join(page.lines)}],"next":{json.dumps(page.next)}}}'
    return Response(content, media_type="application/json")


def approval_page(page: ApprovalPage) -> Response:
    """The same of approvals."""
    following = None if page.next is None else encode_page(*page.next)
    content = f'{{"approvals":[{",".join(page.lines)}],"next":{json.dumps(following)}}}'
    return Response(content, media_type="application/json")


def numbered_run_page(page: NumberedRunPage) -> Response:
    """The same of runs in the order of their numbers."""
    following = None if page.next is None else str(page.next)
    content = f'{{"runs":[{",".join(page.lines)}],"next":{json.dumps(following)}}}'
    return Response(content, media_type="application/json")


def location(request: Request, run: Run) -> str:
    """The path of a run, below the mount of the API."""
    return f"{root_of(request)}/v1/runs/{run.run_id}"


def root_of(request: Request) -> str:
    """The path at which the API is mounted; empty if it is not."""
    return str(request.scope.get("root_path", "")).rstrip("/")
