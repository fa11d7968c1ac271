"""beatless in a Django project: `"beatless.django"` in INSTALLED_APPS, settings in `BEATLESS`.

`from beatless.django import start_run` starts runs in the caller's `transaction.atomic()`,
`manage.py beatless …` is the command line, `beatless.django:app` the App of the project. Nothing is
imported before it is used: Django imports this package while its settings are being read.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beatless.app import App
    from beatless.django.databases import database
    from beatless.django.django_client import (
        DjangoClient,
        client,
        signal_run,
        start_run,
        start_runs,
    )

    app: App

__all__ = ["DjangoClient", "app", "client", "database", "signal_run", "start_run", "start_runs"]

_MODULES = {
    "DjangoClient": "beatless.django.django_client",
    "client": "beatless.django.django_client",
    "database": "beatless.django.databases",
    "signal_run": "beatless.django.django_client",
    "start_run": "beatless.django.django_client",
    "start_runs": "beatless.django.django_client",
}


def __getattr__(name: str) -> Any:
    if name == "app":
        return importlib.import_module("beatless.django.project").app_of_project()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
