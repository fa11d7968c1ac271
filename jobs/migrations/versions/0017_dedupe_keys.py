"""Keys of which one run at a time is unfinished, and the runs that wait for its end."""

from beatless.migrations import apply

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
