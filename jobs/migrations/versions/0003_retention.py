"""What retention needs: how far a run is pruned, and what is due next."""

from alembic import op

from jobs.migrations import sql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sql("0003_retention.pre.sql"))
