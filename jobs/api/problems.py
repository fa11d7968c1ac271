"""Errors as problem documents (RFC 9457)."""

import json
import logging
import sys
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy import exc
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from beatless.errors import JobsError, Unreachable
from beatless.orchestrator.errors import EventsPruned, OrchestratorError
from beatless.orchestrator.events import NESTING
from beatless.problem import MEDIA_TYPE, RETRY_AFTER, STATUSES, TRY_AGAIN, answer_to
from beatless.transactions import first_line

logger = logging.getLogger(__name__)


class Problem(Exception):
    """An answer that is not a success, with the members of its document."""

    def __init__(
        self, status: HTTPStatus, detail: str, error: Exception | None = None, **members: Any
    ) -> None:
        """`error` is the exception of the in-process client: an HTTP client raises it again."""
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.members = named(error) | members if error else members
        self.headers: dict[str, str] = {}

    def with_headers(self, **headers: str) -> "Problem":
        """The same problem with headers; underscores become dashes."""
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self


def named(error: Exception) -> dict[str, Any]:
    """The members of a document by which `beatless.http` makes the same error again."""
    return {"error": type(error).__name__, "arguments": list(error.args)}


def document(
    status: HTTPStatus, detail: str, headers: dict[str, str] | None = None, **members: Any
) -> Response:
    """A problem document as a response."""
    content = {"type": "about:blank", "title": status.phrase, "status": status.value}
    return Response(
        # In ASCII: the refused value may be half of a surrogate pair, which is not valid text.
        json.dumps({**content, "detail": detail, **members}),
        status_code=status.value,
        headers=headers,
        media_type=MEDIA_TYPE,
    )


def handle_errors(host: Starlette) -> None:
    """Have routes of your own answer the errors of beatless as the mounted API does.

    `host` is your FastAPI or Starlette app. An error that is no answer to a request, as
    BadSetting, goes on as before: see `beatless.problem_of`, by which each is answered. A handler
    of your own for one of them, as for RunNotFound, comes first.

    >>> from beatless.api import handle_errors
    >>> from fastapi import FastAPI
    >>> from fastapi.testclient import TestClient
    >>> host = FastAPI()
    >>> handle_errors(host)
    >>> @host.get("/orders/{number}")
    ... def order(number: int):
    ...     return app.client.get_run(f"order-{number}").state
    >>> answer = TestClient(host).get("/orders/404")
    >>> answer.status_code, answer.json()["detail"]
    (404, "no run has id 'order-404'")
    """

    async def answer(request: Request, error: Exception) -> Response:
        found = answer_to(error)
        if found is None or request.scope["type"] != "http":
            raise error
        return Response(found.body, found.status, found.headers)

    for kind in (JobsError, OrchestratorError):
        host.add_exception_handler(kind, answer)


def install(api: FastAPI) -> None:
    """Let every error leave as a problem document."""

    def ours(_request: Request, error: Exception) -> Response:
        status = STATUSES.get(type(error))
        if status is None:
            logger.error(
                "an error has no HTTP status",
                extra={"action": "no_status", "error": type(error).__name__},
                exc_info=error,
            )
            return unexpected(_request, error)
        if isinstance(error, Unreachable):
            # Holders of a token may not learn where the servers are.
            logger.warning(
                "a request cannot be answered",
                extra={"action": "unreachable", "server": error.server, "reason": error.reason},
            )
            error = Unreachable(error.server, TRY_AGAIN)
        headers = RETRY_AFTER if status is HTTPStatus.SERVICE_UNAVAILABLE else None
        members = named(error)
        if isinstance(error, EventsPruned):
            members["oldest_seq"] = error.oldest
        return document(status, str(error), headers, **members)

    def problem(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)  # noqa: S101 - registered for nothing else
        return document(error.status, error.detail, error.headers, **error.members)

    def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for nothing else
        headers = dict(error.headers or {})
        cause = error.__cause__
        if isinstance(cause, RecursionError | ValueError):  # FastAPI could not read a body
            if isinstance(cause, RecursionError):
                problem = f"is nested deeper than {NESTING} levels"
            elif isinstance(cause, json.JSONDecodeError | UnicodeDecodeError):
                problem = f"is not JSON: {cause}"
            else:
                most = sys.get_int_max_str_digits()
                problem = f"has an integer of more than {most} digits: send it as a string"
            return document(HTTPStatus.UNPROCESSABLE_ENTITY, f"the body {problem}", headers)
        return document(HTTPStatus(error.status_code), str(error.detail), headers)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for nothing else
        problems = [
            f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}"
            for entry in error.errors()
        ]
        if not request.headers.get("content-type", "application/json").startswith(
            "application/json"
        ):
            problems.append("is the body JSON? Then say so: Content-Type: application/json")
        return document(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(problems))

    def away(request: Request, error: Exception) -> Response:
        return ours(request, Unreachable("Postgres", first_line(error)))

    def unexpected(_request: Request, _error: Exception) -> Response:
        # The server logs it with its traceback.
        return document(HTTPStatus.INTERNAL_SERVER_ERROR, "this is our fault; see the server's log")

    api.add_exception_handler(Exception, unexpected)
    for error in (exc.OperationalError, exc.InterfaceError, exc.TimeoutError):
        api.add_exception_handler(error, away)
    api.add_exception_handler(Problem, problem)
    api.add_exception_handler(JobsError, ours)
    api.add_exception_handler(OrchestratorError, ours)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(RequestValidationError, invalid)
