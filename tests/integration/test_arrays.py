"""Arrays that are sent as text arrive as the values that they were made of."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beatless import App
from beatless.outbox.queries import array, execute

LARGEST = 2**63 - 1
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
HOSTILE = ["", " ", "NULL", "null", '"', "\\", '\\"', "{}", "{a,b}", "a,b", "'", "\n\t", "é\u2028"]


@pytest.fixture
def connection(beatless_app: App) -> Iterator[psycopg.Connection]:
    found = beatless_app.executors.connect()
    yield found
    found.close()


def returned(connection: psycopg.Connection, kind: str, values: list[Any]) -> list[Any]:
    ((found,),) = execute(connection, f"SELECT %(values)s::{kind}[]", {"values": array(values)})
    return found


def test_values_arrive_as_they_are(connection: psycopg.Connection) -> None:
    lists: list[tuple[str, list[Any]]] = [
        ("text", HOSTILE),
        ("text", [None, *HOSTILE, None]),
        ("bool", [True, False, None]),
        ("bigint", [0, -1, LARGEST, -LARGEST - 1, None]),
        ("float8", [0.1, 1e300, -2.5e-9, float("inf"), None]),
        ("text", []),
    ]
    assert [returned(connection, *each) for each in lists] == [values for _, values in lists]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(TEXTS | st.none()))
def test_any_text_arrives_as_it_is(
    connection: psycopg.Connection, values: list[str | None]
) -> None:
    assert returned(connection, "text", values) == values


def test_a_text_that_cannot_be_stored_is_an_error_of_the_data(
    connection: psycopg.Connection,
) -> None:
    with pytest.raises(psycopg.DataError, match="NUL"):
        returned(connection, "text", ["a\0b"])
