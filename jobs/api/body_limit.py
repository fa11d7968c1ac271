"""Limits of a request body: bytes, seconds, and no content encoding."""

import asyncio
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beatless.api import problems

BODY_BYTES = 1024 * 1024
BODY_TIMEOUT_S = 30.0
HEAD_BYTES = 64 * 1024
"""Of address and headers."""


class BodyLimit:
    """Counts the bytes of a body as they come, independent of its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            await problems.document(*refusal)(scope, receive, send)
        elif scope["type"] == "http":
            await self._app(scope, _counted(receive), send)
        else:
            await self._app(scope, receive, send)


def _refusal(scope: Scope) -> tuple[HTTPStatus, str] | None:
    """The problem with a body that its headers announce."""

    def values(name: bytes) -> list[bytes]:
        return [value for key, value in scope["headers"] if key == name]

    size = sum(len(name) + len(value) for name, value in scope["headers"])
    path = scope.get("raw_path") or scope["path"].encode(errors="surrogatepass")
    if size + len(path) + len(scope["query_string"]) > HEAD_BYTES:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        return status, f"address and headers may have {HEAD_BYTES} bytes"
    lengths = values(b"content-length")
    if lengths and (values(b"transfer-encoding") or len(set(lengths)) > 1):
        # Two that read it by different ones see different requests.
        return HTTPStatus.BAD_REQUEST, "a request has one Content-Length, or Transfer-Encoding"
    if lengths and not lengths[0].isdigit():
        return HTTPStatus.BAD_REQUEST, "Content-Length is not a number"
    # Python reads no number of thousands of digits.
    if lengths and (len(lengths[0]) > 20 or int(lengths[0]) > BODY_BYTES):
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large()
    if any(value.strip().lower() != b"identity" for value in values(b"content-encoding")):
        return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "bodies are not unpacked: send JSON as it is"
    return None


def _counted(receive: Receive) -> Receive:
    began = asyncio.get_running_loop().time()
    size, whole = 0, False

    async def counted() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(began + BODY_TIMEOUT_S):
                message = await receive()
        except TimeoutError as error:
            detail = f"the body did not come within {BODY_TIMEOUT_S:g} s"
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, detail) from error
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > BODY_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _too_large())
        return message

    return counted


def _too_large() -> str:
    return (
        f"a request may have {BODY_BYTES} bytes: store large input elsewhere and pass a reference"
    )
