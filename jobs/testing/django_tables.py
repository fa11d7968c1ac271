"""Django's connection and tables in the schema of one test, for the fixture `beatless_django`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from beatless.app import App
from beatless.django.databases import PARAMETERS, database


@contextmanager
def in_schema_of(app: App) -> Iterator[None]:
    """In this block, Django's default database is the app's, with empty, migrated tables.

    So are its other aliases of the same database. Its code may be in any thread: they share the
    settings of a database.
    """
    importlib.import_module("django").setup()
    connections = importlib.import_module("django.db").connections
    call_command = importlib.import_module("django.core.management").call_command
    post_migrate = importlib.import_module("django.db.models.signals").post_migrate
    apps = importlib.import_module("django.apps").apps
    default = _place(connections["default"])
    wrappers = [each for each in connections.all() if _place(each) == default]
    before = [each.settings_dict.copy() for each in wrappers]
    own = database(app.settings.database_url)
    for each in wrappers:
        each.close()
        # Its engine stays, which may be one that extends Django's.
        each.settings_dict.update({name: own[name] for name in (*PARAMETERS, "OPTIONS")})
    try:
        # The schema has our tables: those of `beatless.django` would be others.
        with _without_ours(apps, post_migrate):
            call_command("migrate", run_syncdb=True, verbosity=0)
        yield
    finally:
        for each, settings in zip(wrappers, before, strict=True):
            each.close()
            each.settings_dict.update(settings)


def _place(wrapper: Any) -> tuple[Any, ...]:
    return tuple(wrapper.settings_dict.get(name) for name in ("ENGINE", "HOST", "PORT", "NAME"))


@contextmanager
def _without_ours(apps: Any, post_migrate: Any) -> Iterator[None]:
    configs = [each for each in apps.get_app_configs() if each.name == "beatless.django"]
    for config in configs:
        config.disconnect(post_migrate)
    try:
        yield
    finally:
        for config in configs:
            config.connect(post_migrate)
