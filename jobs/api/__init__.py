"""The HTTP API and the run page, as an ASGI app that can be mounted into another."""

from beatless.api.server import create_api, serve
from beatless.auth import Grant, Scope

__all__ = ["Grant", "Scope", "create_api", "serve"]
