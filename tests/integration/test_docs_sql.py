"""The blocks of docs/sql.md are executed as they are printed, in their order."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from beatless import Plan, step, wait
from beatless.client.requests import OPTIONS
from beatless.settings import libpq_url
from beatless.testing import Kit

TEXT = (Path(__file__).parents[2] / "docs" / "sql.md").read_text()
LEFT_OUT = {"debounce", "max_wait"}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("checkout", [step(name="charge")(lambda ctx: ctx.input["order"])]),
        Plan("pay", [wait("paid")]),
    ]


@pytest.fixture
def blocks(beatless: Kit) -> dict[str, list[str]]:
    """The SQL of each section, with the names of this test."""
    schema, found = beatless.app.settings.schema, {}
    for section in TEXT.split("\n## "):
        text = "\n".join(re.findall(r"```sql\n(.*?)```", section, re.DOTALL))
        text = re.sub(r"\bbeatless\b", schema, text)
        text = re.sub(r"\b(shop|till)\b", rf"{schema}_\1", text)
        found[section.partition("\n")[0].strip("# ")] = text
    return found


@pytest.fixture
def session(beatless: Kit) -> Iterator[psycopg.Connection]:
    """A session of the owner, in a schema of its own, with the roles of the page."""
    schema = beatless.app.settings.schema
    beatless.apply_plans()
    with psycopg.connect(libpq_url(beatless.app.settings.database_url), autocommit=True) as found:
        found.execute(f"CREATE SCHEMA {schema}_page")
        found.execute(f"SET search_path TO {schema}_page")
        for role in ("shop", "till"):
            found.execute(f"CREATE ROLE {schema}_{role}")
            found.execute(f"GRANT USAGE ON SCHEMA {schema}_page TO {schema}_{role}")
        yield found
        found.execute("RESET ROLE")
        found.execute(f"DROP SCHEMA {schema}_page CASCADE")
        for role in ("shop", "till"):
            found.execute(f"DROP OWNED BY {schema}_{role}")
            found.execute(f"DROP ROLE {schema}_{role}")


def test_the_page_works(beatless: Kit, session: psycopg.Connection, blocks: Any) -> None:
    schema, client = beatless.app.settings.schema, beatless.client
    client.start_run("pay", run_id="order-7")
    for section in ("Runs from SQL", "From a trigger", "Signals", "Rights"):
        session.execute(blocks[section])
    beatless.work_until_idle()
    ended = {run.key: run.result for run in client.list_runs(plan="checkout")}
    assert ended == {"order:1": 1, "order:7": 7}
    assert client.get_run("order-7").state.value == "completed"

    session.execute(f"SET ROLE {schema}_till")
    [(run_id,)] = session.execute("SELECT order_checkout(8)").fetchall()
    with pytest.raises(errors.InsufficientPrivilege):
        session.execute(f"SELECT {schema}.start_run('checkout')")
    assert client.get_run(run_id).key == "order:8"


def test_the_role_of_the_page_starts_and_signals_runs_and_changes_none(
    beatless: Kit, session: psycopg.Connection, blocks: Any
) -> None:
    schema = beatless.app.settings.schema
    beatless.client.start_run("pay", run_id="order-7")
    session.execute(blocks["Rights"])
    session.execute(f"SET ROLE {schema}_shop")
    for _ in range(2):
        session.execute(blocks["Runs from SQL"])
        session.execute(blocks["Signals"])
    session.execute(f"SELECT {schema}.start_run('checkout', '{{\"order\": 2}}', dedupe_key => 'd')")
    for table in ("runs", "dispatches", "run_events", "run_outbox", "signals", "declared_plans"):
        with pytest.raises(errors.InsufficientPrivilege):
            session.execute(
                sql.SQL("DELETE FROM {} WHERE false").format(sql.Identifier(schema, table))
            )
    beatless.work_until_idle()
    assert {run.state.value for run in beatless.client.list_runs()} == {"completed"}


def test_the_test_of_the_page_passes(beatless: Kit) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    names["test_an_order_is_checked_out"](beatless)


def test_the_arguments_of_the_page_are_those_of_the_function(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    [(names, inputs)] = postgres.execute(
        "SELECT proargnames, proargtypes::regtype[]::text[] FROM pg_proc "
        "WHERE proname = 'start_run' AND pronamespace = current_schema()::regnamespace"
    ).fetchall()
    table = TEXT.partition("## Its arguments")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|[^|]*\|", table, re.MULTILINE)))) == {
        *names
    }
    assert set(names) - {"plan", "input", "namespace"} <= OPTIONS.keys() - LEFT_OUT
    assert len(inputs) == len(names)
