"""Django's connection and tables in the schema of one test, for the fixture `beatless_django`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

from psycopg.conninfo import conninfo_to_dict

from beatless.app import App
from beatless.settings import libpq_url

PARAMETERS = {
    "NAME": "dbname",
    "USER": "user",
    "PASSWORD": "password",
    "HOST": "host",
    "PORT": "port",
}
"""Django's settings of a database, and the parameters of libpq that they become."""


@contextmanager
def in_schema_of(app: App) -> Iterator[None]:
    """In this block, Django's default database is the app's, with empty, migrated tables.

    Its code may be in any thread: they share the settings of a database.
    """
    django_setup = importlib.import_module("django").setup
    connection = importlib.import_module("django.db").connection
    call_command = importlib.import_module("django.core.management").call_command
    django_setup()
    found = conninfo_to_dict(libpq_url(app.settings.database_url))
    before = connection.settings_dict.copy()
    connection.close()
    connection.settings_dict.update(
        {ours: found.get(theirs, "") for ours, theirs in PARAMETERS.items()}
    )
    connection.settings_dict["OPTIONS"] = {"options": found.get("options", "")}
    try:
        call_command("migrate", run_syncdb=True, verbosity=0)
        yield
    finally:
        connection.close()
        connection.settings_dict.update(before)
