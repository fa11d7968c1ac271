"""Runs and their streams over HTTP: needs a URL and a token, and neither Postgres nor Redis."""

from jobs.http.aio import AsyncClient
from jobs.http.client import Client

__all__ = ["AsyncClient", "Client"]
