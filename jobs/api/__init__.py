"""The HTTP API and the run page, as an ASGI app that can be mounted into another."""

from beatless.api.server import create_api, serve

__all__ = ["create_api", "serve"]
