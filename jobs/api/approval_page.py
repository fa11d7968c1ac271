"""The pages behind a link to an approval: without scripts, nothing in them is loaded."""

from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from http import HTTPStatus
from pathlib import Path

from fastapi.responses import HTMLResponse

from beatless.api.form_fields import FormField, html_of
from beatless.approval_links import FoundLink, LinkState
from beatless.orchestrator.open_waits import OpenWait

STYLE = (Path(__file__).parent / "static" / "approval.css").read_text()
"""Within the page: who has a link need not be allowed to read the files of the run page."""

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; "
        f"style-src 'sha256-{b64encode(sha256(STYLE.encode()).digest()).decode()}'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex, nofollow",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

GONE = HTTPStatus.GONE

REFUSALS = {
    LinkState.EARLY: (
        HTTPStatus.CONFLICT,
        "Not yet",
        "The run has not come to this question. Open the link again in a while.",
    ),
    LinkState.USED: (GONE, "You have decided", "This link was used. It can be used once."),
    LinkState.DECIDED: (HTTPStatus.CONFLICT, "It was decided", "Somebody else was first."),
    LinkState.ENDED: (
        GONE,
        "It is not asked any more",
        "The run has ended, was cancelled, or has gone on without a decision.",
    ),
    LinkState.EXPIRED: (GONE, "This link has expired", "Ask for another one."),
    LinkState.REVOKED: (GONE, "This link was revoked", "Ask for another one."),
}


def page(title: str, body: str, status: HTTPStatus = HTTPStatus.OK) -> HTMLResponse:
    """A page with this heading; `body` is HTML."""
    return HTMLResponse(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="robots" content="noindex"><meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>{body}</main></body></html>",
        status.value,
        headers=HEADERS,
    )


def no_such_link() -> HTMLResponse:
    """The answer to a token that no link has."""
    return page(
        "There is no such link",
        "<p>Has its address come whole? Else ask for another one.</p>",
        HTTPStatus.NOT_FOUND,
    )


def refusal(link: FoundLink, state: LinkState) -> HTMLResponse:
    """The answer to a link that may not decide."""
    status, title, text = REFUSALS[state]
    facts = ""
    if link.decided_by is not None and link.decided_at is not None:
        at = link.decided_at.isoformat(sep=" ", timespec="minutes")
        facts = f"<p>Decided by {escape(link.decided_by)}, {at}.</p>"
    return page(title, f"<p>{text}</p>{facts}{_about(link)}", status)


def question(
    link: FoundLink,
    opened: OpenWait,
    fields: list[FormField],
    *,
    answers: Mapping[str, str] | None = None,
    problem: str = "",
) -> HTMLResponse:
    """The form of an approval, with the answers that were refused for this problem."""
    refused = f'<p class="problem" role="alert">{escape(problem)}</p>' if problem else ""
    body = (
        f"{refused}<p>You decide as <strong>{escape(link.by)}</strong>, once.</p>"
        f'<form method="post" autocomplete="off">{html_of(fields, answers)}</form>{_about(link)}'
    )
    status = HTTPStatus.UNPROCESSABLE_ENTITY if problem else HTTPStatus.OK
    return page(opened.title or opened.occurrence, body, status)


def decided(link: FoundLink, opened: OpenWait) -> HTMLResponse:
    """The answer to a decision that is stored."""
    title = escape(opened.title or opened.occurrence)
    return page(
        "Your decision is stored",
        f"<p>{title}</p><p>Decided by {escape(link.by)}.</p>{_about(link)}",
    )


def _about(link: FoundLink) -> str:
    return (
        f'<p class="soft">Run {escape(link.run_id)} of plan {escape(link.plan)}, '
        f"{escape(link.occurrence)}</p>"
    )
