"""The relay finds runs that are past their deadline."""

from beatless.migrations import apply

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
