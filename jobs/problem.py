"""Errors as problem documents (RFC 9457), for an HTTP API of any framework."""

import json
import logging
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from beatless.errors import (
    BadRequest,
    QueueBusy,
    SchemaBehind,
    StatementTimeout,
    TransactionConflict,
    UnknownPlan,
    Unreachable,
    WrongEncoding,
)
from beatless.orchestrator.errors import (
    AlreadyDecided,
    ApprovalNotOpen,
    BadPayload,
    CannotRetry,
    EventsPruned,
    RunConflict,
    RunEnded,
    RunIsActive,
    RunNotFound,
    ScheduleConflict,
    ScheduleNotFound,
    SignalConflict,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

STATUSES: dict[type[Exception], HTTPStatus] = {
    AlreadyDecided: HTTPStatus.CONFLICT,
    ApprovalNotOpen: HTTPStatus.CONFLICT,
    BadPayload: HTTPStatus.UNPROCESSABLE_ENTITY,
    BadRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    CannotRetry: HTTPStatus.CONFLICT,
    EventsPruned: HTTPStatus.GONE,
    RunConflict: HTTPStatus.CONFLICT,
    QueueBusy: HTTPStatus.CONFLICT,
    RunEnded: HTTPStatus.CONFLICT,
    RunIsActive: HTTPStatus.CONFLICT,
    RunNotFound: HTTPStatus.NOT_FOUND,
    ScheduleConflict: HTTPStatus.CONFLICT,
    ScheduleNotFound: HTTPStatus.NOT_FOUND,
    SignalConflict: HTTPStatus.CONFLICT,
    SchemaBehind: HTTPStatus.SERVICE_UNAVAILABLE,
    StatementTimeout: HTTPStatus.SERVICE_UNAVAILABLE,
    TransactionConflict: HTTPStatus.SERVICE_UNAVAILABLE,
    UnknownPlan: HTTPStatus.NOT_FOUND,
    Unreachable: HTTPStatus.SERVICE_UNAVAILABLE,
    WrongEncoding: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Of the errors that a request, or the state of a run or of the servers, is the cause of."""

TRY_AGAIN = "try again in a moment"

RETRY_AFTER = {"Retry-After": "2"}
"""The headers of a 503."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemDocument:
    """An answer of HTTP: its status, its headers with the content type, and its content.

    >>> from beatless import ProblemDocument, UnknownPlan, problem_of
    >>> answer = problem_of(UnknownPlan("chekout", ["checkout"]))
    >>> isinstance(answer, ProblemDocument), answer.status
    (True, 404)
    >>> answer.content["detail"]
    "no plan is called 'chekout'; this app has: checkout"
    """

    status: int
    content: dict[str, Any]
    """JSON: `type`, `title`, `status`, `detail`; of EventsPruned `oldest_seq` too."""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> str:
        """The content as text, in ASCII: what was refused may be half of a surrogate pair."""
        return json.dumps(self.content)


def problem_of(error: Exception) -> ProblemDocument | None:
    """The answer to a request that has failed with this error; None if that is no answer to it.

    As that of the mounted API, for a caller who knows nothing of your servers: of a 503 the detail
    only says to try again. None is for errors of others, and for errors of a program or its
    settings, as BadSetting: let them go on to the 500 of your framework.

    >>> from beatless import RunNotFound, problem_of
    >>> answer = problem_of(RunNotFound("order-7"))
    >>> answer.status, answer.content["title"], answer.headers["Content-Type"]
    (404, 'Not Found', 'application/problem+json')
    >>> problem_of(ValueError("of yours")) is None
    True
    """
    status = STATUSES.get(type(error))
    if status is None:
        return None
    away = status is HTTPStatus.SERVICE_UNAVAILABLE
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": status.value,
        "detail": TRY_AGAIN if away else str(error),
    }
    if isinstance(error, EventsPruned):
        content["oldest_seq"] = error.oldest
    headers = {"Content-Type": MEDIA_TYPE, **(RETRY_AFTER if away else {})}
    return ProblemDocument(status=status.value, content=content, headers=headers)


def answer_to(error: Exception) -> ProblemDocument | None:
    """`problem_of`, whose reason for a 503 is logged: the answer does not tell it."""
    found = problem_of(error)
    if found is not None and found.status == HTTPStatus.SERVICE_UNAVAILABLE:
        logger.warning(
            "a request cannot be answered", extra={"action": "unavailable", "reason": str(error)}
        )
    return found
