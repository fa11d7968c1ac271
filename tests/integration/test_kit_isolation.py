"""The test kit's isolation: what a test has for itself, and who is told of what it left."""

import psycopg
import sqlalchemy
from sqlalchemy import make_url

from jobs.pytest_plugin import Services, search
from jobs.settings import engine_url, libpq_url


def test_what_the_url_sets_for_its_sessions_stays(beatless_services: Services) -> None:
    given = make_url(beatless_services.database_url).update_query_dict(
        {"options": "-c statement_timeout=5000", "application_name": "the shop"}
    )
    url = search(given.render_as_string(hide_password=False), "pg_catalog")

    engine = sqlalchemy.create_engine(engine_url(url))
    with engine.connect() as one, psycopg.connect(libpq_url(url)) as other:
        for name, value in (
            ("statement_timeout", "5s"),
            ("search_path", "pg_catalog"),
            ("application_name", "the shop"),
        ):
            assert one.exec_driver_sql(f"SHOW {name}").scalar() == value
            assert other.execute(f"SHOW {name}".encode()).fetchone() == (value,)
    engine.dispose()
