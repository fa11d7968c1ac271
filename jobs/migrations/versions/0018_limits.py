"""Limits of how many runs hold a lease at once or begin in a time, and who waits for one."""

from beatless.migrations import apply

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
