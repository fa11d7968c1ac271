"""Plans, the fleet, and the token of the request."""

from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request

from beatless.api.access import GuardedRoute, Reader, lacks
from beatless.api.gate import granted
from beatless.api.problems import Problem
from beatless.api.responses import refusals
from beatless.api.services import services_of
from beatless.auth import Scope
from beatless.namespaces import DEFAULT_NAMESPACE
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.system import look
from beatless.transactions import reaching_postgres

router = APIRouter(route_class=GuardedRoute)


@router.get("/v1/plans", responses=refusals())
def list_plans(client: Reader, request: Request) -> dict[str, Any]:
    """The plans that can be started, with their steps, and the JSON Schema of a declared input."""
    del client
    return {
        "plans": [
            {
                "name": plan.name,
                "queue": plan.queue,
                "steps": [each.name for each in plan.elements],
                "on_cancel": None if plan.on_cancel is None else plan.on_cancel.name,
                "undo": list(plan.undo_steps),
                "renamed": plan.renamed,
                "function": isinstance(plan, FunctionPlan),
                "input": plan.input.schema() if isinstance(plan, FunctionPlan) else {},
            }
            for plan in services_of(request).app.plans.values()
        ]
    }


@router.get("/v1/system", responses=refusals())
def show_system(client: Reader, request: Request) -> dict[str, Any]:
    """Relays, workers, versions and lag; the fleet is seen by the namespace `default` only."""
    del client
    if granted(request).namespace != DEFAULT_NAMESPACE:
        raise Problem(
            HTTPStatus.FORBIDDEN, f"a token of the namespace {DEFAULT_NAMESPACE} is needed"
        )
    services = services_of(request)
    with reaching_postgres(services.app.settings.schema, services.engine):
        return asdict(look(services.app, services.engine))


@router.get("/v1/token", responses=refusals())
def describe_token(request: Request) -> dict[str, Any]:
    """The namespace and scopes of the token, with the scopes that they include."""
    grant = granted(request)
    if grant.run_id is not None:
        raise lacks(Scope.RUNS_READ)
    allowed = [scope.value for scope in Scope if grant.allows(scope)]
    return {"namespace": grant.namespace, "scopes": allowed}
