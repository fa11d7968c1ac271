"""What `manage.py check` says of a project's settings of beatless and of its plans."""

import os
from typing import Any

from django.core import checks
from django.db import connections

from beatless.django.databases import database
from beatless.django.project import alias, app_of_project
from beatless.errors import JobsError
from beatless.orchestrator.outcomes import PlanError


def check_project(**_: Any) -> list[checks.CheckMessage]:
    """E001: there is no App to be made. W001: `beatless dev` and Django use two databases."""
    try:
        app_of_project()
    except (JobsError, PlanError, TypeError) as error:
        return [checks.Error(str(error), hint="see docs/django.md", id="beatless.E001")]
    url, using = os.environ.get("BEATLESS_DATABASE_URL"), alias()
    if url and _place(database(url)) != _place(connections[using].settings_dict):
        return [
            checks.Warning(
                f"BEATLESS_DATABASE_URL names another database than DATABASES[{using!r}], which "
                "has the runs",
                hint="DATABASES = {…: database(os.environ['BEATLESS_DATABASE_URL'])}, with "
                "`from beatless.django import database`; or remove the variable",
                id="beatless.W001",
            )
        ]
    return []


def _place(settings: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(settings.get(name) or "") for name in ("HOST", "PORT", "NAME"))
