"""The App of a Django project: from its settings, with the plans of its apps."""

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

import django
from django.apps import apps
from django.conf import ENVIRONMENT_VARIABLE
from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.module_loading import import_string, module_has_submodule
from sqlalchemy import event

from beatless.app import App
from beatless.client.base import DEFAULT_APP
from beatless.django.databases import url_of
from beatless.django.task_plans import TASKS_MODULE, plans_of_tasks, run_backends
from beatless.errors import BadSetting
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.schedule import Schedule
from beatless.settings import Settings, variables

T = TypeVar("T", Plan, Schedule)

SETTING = "BEATLESS"
"""The name of our mapping in Django's settings."""

MODULE = "plans"
"""The module of a Django app whose plans and schedules are found."""

OURS = {"DATABASE", "MIGRATE", "NAME", "ON_FAILURE", "PAGE_URL", "REDACT"}
"""Members of BEATLESS beside the settings of an App."""

PASSWORDS = {"DATABASE_PASSWORD", "REDIS_PASSWORD", "BROKER_PASSWORD"}
"""Members that are functions: the environment cannot hold them."""


def given() -> dict[str, Any]:
    """The mapping BEATLESS of Django's settings. Raises BadSetting for members that none can be."""
    found = getattr(django_settings, SETTING, {})
    if not isinstance(found, Mapping):
        raise BadSetting(SETTING, f"is {type(found).__name__}, and must be a dict", "")
    known = {entry.name.upper() for entry in variables(Settings)} | PASSWORDS | OURS
    for name in found:
        if name == "DATABASE_URL":
            raise BadSetting(
                f"{SETTING}['DATABASE_URL']",
                "is not a setting: runs are stored beside the rows of DATABASES, whose alias is "
                "DATABASE in BEATLESS",
                "",
            )
        if name not in known:
            there = ", ".join(sorted(known - {"APP", "DATABASE_URL", "FAULT"}))
            raise BadSetting(f"{SETTING}[{name!r}]", f"is no setting; there are: {there}", "")
    return dict(found)


def alias() -> str:
    """The alias in DATABASES of the database that has the runs."""
    found: str = given().get("DATABASE", "default")
    if found not in connections:
        there = ", ".join(connections)
        raise BadSetting(
            f"{SETTING}['DATABASE']", f"is {found!r}, and DATABASES has: {there}", "default"
        )
    return found


def settings_of_project(*, test: bool = False) -> Settings:
    """The database of DATABASES; else BEATLESS_* of the environment, and then BEATLESS.

    `test` is for a test database, which LISTEN_URL does not name. Raises BadSetting.
    """
    found = given()
    texts = {
        f"{SETTING}_{name}": str(value)
        for name, value in found.items()
        if name not in OURS | PASSWORDS and value is not None
    }
    url = url_of(connections[alias()])
    direct = {"listen_url": url} if test else {}
    functions = {name.lower(): found[name] for name in PASSWORDS & found.keys()}
    environ = {name: value for name, value in os.environ.items() if value}
    try:
        return Settings.from_env(
            {**texts, **environ},
            database_url=url,
            **direct,
            **functions,
        )
    except BadSetting as error:
        if error.problem != "is not set":
            raise
        name = error.name.removeprefix(f"{SETTING}_")
        problem = f"is not set, and BEATLESS of Django's settings has no {name}"
        raise BadSetting(error.name, problem, error.example) from error


def modules_of_apps(name: str) -> list[ModuleType]:
    """The modules of this name of the installed apps that have one, but for ours, imported."""
    return [
        importlib.import_module(f"{config.name}.{name}")
        for config in apps.get_app_configs()
        if config.label != "beatless"
        and config.module is not None
        and module_has_submodule(config.module, name)
    ]


def found_in(modules: list[ModuleType], kind: type[T]) -> list[T]:
    """The objects of this kind that the modules have as attributes, each once."""
    found = [each for module in modules for each in vars(module).values() if isinstance(each, kind)]
    return list({id(each): each for each in found}.values())


def new_app(*, test: bool = False) -> App:
    """An App as the settings are now. Raises BadSetting, PlanError and what `plans.py` raises.

    `test` is for a test database: Postgres drops none to which a connection is open, so that each
    is closed after its use.
    """
    found, modules = given(), modules_of_apps(MODULE)
    tasks = plans_of_tasks(modules_of_apps(TASKS_MODULE)) if run_backends() else []
    hooks = {
        name.lower(): import_string(hook) if isinstance(hook := found[name], str) else hook
        for name in ("ON_FAILURE", "REDACT")
        if found.get(name) is not None
    }
    app = App(
        settings_of_project(test=test),
        plans=[*found_in(modules, Plan), *tasks],
        schedules=found_in(modules, Schedule),
        name=found.get("NAME", DEFAULT_APP),
        **hooks,
    )
    if test:
        event.listen(app.engine, "checkin", lambda _connection, record: record.invalidate())
    return app


def app_of_project() -> App:
    """The App of this process, made at the first call, which sets Django up if nobody has.

    Raises BadSetting, PlanError, and ImproperlyConfigured without our app in INSTALLED_APPS.
    """
    if not (django_settings.configured or os.environ.get(ENVIRONMENT_VARIABLE)):
        problem = "is not set: call `manage.py beatless …` instead of `beatless …`, or export it"
        raise BadSetting(ENVIRONMENT_VARIABLE, problem, "shop.settings")
    if not apps.ready:
        django.setup()
    for config in apps.get_app_configs():
        if config.label == "beatless":
            app: App = config.app
            return app
    raise ImproperlyConfigured('add "beatless.django" to INSTALLED_APPS of Django\'s settings')
