"""Decisions of approvals, and the links by which people send them."""

from beatless.migrations import apply

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
