"""Checks of HTTP servers that show runs: whether they answer, and to which callers."""

import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from beatless import loopback
from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, ok, problem, reason_of, skipped
from beatless.doctor.probe import Probe

ANSWER_TIMEOUT_S = 5.0


@check("api")
def api(probe: Probe) -> Verdict:
    """The HTTP API of `--api URL`."""
    return exposure(
        probe.api_url,
        option="--api",
        page=f"{probe.api_url.rstrip('/')}/v1/runs?limit=1",
        advice="make a token: `beatless token create --scope admin`; from then on one is needed",
    )


@check("flower")
def flower(probe: Probe) -> Verdict:
    """Flower at `--flower URL`."""
    return exposure(
        probe.flower_url,
        option="--flower",
        page=probe.flower_url,
        advice="start it with --basic-auth USER:PASSWORD, or let it listen on loopback only",
    )


def exposure(url: str, *, option: str, page: str, advice: str) -> Verdict:
    """Whether a server answers, and requires authentication unless on loopback.

    `page` is the requested page; `advice` is for one without authentication.
    """
    if not url:
        return skipped(f"not looked at: give its address with {option} URL")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return problem(f"{url} is no http address", f"write {option} https://…")
    status = status_of(page)
    if isinstance(status, str):
        return problem(
            f"{url} does not answer: {status}",
            "see whether it runs, and whether it can be reached from here",
        )
    if status >= 500:
        return problem(f"{url} answers with status {status}", "look at its log")
    if status >= 300:
        return ok(f"{url} requires authentication (status {status})")
    if parts.hostname in loopback.NAMES:
        return ok(f"{url} asks for no password, on this machine only")
    return problem(f"{url} is unauthenticated and reachable", advice)


def status_of(url: str) -> int | str:
    """The status of a GET without any credentials, or the reason why there is none."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    opener = urllib.request.build_opener(Stay)
    request = urllib.request.Request(url)  # noqa: S310 - http(s), see above
    try:
        with opener.open(request, timeout=ANSWER_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except (OSError, ValueError) as error:
        return reason_of(error)
