"""The calls of the API about approvals, as exchanges: see `calls`."""

from datetime import timedelta
from typing import Any

from beatless.approval_links import ApprovalLink
from beatless.client.approvals import LINK_S
from beatless.client.signals import new_signal_key
from beatless.http.wire import Call, Exchange, ask, json_of, path_of, record_of
from beatless.orchestrator.records import SentDecision


def approve_run(
    run_id: str, name: str, data: Any = None, *, by: str, key: str | None = None
) -> Exchange[SentDecision]:
    """Decide an approval for which a run waits now; `data` is the JSON of the decision.

    `name` is its occurrence, `refund#1` or `refund#2`; `refund` means whichever is open. The server
    checks the decision by the form. Of two decisions one counts, and the other is told; one whose
    answer was lost is sent again with its `key`, which is random unless given, and decides once.
    Raises BadPayload, AlreadyDecided, ApprovalNotOpen, SignalConflict, RunNotFound, RunEnded and
    BadRequest.

    >>> run = beatless.start_run("complaint")
    >>> executed = beatless.work_until_idle()
    >>> client.approve_run(run.run_id, "Refund", {"approved": True}, by="ann@example.com").new
    True
    """
    # It has its key before it is sent, as a signal.
    body = {"data": data, "by": by, "key": new_signal_key() if key is None else key}
    return ask(
        Call(
            method="POST",
            path=path_of("runs", run_id, "approvals", name),
            body=body,
            read=lambda found: record_of(SentDecision, found),
        )
    )


def approval_link(
    run_id: str, name: str, *, by: str, expires_in: float | timedelta = LINK_S
) -> Exchange[ApprovalLink]:
    """A link by which one person decides one approval of a run, once, without a token.

    Not tried again when its answer is lost. Raises RunNotFound, RunEnded and BadRequest.

    >>> run = beatless.start_run("complaint")
    >>> executed = beatless.work_until_idle()
    >>> client.approval_link(run.run_id, "Refund", by="ann@example.com").occurrence
    'Refund'
    """
    return ask(
        Call(
            method="POST",
            path=path_of("runs", run_id, "approvals", name, "links"),
            body={"by": by, "expires_in": json_of(expires_in)},
            read=lambda found: record_of(ApprovalLink, found),
            repeatable=False,
        )
    )


def revoke_approval_link(link_id: str) -> Exchange[None]:
    """Let a link decide nothing any more. Raises BadRequest if there is no such link.

    >>> run = beatless.start_run("complaint")
    >>> executed = beatless.work_until_idle()
    >>> link = client.approval_link(run.run_id, "Refund", by="ann@example.com")
    >>> client.revoke_approval_link(link.id)
    """
    return ask(
        Call(method="DELETE", path=path_of("approval-links", link_id), read=lambda _found: None)
    )
