"""The HTTP API and the run page, as an ASGI app that can be mounted into another."""

from beatless.api.serving import serve  # the first package that it misses is the server, uvicorn

# isort: split
from beatless.api.problems import handle_errors
from beatless.api.server import create_api
from beatless.auth import Grant, Scope

__all__ = ["Grant", "Scope", "create_api", "handle_errors", "serve"]
