"""Delayed dispatches cost a relay nothing, and sent ones are counted by queue."""

from beatless.migrations import apply

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
