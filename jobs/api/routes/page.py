"""The run page, and the document that describes the API."""

import re
from base64 import b64encode
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse

from beatless.api.access import GuardedRoute
from beatless.api.problems import Problem
from beatless.api.responses import root_of
from beatless.api.services import services_of

router = APIRouter(route_class=GuardedRoute)

STATIC = Path(__file__).parents[1] / "static"
PAGE_FILES = frozenset(path.name for path in STATIC.iterdir())
INLINE_SCRIPT = re.findall(r"<script>(.*?)</script>", (STATIC / "index.html").read_text())[0]
"""Adds the slash that an address below a proxy's path may lack: all that the page loads is relative
to it."""
INLINE_HASH = b64encode(sha256(INLINE_SCRIPT.encode()).digest()).decode()
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; "
        f"script-src 'self' 'sha256-{INLINE_HASH}'; "
        "style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    document = request.app.openapi() | {"servers": [{"url": root_of(request) or "/"}]}
    return JSONResponse(document)


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)


@router.get("/links", include_in_schema=False)
async def links(request: Request) -> dict[str, str | None]:
    return {"flower": services_of(request).flower_url}


@router.get("/static/{name}", include_in_schema=False)
async def static(name: str) -> FileResponse:
    if name not in PAGE_FILES:
        raise Problem(HTTPStatus.NOT_FOUND, f"there is no {name}")
    return FileResponse(STATIC / name, headers=PAGE_HEADERS)
