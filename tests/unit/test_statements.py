"""The SQL files: named, described, in use, and with nothing to fill in that nobody knows."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

import beatless
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Leases
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.records import RUN_COLUMNS, NewRun
from beatless.outbox import statements as reader
from beatless.outbox.queries import Queries
from beatless.outbox.statements import Statement, StatementFile, read, statements

PACKAGE = Path(beatless.__file__).parent
FOLDERS = (PACKAGE, PACKAGE / "orchestrator", PACKAGE / "outbox")
FILES = sorted(
    path for folder in FOLDERS for path in folder.rglob("*.sql") if "migrations" not in path.parts
)
OF_MODULES = [path for path in FILES if path.name != reader.SHARED]


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def subscripts(source: str) -> set[str]:
    """Names by which a module takes statements: the x of `sql["x"]` and `self._sql["x"]`."""
    return {
        node.slice.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
        and ast.unparse(node.value).split(".")[-1].lstrip("_") == "sql"
    }


def test_the_module_beside_a_file_runs_each_of_its_statements_and_no_other() -> None:
    run = {path: subscripts(path.with_suffix(".py").read_text()) for path in OF_MODULES}
    assert run == {path: set(read(path).statements) for path in OF_MODULES}


def test_each_fragment_is_in_a_statement_or_asked_for() -> None:
    used = {name for path in FILES for name in re.findall(r"\{([a-z_]+)\}", path.read_text())}
    sources = [path.read_text() for folder in FOLDERS for path in folder.rglob("*.py")]
    used |= {name for text in sources for name in re.findall(r'\bfragment\("([a-z_]+)"', text)}
    defined = {
        name for path in FILES for name in re.findall(r"-- fragment: ([a-z_]+)", path.read_text())
    }
    assert defined <= used


def test_a_statement_names_its_tables_with_the_schema() -> None:
    tables = r"(?:FROM|JOIN|INTO|UPDATE|USING)\s+(?:runs|run_events|run_outbox|dispatches)\b"
    for path in OF_MODULES:
        for statement in read(path).statements.values():
            assert not re.search(tables, statement.text), (path, statement.name)


KEPT_BYTES = 4096
"""Of a statement, up to which psycopg keeps what it has parsed: it parses others each time."""


@pytest.mark.parametrize(
    "found",
    [
        GroupCommit("beatless").sql,
        Leases("beatless", seconds=30.0).sql,
        Journal("beatless", max_event_bytes=1).sql,
        vars(Queries("beatless")),
    ],
)
def test_no_statement_of_a_run_is_parsed_each_time(found: Mapping[str, object]) -> None:
    texts = {name: text for name, text in found.items() if isinstance(text, str)}
    assert {name: len(text) for name, text in texts.items() if len(text) > KEPT_BYTES} == {}


def test_the_columns_of_a_run_are_those_that_a_run_is_made_of() -> None:
    columns = read(PACKAGE / "orchestrator" / "fragments.sql").fragments["run_columns"].text
    columns = columns.replace("{run_options}", OPTION_SQL["run_options"])
    assert columns.replace(",", "").split() == [f"r.{name}" for name in RUN_COLUMNS]


def test_a_new_run_has_the_same_members_as_json_and_as_parameters() -> None:
    found = read(PACKAGE / "orchestrator" / "fragments.sql").fragments
    columns = found["new_run_columns"].text.replace("{option_types}", OPTION_SQL["option_types"])
    parameters = found["new_run_parameters"].text.replace(
        "{option_parameters}", OPTION_SQL["option_parameters"]
    )
    as_json = re.findall(r'"?(\w+)"? (\w+)(?:,|$)', columns)
    as_parameters = re.findall(r'%\((\w+)\)s::(\w+) "?(\w+)"?(?:,|$)', parameters)
    assert [(name, kind) for name, kind, named in as_parameters if name == named] == as_json
    new = NewRun(
        **dict.fromkeys(("run_id", "namespace", "plan", "plan_version", "queue", "input"), ""),
        **dict.fromkeys(("key", "not_before", "delay", "deadline")),
    )
    assert [*new.parameters] == [name for name, _ in as_json]


TABLES = r"(?:runs|run_events|run_outbox|dispatches|queues|workers|dead_letters|api_tokens)\b"
EMBEDDED = re.compile(rf'\b(?:FROM|JOIN|INTO|UPDATE|USING) "?\{{\S+\}}"?\.{TABLES}')


def test_no_module_but_those_of_the_test_kit_has_a_statement_over_our_tables() -> None:
    """The kit moves stored times and looks at rows, as tests do."""
    sources = {path for folder in FOLDERS for path in folder.rglob("*.py")}
    found = {path for path in sources if EMBEDDED.search(path.read_text())}
    explains = Path(reader.__file__)
    assert {path for path in found if path.parent.name != "testing"} <= {explains}


def parse(text: str) -> StatementFile:
    part = Statement(name="part", description="Shared.", text="{schema}.runs")
    return StatementFile.parse(text, fragments={"part": part}, where="here")


def test_comments_are_kept_out_of_the_text_and_fragments_are_put_in() -> None:
    found = parse(
        "-- About the file.\n\n-- fragment: which\n-- Which.\nid = %(id)s\n\n-- name: find\n"
        "-- Find a run.\n-- Why.\nSELECT *\n  -- because\n  FROM {part}\n WHERE {which}\n"
    ).statements
    assert found == {
        "find": Statement(
            name="find",
            description="Find a run. Why. because",
            text="SELECT *\nFROM {schema}.runs\nWHERE id = %(id)s",
        )
    }


def test_text_that_only_looks_like_a_placeholder_stays() -> None:
    text = "SELECT '{}'::jsonb, '{reused,next}', '{1}'"
    (found,) = parse(f"-- name: look\n-- Look.\n{text}").statements.values()
    assert (found.text, found.placeholders) == (text, frozenset())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("-- name: a\n-- A.\nSELECT 1\n-- name: a\n-- A.\nSELECT 2", "a is defined twice"),
        ("-- name: part\n-- A.\nSELECT 1", "part is defined twice"),
        ("-- name: a\nSELECT 1", "a lacks a description"),
        ("-- name: a\n-- A.\n", "a lacks a description or a text"),
        ("-- name: a", "a lacks a description"),
        ("-- name: a\n-- A.\nSELECT 1 -- one", "a has a comment beside text"),
        ("SELECT 1\n-- name: a\n-- A.\nSELECT 1", "text before the first block"),
    ],
)
def test_a_block_that_is_not_well_formed_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{problem}"):
        parse(text)


def test_what_nobody_has_filled_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.sql").write_text("-- name: a\n-- A.\nSELECT FROM {schema}.runs LIMIT {most}")
    module = str(tmp_path / "some.py")

    assert statements(module, "s", most=7) == {"a": "SELECT FROM s.runs LIMIT 7"}
    with pytest.raises(ValueError, match="a has no value for most"):
        statements(module, "s")
    with pytest.raises(ValueError, match=r"no statement beside .* has least"):
        statements(module, "s", most=7, least=1)


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "some.sql"
    path.write_text("-- name: a\n-- A.\nSELECT 1")
    first = read(path)
    path.unlink()
    assert read(path) is first
