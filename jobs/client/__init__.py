"""The in-process client of runs."""

from beatless.client.client import Client
from beatless.client.requests import RunRequest
from beatless.client.signals import SignalRequest

__all__ = ["Client", "RunRequest", "SignalRequest"]
