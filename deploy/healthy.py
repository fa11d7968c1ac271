"""Whether the process of a container does its work: `python3 healthy.py api|relay|worker|flower`.

Status 0 if so; else 1, and why on stderr. For the health checks of Compose and Kubernetes.
"""

import base64
import importlib
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

SECONDS = 4


def get(url: str, headers: Mapping[str, str] | None = None) -> str:
    request = urllib.request.Request(url, headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return str(answer.read().decode())


def port(variable: str, default: str) -> str:
    """Kubernetes has such variables of its own: a Service called `api` makes API_PORT=tcp://…"""
    value = os.environ.get(variable, "")
    return value if value.isdigit() else default


def metrics() -> str:
    return get(f"http://127.0.0.1:{port('BEATLESS_METRICS_PORT', '9464')}/metrics")


def api() -> None:
    """It reaches a primary with a schema that it knows."""
    get(f"http://127.0.0.1:{port('API_PORT', '8400')}/readyz")


def relay() -> None:
    """It hears the notifications of Postgres."""
    if "\nbeatless_relay_listener_up 1.0" not in metrics():
        raise OSError("the listener is down")


def worker() -> None:
    """It takes commands from the broker, as it takes runs."""
    # Imported here: the others need no beatless, and are asked every few seconds.
    environment = importlib.import_module("beatless.cli.environment").Environment()
    name = f"beatless-1@{socket.gethostname()}"
    if not environment.app.celery.control.ping([name], timeout=SECONDS):
        raise OSError(f"no answer from {name} through the broker")


def flower() -> None:
    """It lets in who knows the password, and nobody else."""
    url = f"http://127.0.0.1:{port('FLOWER_PORT', '5555')}/workers"
    try:
        get(url)
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
    else:
        raise OSError("it asks for no password")
    password = base64.b64encode(os.environ["FLOWER_BASIC_AUTH"].encode()).decode()
    get(url, {"Authorization": f"Basic {password}"})


ROLES: dict[str, Callable[[], None]] = {
    "api": api,
    "relay": relay,
    "worker": worker,
    "flower": flower,
}

if __name__ == "__main__":
    try:
        ROLES[sys.argv[1]]()
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error}")
