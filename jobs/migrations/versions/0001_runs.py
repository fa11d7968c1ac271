"""Runs, their journal, the outbox and the dispatches."""

from alembic import op

from jobs.migrations import sql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sql("0001_runs.pre.sql"))
