"""Names that Postgres takes only in quotes are no schema of ours."""

from dataclasses import replace

import psycopg
import pytest

from beatless import App, BadSetting
from beatless.settings import RESERVED


def test_every_word_that_this_postgres_has_reserved_is_refused(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    found = postgres.execute("SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')")
    assert {word for (word,) in found} <= RESERVED


@pytest.mark.parametrize("name", ["user", "order", "pg_catalog", "pg_mine"])
def test_a_reserved_schema_is_refused_by_name(beatless_app: App, name: str) -> None:
    with pytest.raises(BadSetting, match="reserved"):
        replace(beatless_app.settings, schema=name)
