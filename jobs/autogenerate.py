"""A filter for Alembic's autogenerate, which would drop the tables of beatless.

With `include_schemas=True` Alembic compares all schemas of the database with your models, and
removes all tables that they do not have. In your `env.py`:

    from beatless.autogenerate import include_name

    context.configure(…, include_schemas=True, include_name=include_name())
"""

from collections.abc import Callable, Mapping
from typing import Any

from beatless.auth import api_tokens
from beatless.orchestrator.tables import runs
from beatless.schema import VERSION_TABLE

IncludeName = Callable[[str | None, Any, Mapping[Any, Any]], bool]
IncludeObject = Callable[[Any, str | None, Any, bool, Any], bool]

OURS = frozenset({VERSION_TABLE, *runs.metadata.tables, api_tokens.name})


def include_name(schema: str = "beatless", *, also: IncludeName | None = None) -> IncludeName:
    """For `context.configure(include_name=…)`: all but the tables of beatless in this schema.

    `schema` is the value of BEATLESS_SCHEMA; `also` is a filter of your own.
    """

    def included(name: str | None, type_: Any, parents: Mapping[Any, Any]) -> bool:
        if type_ == "table" and _ours(schema, parents.get("schema_name"), name):
            return False
        return also is None or also(name, type_, parents)

    return included


def include_object(schema: str = "beatless", *, also: IncludeObject | None = None) -> IncludeObject:
    """The same for `context.configure(include_object=…)`, which reads the tables first."""

    def included(
        found: Any, name: str | None, type_: Any, reflected: bool, compare_to: Any
    ) -> bool:
        table = found if type_ == "table" else getattr(found, "table", None)
        if reflected and table is not None and _ours(schema, table.schema, table.name):
            return False
        return also is None or also(found, name, type_, reflected, compare_to)

    return included


def _ours(schema: str, found: str | None, table: str | None) -> bool:
    # Alembic calls the schema that the connection looks in first None.
    return table in OURS and (found == schema or (found is None and schema == "public"))
