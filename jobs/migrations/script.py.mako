"""${message}"""

from alembic import op

from jobs.migrations import sql

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(sql("${up_revision}.pre.sql"))
