"""Authentication: by token, by the host app's own function, or by a loopback connection."""

import logging
import threading
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from inspect import isawaitable, signature
from urllib.parse import urlsplit

from fastapi import Request
from sqlalchemy import exc
from starlette.concurrency import run_in_threadpool

from beatless import loopback
from beatless.api.problems import Problem
from beatless.auth import EVERYTHING, Grant, Tokens
from beatless.outbox.clock import monotonic
from beatless.transactions import first_line, reaching_postgres

logger = logging.getLogger(__name__)

Authenticate = Callable[[Request], Grant | Awaitable[Grant | None] | None]
"""The host app's own authentication of a request; None refuses."""

HEALTH = frozenset({"/livez", "/readyz"})
"""Open to all callers: supervisors and load balancers ask them."""

LINK_ROUTE = "/approve/{token}"
"""Open to all callers: the token in the address is the authority, and the route checks it."""

PROXY_HEADERS = (
    "cf-",
    "client-ip",
    "fastly-",
    "forwarded",
    "proxy-",
    "true-client-ip",
    "via",
    "x-amz",
    "x-appengine-",
    "x-arr-",
    "x-azure-",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-envoy-",
    "x-forwarded",
    "x-original-",
    "x-proxy",
    "x-real-ip",
)
"""Prefixes of the headers by which a proxy marks forwarded requests."""

TOKEN_CHECK_S = 5.0
"""Seconds for which the existence of a token is cached."""

DEFAULT_PORTS = {"http": 80, "https": 443}


class Gate:
    """Decides the grant of each request.

    1. a token, if there is one in the request
    2. else the grant of the host app's `authenticate`, if it has one
    3. else everything while no token exists: to a person on this machine, or with `is_open` to all
    """

    def __init__(
        self, tokens: Tokens, schema: str, *, authenticate: Authenticate | None, is_open: bool
    ) -> None:
        """Raises TypeError for an `authenticate` that cannot be called with a request."""
        if authenticate is not None:
            _check_callable(authenticate)
        self._tokens = tokens
        self._schema = schema
        self._authenticate = authenticate
        self._is_open = is_open
        self._mutex = threading.Lock()
        self._guarded = False
        self._check_at = 0.0

    async def enter(self, request: Request, path: str) -> None:
        """Raises Problem (401), without details, unless the request is admitted."""
        if path in HEALTH or path == LINK_ROUTE:
            return
        if path.startswith("/v1/"):
            request.state.beatless_grant = await self._grant(request)
        elif not await self._may_view(request):
            raise self._refusal()

    async def _may_view(self, request: Request) -> bool:
        """At routes that need no token once there is one: the page, its document, the metrics."""
        if self._authenticate is None:
            if self._may_be_open(request):
                return True
        elif await self._asked(self._authenticate, request):
            return True
        return await run_in_threadpool(self._is_guarded)

    async def _grant(self, request: Request) -> Grant:
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        bearer = secret.strip() if kind.lower() == "bearer" else ""
        in_url = request.query_params.get("token", "")
        if in_url and not bearer:
            found = await run_in_threadpool(self._find, in_url)
            if found is None or found.run_id is None:
                # A token of a person does not belong into a URL.
                raise self._refusal()
            return found
        if self._authenticate is not None:
            granted = await self._asked(self._authenticate, request)
            if granted is not None:
                if not bearer and is_foreign(request):
                    raise _unauthorized("another site's page has the browser send this request")
                return granted
        elif not bearer and self._may_be_open(request):
            if not await run_in_threadpool(self._any):
                return EVERYTHING
            raise self._refusal()
        found = await run_in_threadpool(self._find, bearer) if bearer else None
        if found is None:
            raise self._refusal()
        return found

    def _refusal(self) -> Problem:
        if self._authenticate is None:
            return _unauthorized("a valid bearer token is needed: `beatless token create`")
        return _unauthorized(
            "the app in which this API is mounted does not let this request in, "
            "and it has no valid bearer token"
        )

    def _may_be_open(self, request: Request) -> bool:
        return is_local(request) or (self._is_open and not is_foreign(request))

    async def _asked(self, authenticate: Authenticate, request: Request) -> Grant | None:
        answer = await run_in_threadpool(authenticate, request)
        found = await answer if isawaitable(answer) else answer
        if found is None:
            return None
        try:
            return _checked(found)
        except (TypeError, ValueError) as error:
            # Of the host app, not of its caller.
            logger.error(
                "authenticate has returned what is no grant",
                extra={"action": "no_grant", "reason": str(error)},
                exc_info=(type(error), error, None),
            )
            raise Problem(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "the app in which this API is mounted has returned what is no grant: see its log",
            ) from None

    def _find(self, secret: str) -> Grant | None:
        with reaching_postgres(self._schema):
            return self._tokens.find(secret)

    def _any(self) -> bool:
        with reaching_postgres(self._schema):
            return self._tokens.any()

    def _is_guarded(self) -> bool:
        """Whether there is any token. While Postgres is unreachable, the last known answer."""
        with self._mutex:
            if monotonic() >= self._check_at:
                try:
                    self._guarded = self._tokens.any()
                except (exc.DBAPIError, exc.TimeoutError) as error:
                    logger.warning(
                        "tokens cannot be read",
                        extra={"action": "tokens_unknown", "reason": first_line(error)},
                    )
                self._check_at = monotonic() + TOKEN_CHECK_S
            return self._guarded


def _check_callable(authenticate: Authenticate) -> None:
    """Raises TypeError unless it can be called with one argument."""
    try:
        signature(authenticate).bind(None)
    except ValueError:
        return  # its signature cannot be known
    except TypeError as error:
        raise TypeError(
            "authenticate must be a function of the request, such as "
            f"`def authenticate(request): …`, not {authenticate!r}"
        ) from error


def _checked(found: object) -> Grant:
    """The grant. Raises TypeError and ValueError that say how it must be."""
    if not isinstance(found, Grant):
        raise TypeError(f"authenticate must return a Grant or None, not {found!r}")
    return found


def granted(request: Request) -> Grant:
    """The grant of the request's caller."""
    found: Grant = request.state.beatless_grant
    return found


def is_local(request: Request) -> bool:
    """Whether only a person on this machine can have sent this.

    Judged by both ends of the socket, for a caller chooses its headers; and by the headers all
    the same: another site's page may reach a server on loopback under a name of its own, or have
    the browser send a form to it, and a proxy on this machine passes on requests of others. One
    without such headers speaks HTTP/1.0 to us, or names another port than ours.
    """
    here, peer = request.scope.get("server"), request.scope.get("client")
    return (
        here is not None
        and (loopback.is_address(here[0]) or here[0] in loopback.NAMES)
        and peer is not None
        and loopback.is_address(peer[0])
        and request.scope.get("http_version") != "1.0"
        and not any(name.replace("_", "-").startswith(PROXY_HEADERS) for name in request.headers)
        and _host_is_ours(request, here[1])
        and not is_foreign(request)
    )


def _host_is_ours(request: Request, port: int | None) -> bool:
    """Compared as text: parsers of addresses drop parts that they do not know."""
    default = DEFAULT_PORTS.get(request.scope["scheme"])
    names = [f"[{name}]" if ":" in name else name for name in loopback.NAMES]
    good = {f"{name}:{port or default}" for name in names}
    if (port or default) == default:
        good |= set(names)
    hosts = request.headers.getlist("host")
    return len(hosts) == 1 and hosts[0].lower() in good


def is_foreign(request: Request) -> bool:
    """Whether a browser marks this as a request of another site's page.

    By `Sec-Fetch-Site` (W3C Fetch Metadata), which no page can write; browsers that have none yet
    send `Origin` with each request that changes something.
    """
    site = request.headers.get("sec-fetch-site")
    if site in ("same-origin", "same-site", "none"):
        return False
    origin = request.headers.get("origin")
    if origin is None:
        return site is not None
    try:
        page = urlsplit(origin)
        return page.hostname not in loopback.NAMES and page.netloc != request.headers.get("host")
    except ValueError:
        return True


def _unauthorized(detail: str) -> Problem:
    return Problem(HTTPStatus.UNAUTHORIZED, detail).with_headers(WWW_Authenticate="Bearer")
