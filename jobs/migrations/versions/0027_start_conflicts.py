"""A start from SQL that loses a race for its dedupe key fails with a serialization failure."""

from beatless.migrations import apply

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
