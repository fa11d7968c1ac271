"""Tokens of leases whose processes have died, and tokens that have made links of approvals."""

from beatless.migrations import apply

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
