"""What a run's limits are now is read by functions whose statements a session keeps parsed."""

from beatless.migrations import apply

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
