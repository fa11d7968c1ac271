"""Access to a route: the gate before the request is read, the scope before it is answered."""

from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from beatless.api.gate import HEALTH, granted
from beatless.api.problems import Problem
from beatless.api.services import services_of
from beatless.auth import Grant, Scope
from beatless.client import Client
from beatless.namespaces import DEFAULT_NAMESPACE

_overrides: ContextVar[dict[Callable[..., Any], Callable[..., Any]]] = ContextVar("_overrides")


class OverridesOfRequest:
    """The `dependency_overrides` of the API that answers: others share its routes."""

    @property
    def dependency_overrides(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        return _overrides.get()


class GuardedRoute(APIRoute):
    """A route that asks the gate, and takes a lane, before it reads the body.

    Not a dependency: FastAPI reads and parses the body before it resolves the first of them.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            services = services_of(request)
            await services.gate.enter(request, self.path)
            token = _overrides.set(request.app.dependency_overrides)
            try:
                if self.path in HEALTH:
                    return await handle(request)
                async with services.lanes.here().lane(request, self.path):
                    return await handle(request)
            finally:
                _overrides.reset(token)

        return guarded


def granted_for(request: Request, scope: Scope, *, run_id: str | None = None) -> Grant:
    """The grant of the request's caller. Raises Problem (403) if it lacks the scope.

    The grant of a stream token is for one run: it is good only where `run_id` names that run, as it
    is stored.
    """
    grant = granted(request)
    if grant.run_id not in (None, run_id):
        raise Problem(
            HTTPStatus.FORBIDDEN,
            f"this token is good for the stream of {grant.run_id} and nothing else",
        )
    if not grant.allows(scope):
        raise lacks(scope)
    return grant


def lacks(scope: Scope) -> Problem:
    """The answer to a caller without the scope."""
    return Problem(HTTPStatus.FORBIDDEN, f"this caller lacks the scope {scope}")


def _client_for(scope: Scope) -> Callable[[Request], Awaitable[Client]]:
    async def client(request: Request) -> Client:
        return services_of(request).clients.of(granted_for(request, scope).namespace)

    return client


Reader = Annotated[Client, Depends(_client_for(Scope.RUNS_READ))]
Writer = Annotated[Client, Depends(_client_for(Scope.RUNS_WRITE))]
Operator = Annotated[Client, Depends(_client_for(Scope.QUEUES))]
"""Queues are the whole fleet's, for tokens of every namespace."""


async def _client_of_shares(request: Request) -> Client:
    grant = granted(request)
    needed = Scope.QUEUES if grant.namespace == DEFAULT_NAMESPACE else Scope.ADMIN
    return services_of(request).clients.of(granted_for(request, needed).namespace)


SharesOperator = Annotated[Client, Depends(_client_of_shares)]
"""Limits and groups are those of the caller's namespace, which its scope `admin` shares out."""
