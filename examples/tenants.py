"""An API for tenants: each sees its own runs, has two executed at once, and takes turns.

beatless --app tenants:app dev --env-file dev.env     # then, in a second terminal:
set -a; . ./dev.env; set +a; uvicorn tenants:host
curl -X POST -H 'X-Api-Key: k-acme' http://127.0.0.1:8000/reports/11     # and /jobs/v1/runs
"""

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import APIKeyHeader

from beatless import App, Limit, Plan, RunNotFound, Settings, StepContext, step
from beatless.api import Grant, Scope, create_api

TENANTS = {"k-acme": "acme", "k-zoo": "zoo"}  # yours: a table of hashes


@step(timeout=600)
def write(ctx: StepContext) -> str:
    return f"the report of month {ctx.input['month']}"


# A tenant is a namespace, and a limit holds in one: two reports at once for each of them.
reports = Plan("report", [write], limits=[Limit("reports", at_once=2)])
app = App(Settings.from_env(), [reports])


def authenticate(request: Request) -> Grant | None:
    """For the mounted API: reads the runs of the tenant, and nothing else."""
    tenant = TENANTS.get(request.headers.get("x-api-key", ""))
    return Grant(scopes=[Scope.RUNS_READ], namespace=tenant) if tenant else None


def tenant_of(key: Annotated[str, Depends(APIKeyHeader(name="X-Api-Key"))]) -> str:
    if key not in TENANTS:
        raise HTTPException(401, "no such API key")
    return TENANTS[key]


Tenant = Annotated[str, Depends(tenant_of)]
host = FastAPI()
host.mount("/jobs", create_api(app, authenticate=authenticate))


@host.post("/reports/{month}", status_code=201)
def start(month: int, tenant: Tenant) -> dict[str, str]:
    """The groups of a queue take turns: a tenant with thousands of runs delays no other."""
    run = app.client_for(tenant).start_run("report", {"month": month}, group=tenant)
    return {"run_id": run.run_id}


@host.get("/reports/{run_id}")
def show(run_id: str, tenant: Tenant) -> dict[str, str | None]:
    try:
        run = app.client_for(tenant).get_run(run_id)
    except RunNotFound:  # also that of another tenant
        raise HTTPException(404) from None
    return {"state": run.state, "report": run.result}
