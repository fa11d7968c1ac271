"""Alembic's autogenerate of a project beside ours."""

from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Integer, MetaData, Table

from beatless import App
from beatless.autogenerate import OURS, include_name, include_object


def differences(app: App, metadata: MetaData, **options: Any) -> list[tuple[str, str, str]]:
    """(what, schema, table) of this app's schema.

    Those of other tests are not looked at: they come and go meanwhile.
    """
    schema = app.settings.schema
    given = options.pop("include_name", lambda *_: True)

    def include_name(name: str | None, type_: str, parents: Any) -> bool:
        return (type_ != "schema" or name == schema) and given(name, type_, parents)

    options |= {"include_schemas": True, "include_name": include_name, "version_table": "none"}
    with app.engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts=options), metadata)
    changes = [change for change in found if isinstance(change, tuple)]
    named = [
        (change[0], getattr(change[1], "table", change[1]))
        for change in changes
        if change[0].endswith(("_table", "_index"))
    ]
    return [(what, table.schema, table.name) for what, table in named if table.schema == schema]


@pytest.mark.parametrize("name", ["include_name", "include_object"])
def test_autogenerate_sees_what_is_the_projects_and_nothing_of_ours(
    beatless_app: App, name: str
) -> None:
    schema = beatless_app.settings.schema
    theirs = MetaData()
    Table("orders", theirs, Column("id", Integer, primary_key=True), schema=schema)
    dropped = {
        table for what, _, table in differences(beatless_app, theirs) if what == "remove_table"
    }
    assert dropped == OURS

    helper = {"include_name": include_name, "include_object": include_object}[name]

    asked: list[str] = []

    def also(*arguments: Any) -> bool:
        asked.append(arguments[0])
        return True

    for given in (helper(schema), helper(schema, also=also)):
        found = differences(beatless_app, theirs, **{name: given})
        assert found == [("add_table", schema, "orders")]
    assert asked


def test_tables_in_the_default_schema_have_no_schema_for_alembic() -> None:
    included = include_name("public")
    assert not included("runs", "table", {"schema_name": None})
    assert included("runs", "table", {"schema_name": "shop"})
    assert included("orders", "table", {"schema_name": None})
    assert include_name()("runs", "table", {"schema_name": None})
