"""Tokens of the HTTP API."""

from alembic import op

from jobs.migrations import sql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sql("0002_api_tokens.pre.sql"))
