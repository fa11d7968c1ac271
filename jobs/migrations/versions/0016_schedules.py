"""Schedules, and the runs that they have started."""

from beatless.migrations import apply

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
