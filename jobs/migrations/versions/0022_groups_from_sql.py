"""Groups of runs that are started from SQL."""

from beatless.migrations import apply

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
