"""Alembic's autogenerate of a project beside ours."""

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, inspect, make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from beatless import App
from beatless.autogenerate import OURS, include_name, include_object
from beatless.migrations import migrate


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


ENV_PY = re.search(
    r"```python\n(# migrations/env\.py\n.*?)```",
    (Path(__file__).parents[2] / "docs" / "adopting.md").read_text(),
    re.DOTALL,
)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def database_url(beatless_app: App) -> Iterator[str]:
    """A database of the test's own: Alembic reads all schemas, and those of other tests go away."""
    name = f"t_{uuid.uuid4().hex[:8]}"
    url = make_url(beatless_app.settings.database_url)
    admin = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        there = url.set(drivername="postgresql+psycopg", database=name, query={})
        yield there.render_as_string(hide_password=False)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.mark.slow
def test_the_env_py_of_the_page_writes_and_runs_the_migrations_of_the_project_alone(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        migrate(engine, "beatless")
        for name, value in {"config.DATABASE_URL": database_url, "db.Base": Base}.items():
            module, _, attribute = name.partition(".")
            store = ModuleType(f"store.{module}")
            setattr(store, attribute, value)
            monkeypatch.setitem(sys.modules, f"store.{module}", store)
        monkeypatch.setitem(sys.modules, "store", ModuleType("store"))
        config = Config(tmp_path / "alembic.ini")
        config.set_main_option("path_separator", "os")
        command.init(config, str(tmp_path / "migrations"))
        config.set_main_option("script_location", str(tmp_path / "migrations"))
        assert ENV_PY is not None
        (tmp_path / "migrations" / "env.py").write_text(ENV_PY[1])

        command.revision(config, "orders", autogenerate=True)

        (written,) = (tmp_path / "migrations" / "versions").glob("*.py")
        upgrade = written.read_text().partition("def upgrade")[2].partition("def downgrade")[0]
        assert re.findall(r"op\.(\w+)\('(\w+)'", upgrade) == [("create_table", "orders")]
        capsys.readouterr()
        command.upgrade(config, "head", sql=True)
        assert "CREATE TABLE orders" in capsys.readouterr().out
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()
        del config.attributes["connection"]
        command.check(config)  # raises if there is anything left to write
        assert sorted(inspect(engine).get_table_names()) == ["alembic_version", "orders"]
        assert set(inspect(engine).get_table_names(schema="beatless")) >= OURS
    engine.dispose()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "config.py").write_text(f"DATABASE_URL = {database_url!r}\n")
    (tmp_path / "store" / "db.py").write_text(
        "from sqlalchemy.orm import DeclarativeBase\n\n\nclass Base(DeclarativeBase):\n    pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "alembic", "downgrade", "base"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Running downgrade" in done.stderr
