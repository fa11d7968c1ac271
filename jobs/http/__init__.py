"""Runs and their streams over HTTP: needs a URL and a token, and neither Postgres nor Redis."""

from beatless.http.aio import AsyncClient
from beatless.http.client import Client

__all__ = ["AsyncClient", "Client"]
