"""The in-process client of runs."""

from beatless.client.client import Client
from beatless.client.requests import RunRequest

__all__ = ["Client", "RunRequest"]
