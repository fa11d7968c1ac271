"""The order of the steps in each version of a plan."""

from beatless.migrations import apply

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
