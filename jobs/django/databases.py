"""Django's settings of a database as a URL of libpq, and the other way round."""

from typing import Any

from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import URL

from beatless.errors import BadSetting
from beatless.settings import libpq_url

PARAMETERS = {
    "NAME": "dbname",
    "USER": "user",
    "PASSWORD": "password",
    "HOST": "host",
    "PORT": "port",
}
"""Django's settings of a database, and the parameters of libpq that they become."""

ENGINE = "django.db.backends.postgresql"

OF_DJANGO = frozenset(
    {"assume_role", "cursor_factory", "isolation_level", "pool", "server_side_binding"}
)
"""Members of OPTIONS that libpq does not know: for Django's own connections alone."""


def database(url: str, **more: Any) -> dict[str, Any]:
    """The entry of Django's DATABASES for a URL; `more` is added to it, as CONN_MAX_AGE.

    Raises BadSetting for text that is no URL of Postgres.

    >>> from beatless.django import database
    >>> found = database("postgresql://shop@db.example/shop?sslmode=require", CONN_MAX_AGE=60)
    >>> found["NAME"], found["HOST"], found["OPTIONS"], found["CONN_MAX_AGE"]
    ('shop', 'db.example', {'sslmode': 'require'}, 60)
    """
    try:
        found = conninfo_to_dict(libpq_url(url))
    except Exception as error:
        example = "postgresql://user:password@db.example/app"
        raise BadSetting("the database's URL", f"cannot be read: {error}", example) from error
    entry: dict[str, Any] = {"ENGINE": ENGINE}
    for django, libpq in PARAMETERS.items():
        entry[django] = str(found.pop(libpq, None) or "")
    return {**entry, "OPTIONS": found, **more}


def url_of(wrapper: Any) -> str:
    """The URL of Django's connection, which is not made here. Raises BadSetting for no Postgres."""
    settings: dict[str, Any] = wrapper.settings_dict
    name = f"DATABASES[{wrapper.alias!r}]"
    if wrapper.vendor != "postgresql":
        raise BadSetting(
            name,
            f"has the engine {settings['ENGINE']}, and runs live in Postgres: change it, or name "
            "another alias as DATABASE in BEATLESS",
            "",
        )
    options = {
        key: str(value)
        for key, value in settings.get("OPTIONS", {}).items()
        if key not in OF_DJANGO
    }
    host, port = str(settings.get("HOST") or ""), str(settings.get("PORT") or "")
    if host.startswith(("/", "@")) or "," in host:
        options |= {"host": host} | ({"port": port} if port else {})
        host = port = ""
    if not port.isdecimal() and port:
        raise BadSetting(name, f"has the PORT {port!r}, which is no number", "")
    return URL.create(
        "postgresql",
        username=settings.get("USER") or None,
        password=settings.get("PASSWORD") or None,
        host=host or None,
        port=int(port) if port else None,
        database=settings.get("NAME") or None,
        query=options,
    ).render_as_string(hide_password=False)
