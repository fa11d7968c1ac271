"""Liveness, readiness and metrics."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder

from beatless.api.access import GuardedRoute
from beatless.api.services import services_of

router = APIRouter(route_class=GuardedRoute)


@router.get("/livez", include_in_schema=False)
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", include_in_schema=False)
async def readyz(request: Request) -> JSONResponse:
    return await services_of(request).readiness.answer()


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(
        encode(services_of(request).app.metrics.registry), headers={"Content-Type": content_type}
    )
